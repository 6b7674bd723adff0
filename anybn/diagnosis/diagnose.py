"""diagnose: run batches through layers as training does, learn nothing, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from anybn._layer import BatchNorm
from anybn._moments import Moments
from anybn._population import check_forward, tools_for, with_progress
from anybn.diagnosis.findings import findings_of
from anybn.diagnosis.layer import Kept, measured
from anybn.diagnosis.observed import Observed
from anybn.diagnosis.report import Diagnosis
from anybn.state.state import BatchNormState
from anybn.state.store import Batch, Store

Layer = BatchNorm | BatchNormState
#: name -> (what the layer keeps, what it was shown)
Seen = dict[str, tuple[Kept, Observed]]


def diagnose(
    target: Any,
    batches: Any,
    *,
    training_batches: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
    score: Callable[[Any, Any], float] | None = None,
    axis: int = 1,
    progress: bool = False,
) -> Diagnosis:
    """Why evaluation differs from training: each layer's running statistics beside those of data.

    The layers see the batches as in training, normalized by the batch's own statistics, and learn nothing. For each it
    compares y made with three kinds of statistics: the running ones, those of each batch, and those of the population,
    which is all the batches together. `anybn.diagnosis.LayerDiagnosis` has the formulas. A difference of 1 is one
    standard deviation.

    Args:
        target: a `BatchNorm` or a `BatchNormState`; a mapping from names to such; or a ``torch.nn.Module`` with any
            number of batch norms that have running statistics, torch's own and `anybn.torch`'s.
        batches: the data where evaluation goes wrong, in batches of the size that training has. For a layer, arrays of
            its input, of any library, or their `Moments`. Else what ``forward`` takes.
        training_batches: of the data that the target was trained on, if batches are of others. Only with these can a
            shift of the data be told from running statistics that do not fit the training data.
        forward: ``forward(target, batch)``, which runs the net. For a model the default is ``model(batch)``, or
            ``model(batch[0])`` for a tuple or list. For a mapping it is required: it calls `BatchNorm` layers, or
            `batch_norm` with ``training=True`` and the states, outside of ``jax.jit``.
        score: for a model, ``score(model, batch)``, a number such as an accuracy or a loss. It is averaged over batches
            three times: with the running statistics, with those of the training batches (or of the batches), and with
            those of each batch.
        axis: the channel axis of the input of a `BatchNormState`; a layer has its own.
        progress: show a bar (tqdm).

    Returns a `anybn.diagnosis.Diagnosis`: print it, or use its ``layers``, ``findings``, ``to_dict()`` and ``plot()``.
    These are the causes, and the bounds from which they are told:

    | cause | when |
    |---|---|
    | not finite | a running statistic, or a batch, has a NaN or an infinity |
    | no updates | the gap is above 0.1, and the running statistics are 0 and 1 |
    | too few updates | above 0.01 of the start is left, and without it the gap would be less than half |
    | momentum | the gap is below twice of what a moving average of batches so noisy has |
    | stale | neither: the running statistics do not fit the training batches |
    | shifted data | the batches are more than 0.1 from the training batches |
    | shifted or stale | one of both, without training_batches |
    | unlike batches | means of batches vary more than means of random samples do |
    | small batches | the noise is above 0.3, which batches of 16 independent values have |
    | dead channels | y does not vary, or is 0 after a fused relu, with the statistics of the data |
    | saturated channels | y has one sign, before a residual, with the statistics of the data |

    The target is as it was afterwards, also after an error. A group is left out: a process looks at its own batches.

    Raises TypeError or ValueError for arguments outside of the above, for no batch, and for a batch of one value per
    channel, which training cannot normalize. BackendNotInstalled without tqdm.

    >>> import numpy as np, anybn
    >>> rng = np.random.default_rng(0)
    >>> batches = [rng.normal(3, 2, (256, 4)) for _ in range(8)]
    >>> bn = anybn.BatchNorm(4)
    >>> for x in batches:
    ...     y = bn(x)
    >>> report = anybn.diagnose(bn, batches)
    >>> print(report)  # doctest: +ELLIPSIS
    layer    channels  batches  updates  gap   noise   apart  found
    (layer)  4         8        8        0.81  0.0751  0.814  too few updates
    <BLANKLINE>
    8 updates at momentum 0.1 leave 43% of the start, 0 and 1: the gap is 0.81, and would be 0.007 without it. ...
    >>> report.findings[0].cause
    'too few updates'
    """
    if axis != 1 and not isinstance(target, (BatchNormState, Mapping)):
        raise ValueError("axis is for states: layers and models have their own, drop it")
    check_forward(forward)
    training, scores = None, None
    if (models := tools_for(target, "diagnosis")) is not None:
        if training_batches is not None:
            training = models.observe(target, training_batches, forward, progress)
        seen = models.observe(target, batches, forward, progress)
        if score is not None:
            scores = models.scores(target, batches, score, seen if training is None else training)
    else:
        if score is not None:
            raise ValueError("score is for models: compare the outputs of layers by hand, drop it")
        if training_batches is not None:
            training = _observe(target, training_batches, forward, axis, progress)
        seen = _observe(target, batches, forward, axis, progress)
    layers = {
        name: measured(name, kept, shown, None if training is None else training[name][1])
        for name, (kept, shown) in seen.items()
        if len(shown) and (training is None or len(training[name][1]))
    }
    if not layers:
        raise ValueError(
            "no batch reached a batch norm: give some, from an iterator that nobody has read before, and a forward "
            "that trains"
        )
    found = [f for layer in layers.values() for f in findings_of(layer, knows_training=training is not None)]
    return Diagnosis(layers, tuple(found), scores)


def _observe(target: Any, batches: Any, forward: Callable[[Any, Any], Any] | None, axis: int, progress: bool) -> Seen:
    """What plain layers keep, and are shown."""
    layers: dict[str, Layer] = dict(target) if isinstance(target, Mapping) else {"": target}
    for name, layer in layers.items():
        if not isinstance(layer, BatchNorm | BatchNormState):
            raise TypeError(
                f"{f'target[{name!r}]' if name else 'target'} is a {type(layer).__name__}; it must be an "
                "anybn.BatchNorm, an anybn.BatchNormState, a mapping of such, or a torch.nn.Module"
            )
        if not _state(layer).track_running_stats:
            raise ValueError("a layer has track_running_stats=False and no statistics to diagnose: leave it out")
    if isinstance(target, Mapping) != (forward is not None):
        raise ValueError(
            "forward(layers, batch) runs a net: a mapping of layers needs it, a single layer takes batches of its input"
        )
    seen = {name: (_kept(layer), Observed(_state(layer).num_features)) for name, layer in layers.items()}
    if forward is None:
        single = isinstance(batches, Moments) or hasattr(batches, "shape")
        for batch in with_progress([batches] if single else batches, progress, "diagnose"):
            seen[""][1].add(batch, getattr(target, "axis", axis))
    else:
        with _watched([(layer, seen[name][1]) for name, layer in layers.items()]):
            for batch in with_progress(batches, progress, "diagnose"):
                forward(target, batch)
    return seen


def _state(layer: Layer) -> BatchNormState:
    return layer.state if isinstance(layer, BatchNorm) else layer


def _kept(layer: Layer) -> Kept:
    return Kept.by(_state(layer), relu=isinstance(layer, BatchNorm) and layer.activation == "relu")


class _Watcher:
    """What stands in a store where `anybn.accumulate` has its block: it takes what would be learnt, and looks at it."""

    is_open = True

    def __init__(self, seen: Observed):
        self.seen = seen

    def add(self, batch: Batch) -> bool:
        assert batch.call is not None
        self.seen.add(batch.call.x, batch.call.spec.axis, batch.call.mask)
        return True


@contextmanager
def _watched(layers: list[tuple[Layer, Observed]]) -> Iterator[None]:
    """Layers train, each process by itself, and nothing is learnt; afterwards they are as they were."""
    stores = [_state(layer)._store for layer, _ in layers]
    before = [(store.block, store.arrays) for store in stores]
    modes = [(layer, layer.training, layer.group) for layer, _ in layers if isinstance(layer, BatchNorm)]
    try:
        for layer, _, _ in modes:
            layer.training, layer.group = True, None
        for store, (_, seen) in zip(stores, layers, strict=True):
            store.block = _Watcher(seen)
        yield
    finally:
        for store, (block, arrays) in zip(stores, before, strict=True):
            store.block = block
            if type(store) is Store:  # it may have moved to where x is
                store.arrays = arrays
        for layer, mode, group in modes:
            layer.training, layer.group = mode, group
