"""recalibrate: the population's statistics in place of a moving average of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from anybn._layer import BatchNorm
from anybn._moments import Moments
from anybn._population import Participants, Population, check_forward, tools_for, with_progress
from anybn.state.state import BatchNormState

Target = TypeVar("Target")


def recalibrate(
    target: Target,
    batches: Any,
    *,
    group: Any = None,
    one_pass: bool = False,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = False,
) -> Target:
    """Set running statistics to those of all the data, each value counted once, however uneven the batches.

    ``running_mean = mean`` and ``running_var = m2 / (count - ddof)`` over everything in ``batches``, whose `Moments`
    are merged in float64 (Chan, Golub & LeVeque 1979). torch's ``update_bn`` averages the means of batches instead, and
    gives a batch of 4 the weight of a batch of 100.

    Args:
        target: a `BatchNorm` or a `BatchNormState` (channels on axis 1), which stays where it is; or a
            ``torch.nn.Module`` with any number of batch norms, torch's own and `anybn.torch`'s.
        batches: for a layer, an iterable of arrays of any library, or of their `Moments` (from data with a mask or with
            gaps, from other processes); one array, a Dask array above all, is all the data. Arrays of a device without
            float64 are brought to the host. For a model, an iterable of what ``forward`` takes. In a group, this
            member's share.
        group: members that look at batches of their own, in any number, or none; what they have seen is merged, and all
            of them get the same bits. What `batch_norm` takes, but for a JAX axis, and with ``rank`` and ``size``.
            Collective: every member calls it, with the same layer or model. Without it, a process is on its own, also
            for a layer that trains over a group.
        one_pass: for models. False is exact: as many passes over ``batches`` as there are batch norms, in the order in
            which they are called, each looking at the input of one, behind others that are done already and evaluate.
            So batches must be something that can be read again: a list, a DataLoader. A pass ends at its layer. True
            reads them once: the first batch norm comes out exactly; the input of a later one has been normalized with
            the statistics of each single batch, as in training, so its own are approximate, and a batch of one value
            per channel is an error.
        forward: for models, ``forward(model, batch)``, which runs it; the default is ``model(batch)``, or
            ``model(batch[0])`` for a tuple or list, as ``update_bn`` does.
        progress: show a bar (tqdm).

    Returns target. num_batches_tracked becomes the number of batches that held any values, also for a cumulative
    average, which then goes on from them. A model is run in evaluation mode, without gradients, and has its modes back
    afterwards. Its batch norms that no batch reaches, or without running statistics, are left alone. For one that is
    called several times in a pass, all its inputs count, the later ones as its old statistics make them: there is no
    exact answer then.

    Raises TypeError or ValueError for arguments outside of the above and fewer than 2 values per channel,
    NonFiniteError naming the channels where the data is not finite, BackendNotInstalled without tqdm. Whatever is
    raised, by the model too, all statistics are as they were. A member of a group that fails, in its batches or its
    model, raises its own error, and the others MemberError, which names it, as soon as they are through with theirs.

    >>> import numpy as np, anybn
    >>> bn = anybn.BatchNorm(1)
    >>> batches = [np.zeros((100, 1)), np.full((4, 1), 26.0)]
    >>> anybn.recalibrate(bn, batches).state.running_mean  # 4 * 26 / 104, where the mean of means is 13
    array([1.])
    """
    check_forward(forward)
    if (models := tools_for(target, "population")) is not None:
        return models.recalibrate(target, batches, group, one_pass, forward, progress)
    if one_pass or forward is not None:
        raise ValueError("one_pass and forward are for models: a layer takes batches of its own input, drop them")
    if isinstance(target, BatchNorm):
        state, axis = target.state, target.axis
    elif isinstance(target, BatchNormState):
        state, axis = target, 1
    else:
        raise TypeError(
            f"target is a {type(target).__name__}; it must be an anybn.BatchNorm, an anybn.BatchNormState or a "
            "torch.nn.Module"
        )
    if not state.track_running_stats:
        raise ValueError("target has track_running_stats=False and no statistics to set: make one with True")
    if isinstance(batches, Moments) or hasattr(batches, "shape"):
        batches = [batches]
    participants = Participants(
        group, f"a layer of {state.num_features} channels, ddof {state.ddof}", state.running_mean
    )
    population = Population(state.num_features)
    with participants.failing_together():
        for batch in with_progress(batches, progress, "recalibrate"):
            population.add(batch, axis)
    participants.agree_on_layer(0)
    population = participants.merged(population)
    mean, var = population.statistics(state.ddof)
    state._store.fill({"running_mean": mean, "running_var": var, "num_batches_tracked": population.batches})
    return target
