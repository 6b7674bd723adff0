"""recalibrate: the population's statistics in place of a moving average of batches."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from anybn import _checks, _functional, distributed
from anybn._layer import BatchNorm
from anybn.backends.registry import backend_for
from anybn.core.call import Array
from anybn.core.moments import Moments
from anybn.errors import BackendNotInstalled, NonFiniteError
from anybn.groups import exchange as _synchronized
from anybn.state.state import BatchNormState


def recalibrate(
    target: Any,
    batches: Any,
    *,
    group: Any = None,
    one_pass: bool = False,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = False,
) -> Any:
    """Set running statistics to those of all the data, each value counted once, however uneven the batches.

    ``running_mean = mean`` and ``running_var = m2 / (count - ddof)`` over everything in ``batches``, whose `Moments`
    are merged in float64 (Chan, Golub & LeVeque 1979). torch's ``update_bn`` averages the means of batches instead, and
    gives a batch of 4 the weight of a batch of 100.

    Args:
        target: a `BatchNorm` or a `BatchNormState` (channels on axis 1), which stays where it is; or a
            ``torch.nn.Module`` with any number of batch norms, torch's own and `anybn.torch`'s.
        batches: for a layer, an iterable of arrays of any library, or of their `Moments` (from masked data, from other
            processes); one array, a Dask array above all, is all the data. Arrays of a device without float64 are
            brought to the host. For a model, an iterable of what
            ``forward`` takes. In a group, this member's share.
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
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(target, torch.nn.Module):
        from anybn.torch import population as _recalibrate_torch

        return _recalibrate_torch.recalibrate(target, batches, group, one_pass, forward, progress)
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
    everyone = Everyone(group, f"a layer of {state.num_features} channels, ddof {state.ddof}", state.running_mean)
    population = Population(state.num_features)
    with everyone.telling():
        for batch in bar(batches, progress):
            population.add(batch, axis)
    everyone.next_layer(0)
    population = everyone.merged(population)
    mean, var = population.statistics(state.ddof)
    state._store.fill({"running_mean": mean, "running_var": var, "num_batches_tracked": population.batches})
    return target


