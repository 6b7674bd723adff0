"""What `anybn.recalibrate` needs for layers and for models: the population's moments, the members who look at it."""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from anybn import _checks
from anybn._moments import Moments
from anybn._statistics import moments
from anybn.backends.registry import backend_for
from anybn.core.call import Array
from anybn.core.moments import merged
from anybn.errors import required
from anybn.groups.agreement import member_names, require_presence
from anybn.groups.engines import AxisGroup, as_group
from anybn.groups.exchange import has_ranks, rows_of_all


class Population:
    """What has been seen of one layer's input: `Moments` on the host in float64, and a number of batches."""

    def __init__(self, num_features: int):
        self.moments = Moments(0, np.zeros(num_features), np.zeros(num_features))
        self.batches = 0

    def add(self, batch: Array | Moments, axis: int) -> None:
        """Merge an array, or moments, of any library."""
        part = moments_on_host(batch, axis, len(self.moments.mean))
        if np.any(part.count):
            self.moments, self.batches = self.moments + part, self.batches + 1

    def statistics(self, ddof: int) -> tuple[np.ndarray, np.ndarray]:
        """(mean, variance). Raises ValueError or NonFiniteError if there are none to be had."""
        count, mean, var = self.moments.count, self.moments.mean, self.moments.var(ddof)
        if self.moments.shift is not None:
            mean = mean + self.moments.shift
        if (least := np.min(count, initial=2)) < 2:
            raise ValueError(
                f"batches gave {least} values per channel; a variance needs more than 1: give more data, and an "
                "iterator that nobody has read before"
            )
        _checks.finite_statistics("batches give", mean, var, "look for NaN or inf in them, or leave such batches out")
        return mean, var


def moments_on_host(batch: Array | Moments, axis: int, channels: int, mask: Array | None = None) -> Moments:
    """The moments of an array, or given ones, of any library, in NumPy."""
    if not isinstance(batch, Moments):
        backend = backend_for(batch, "a batch")
        _checks.batch(batch, backend, axis, channels)
        if not backend.has_float64(backend.device_of(batch)):  # JAX: means in float32 are too coarse to be merged
            batch = backend.to_numpy(backend.detached(batch))
            mask = None if mask is None else backend.to_numpy(mask)
        batch = moments(batch, axis=axis, mask=mask)
    part = Moments(*batch._in_numpy())
    if part.mean.shape != (channels,):
        raise ValueError(f"a batch's moments are of {len(part.mean)} channels but the state has {channels}")
    return part


class Participants:
    """All who recalibrate together: the members of a group, with batches of their own; without a group, this process.

    They meet twice per layer: to find out that nobody has failed and which layer it is, in rows of a length that never
    changes, and to merge what they have seen of it. A member can fail before the first meeting only.
    """

    def __init__(self, group: Any, what: str, like: Array):
        """``what`` all members are to recalibrate; ``like``: an array of the kind that an unknown group can sum."""
        self.group = None if group is None else as_group(group)
        self.what, self.like = zlib.crc32(what.encode()), like
        if isinstance(self.group, AxisGroup):
            raise TypeError(
                f"group is {self.group.kind}, but recalibrate is not traced: merge anybn.moments over the axis, and "
                "pass them as batches"
            )
        if self.group is not None and not has_ranks(self.group):
            raise TypeError(
                "group has no rank and size, by which recalibrate tells its members apart: give it both attributes"
            )

    def _rows_of_all(self, row: list[float] | np.ndarray) -> np.ndarray:
        """Every member's row, in NumPy: ``(size, len(row))``."""
        if self.group is None:
            return np.array([row], np.float64)
        return rows_of_all(self.group, np.asarray(row), backend_for(self.like), self.like)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Around what a member does by itself: its error makes the others fail as well, at their next meeting."""
        try:
            yield
        except Exception as error:
            if self.group is not None:
                try:
                    self._rows_of_all([np.nan, 0.0, 0.0])
                except Exception as problem:
                    error.add_note(f"the other members of the group could not be told: {problem}")
            raise

    def agree_on_layer(self, mine: int | None) -> int | None:
        """The number of the layer that members have seen, mine or another's; None if nobody has seen any."""
        heads = self._rows_of_all([0.0, self.what, -1.0 if mine is None else mine])
        require_presence(heads[:, 0])
        for column, what in (heads[:, 1], "what they recalibrate"), (heads[:, 2], "which batch norm came next"):
            seen = column[column >= 0]
            if (seen != seen[:1]).any():
                told = " and ".join(member_names(np.flatnonzero(column == v)) for v in dict.fromkeys(seen))
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
        count, shift = (np.zeros_like(moments.mean) + (0 if a is None else a) for a in (moments.count, moments.shift))
        rows = self._rows_of_all(np.concatenate([[population.batches], count, moments.mean, moments.m2, shift]))
        of_all, (count, mean, m2, shift) = Population(len(moments.mean)), np.split(rows[:, 1:], 4, axis=1)
        total = count.sum(0).astype(np.int64)
        with np.errstate(all="ignore"):
            s = merged(backend_for(mean).namespace(mean), total, count, mean, shift, m2)
        of_all.moments = Moments(total, s.mean, s.m2, s.shift)
        of_all.batches = int(rows[:, 0].sum())
        return of_all


def tools_for(model: Any, purpose: str) -> ModuleType | None:
    """The module of this name for a framework's models, ``anybn.torch.population`` for "population"; None for others.

    >>> tools_for(3, "population") is None
    True
    """
    torch = sys.modules.get("torch")  # whose models are there only after somebody has imported it
    if isinstance(model, getattr(getattr(torch, "nn", None), "Module", ())):
        return importlib.import_module(f"anybn.torch.{purpose}")
    return None


def check_batches(batches: Any) -> None:
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches is a {type(batches).__name__}; it must be an iterable, as a list or a DataLoader is")


def check_forward(forward: Any) -> None:
    if not (forward is None or callable(forward)):
        raise TypeError(f"forward is a {type(forward).__name__}; it must be a function, forward(model, batch)")


def with_progress(batches: Iterable[Any], progress: bool, description: str) -> Iterator[Any]:
    """batches, behind a progress bar if there is to be one."""
    check_batches(batches)
    if not progress:
        return iter(batches)
    with required("progress=True needs tqdm", "tqdm"):
        from tqdm import tqdm
    return iter(tqdm(batches, desc=description, unit="batch", leave=False))