class Everyone:
    """The members of a group, with batches of their own; without a group, this process.

    They meet twice per layer: to find out that nobody has failed and which layer it is, in rows of a length that never
    changes, and to merge what they have seen of it. A member can fail before the first meeting only.
    """

    def __init__(self, group: Any, what: str, like: Array):
        """``what`` all members are to recalibrate; ``like``: an array of the kind that an unknown group can sum."""
        self.group = None if group is None else distributed.as_group(group)
        self.what, self.like = zlib.crc32(what.encode()), like
        if isinstance(self.group, distributed.AxisGroup):
            raise TypeError(
                f"group is {self.group.kind}, but recalibrate is not traced: merge anybn.moments over the axis, and "
                "pass them as batches"
            )
        if self.group is not None and not _synchronized.has_ranks(self.group):
            raise TypeError(
                "group has no rank and size, by which recalibrate tells its members apart: give it both attributes"
            )

    def exchange(self, row: list[float] | np.ndarray) -> np.ndarray:
        """Every member's row, in NumPy: ``(size, len(row))``."""
        if self.group is None:
            return np.array([row], np.float64)
        return _synchronized.rows_of_all(self.group, np.asarray(row), backend_for(self.like), self.like)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What this member does by itself: an error makes the others fail as well, at their next meeting."""
        try:
            yield
        except Exception as error:
            if self.group is not None:
                try:
                    self.exchange([np.nan, 0.0, 0.0])
                except Exception as problem:
                    error.add_note(f"the other members of the group could not be told: {problem}")
            raise

    def next_layer(self, mine: int | None) -> int | None:
        """Which layer the members have seen, if not this one then others; None if nobody has seen any."""
        heads = self.exchange([0.0, self.what, -1.0 if mine is None else mine])
        _synchronized.require_presence(heads[:, 0])
        for column, what in (heads[:, 1], "what they recalibrate"), (heads[:, 2], "which batch norm came next"):
            seen = column[column >= 0]
            if (seen != seen[:1]).any():
                told = " and ".join(_synchronized.named(np.flatnonzero(column == v)) for v in dict.fromkeys(seen))
                raise ValueError(
                    f"{told} of the group differ in {what}: give all members the same layer or model, and the same "
                    "options"
                )
        return int(seen[0]) if seen.size else None

    def merged(self, population: Population) -> Population:
        """What all members have seen of a layer."""
        if self.group is None:
            return population
        moments = population.moments
        vectors = moments.mean, moments.m2, np.zeros_like(moments.mean) if moments.shift is None else moments.shift
        rows = self.exchange(np.concatenate([[moments.count, population.batches], *vectors]))
        of_all = Population(len(moments.mean))
        with np.errstate(all="ignore"):
            of_all.moments = _synchronized.merged_moments(rows[:, 0], *np.split(rows[:, 2:], 3, axis=1))
        of_all.batches = int(rows[:, 1].sum())
        return of_all


class Population:
    """What has been seen of one layer's input: `Moments` on the host in float64, and a number of batches."""

    def __init__(self, num_features: int):
        self.moments = Moments(0, np.zeros(num_features), np.zeros(num_features))
        self.batches = 0

    def add(self, batch: Array | Moments, axis: int) -> None:
        """Merge an array, or moments, of any library."""
        channels = len(self.moments.mean)
        if not isinstance(batch, Moments):
            backend = backend_for(batch, "a batch")
            _checks.batch(batch, backend, axis, channels)
            if not backend.has_float64(backend.device_of(batch)):  # JAX: means in float32 are too coarse to be merged
                batch = backend.to_numpy(backend.detached(batch))
            batch = _functional.moments(batch, axis=axis)
        part = _on_host(batch)
        if part.mean.shape != self.moments.mean.shape:
            raise ValueError(f"a batch's moments are of {len(part.mean)} channels but the state has {channels}")
        if part.count:
            self.moments, self.batches = self.moments + part, self.batches + 1

    def statistics(self, ddof: int) -> tuple[np.ndarray, np.ndarray]:
        """(mean, variance). Raises ValueError or NonFiniteError if there are none to be had."""
        count, mean, var = self.moments.count, self.moments.mean, self.moments.var(ddof)
        if self.moments.shift is not None:
            mean = mean + self.moments.shift
        if count < 2:
            raise ValueError(
                f"batches gave {count} values per channel; a variance needs more than 1: give more data, and an "
                "iterator that nobody has read before"
            )
        if channels := tuple(int(c) for c in np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)))):
            named = ", ".join(map(str, channels[:10])) + (", ..." if len(channels) > 10 else "")
            raise NonFiniteError(
                f"batches give statistics that are NaN or infinite in {len(channels)} of {len(mean)} channels "
                f"({named}): look for NaN or inf in them, or leave such batches out",
                channels,
            )
        return mean, var


def _on_host(moments: Moments) -> Moments:
    """In NumPy, in one transfer, or one computation of what is lazy."""
    backend = backend_for(moments.mean)
    xp = backend.namespace(moments.mean)
    count, shift = moments.count, moments.shift
    rows = [moments.mean, moments.m2, xp.zeros_like(moments.mean) if shift is None else shift]
    rows += [] if isinstance(count, int) else [xp.ones_like(moments.m2) * count]
    mean, m2, shift, *counted = backend.to_numpy(backend.detached(xp.stack(rows))).astype(np.float64)
    return Moments(int(counted[0][0]) if counted else count, mean, m2, shift)


def bar(batches: Iterable[Any], progress: bool, description: str = "recalibrate") -> Iterator[Any]:
    """batches, behind a progress bar if there is to be one."""
    if not progress:
        return iter(batches)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise BackendNotInstalled(f"progress=True needs tqdm ({error}): pip install tqdm") from error
    return iter(tqdm(batches, desc=description, unit="batch", leave=False))
