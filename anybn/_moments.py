"""Moments: the statistics of a part of the data, which merge into those of the whole."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anybn.backends.registry import backend_for, resolve_target
from anybn.core.call import Array, dtype_name
from anybn.core.formulas import divisor
from anybn.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and summed squared deviations of the values of each channel.

    Attributes:
        count: values per channel, an int; integers of mean's shape where a mask differs between channels; a 0-d array
            where a mask was counted lazily.
        mean: ``(C,)``, or ``(C, H)`` of ``axis=(1, 2)``; float64 where the library and device have it, else float32.
        m2: mean's shape, ``sum((x - mean)**2)``.
        shift: mean's shape, what rounding took from the mean, which is ``mean + shift``; None for nothing. Without it,
            parts whose mean is 1e6 and deviation 1 merge to 11 of 16 digits.

    Tiles, threads, ranks, chunks and micro-batches all merge the same way, in any grouping, and of any libraries.

    >>> import numpy as np, anybn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> whole = anybn.moments(x)
    >>> parts = anybn.moments(x[:1]) + anybn.moments(x[1:])
    >>> parts.count, parts.mean, parts.var()
    (6, array([5., 6.]), array([11.66666667, 11.66666667]))
    >>> np.allclose(whole.m2, parts.m2)
    True
    """

    count: int | Array
    mean: Array
    m2: Array
    shift: Array | None = field(default=None, repr=False)

    def var(self, ddof: int = 0) -> Array:
        """``m2 / (count - ddof)``, in mean's shape; NaN where there are not more than ddof values."""
        xp = backend_for(self.mean).namespace(self.mean)
        if isinstance(self.count, int):
            n = self.count - ddof
            return self.m2 / n if n > 0 else xp.full_like(self.m2, xp.nan)
        n = _number(xp, self.count, self.m2) - ddof + xp.zeros_like(self.m2)
        return xp.where(n > 0, self.m2, xp.full_like(self.m2, xp.nan)) / xp.where(n > 0, n, xp.ones_like(n))

    def std(self, ddof: int = 0) -> Array:
        """``sqrt(var(ddof))``.

        >>> import numpy as np, anybn
        >>> anybn.moments(np.array([[1.0], [3.0]])).std()
        array([1.])
        """
        return backend_for(self.mean).namespace(self.mean).sqrt(self.var(ddof))

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together (Chan, Golub & LeVeque 1979); also ``self + other``.

        ``delta = other.mean - mean``, ``n = count + other.count``, in twice the digits where the means need them::

            mean + delta * other.count / n        m2 + other.m2 + delta**2 * count * other.count / n

        Of two libraries or devices, the sum lies where self is; but where other is, if only other is lazy, or if only
        there is float64. Raises ValueError if the numbers of channels differ.

        >>> import numpy as np, anybn, torch
        >>> (anybn.moments(torch.zeros(2, 1)) + anybn.moments(np.ones((2, 1)))).mean
        tensor([0.5000], dtype=torch.float64)
        """
        if self.mean.shape != other.mean.shape:
            theirs, ours = (" x ".join(map(str, m.mean.shape)) for m in (other, self))
            raise ValueError(
                f"other has {theirs} channels, these moments have {ours}: merge moments of the same channels"
            )
        for nothing, part in (other, self), (self, other):
            if isinstance(nothing.count, int) and nothing.count == 0:
                return part
        backend = backend_for(self.mean)
        if not backend.holds(other.mean, backend.device_of(self.mean)):
            if other._precedence() > self._precedence():
                return self.to(other.mean).merge(other)
            other = other.to(self.mean)
        # Not by `merged`, for which both would have to be stacked: it is as accurate, and takes 45 us in place of 7 for
        # 8 channels in NumPy. `accumulate` merges in every call.
        xp, count = backend.namespace(self.mean), self.count + other.count
        divided: Any = count if isinstance(count, int) else divisor(xp, count, self.mean.dtype)
        fraction = _number(xp, other.count, self.mean) / divided
        shift, other_shift = (0.0 if part.shift is None else part.shift for part in (self, other))
        delta = (other.mean - self.mean) + (other_shift - shift)
        step = delta * fraction + shift
        mean = self.mean + step
        m2 = self.m2 + other.m2 + delta * delta * (fraction * _number(xp, self.count, self.mean))
        return Moments(count, mean, m2, step - (mean - self.mean))

    def _precedence(self) -> tuple[bool, bool]:
        return backend_for(self.mean).is_traced(self.mean), dtype_name(self.mean.dtype) == "float64"

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, zero: int) -> Moments:
        """``sum(parts)`` starts with 0."""
        return self if zero == 0 else NotImplemented

    # -- elsewhere ---------------------------------------------------------------------------------------------

    def to(self, target: Any) -> Moments:
        """The same moments in ``"numpy"``, ``"torch:cuda:0"``, ``"jax"``, ..., or beside an array.

        Moments that lie there already are returned as they are. What float32 takes from the mean goes into shift. Lazy
        ones are computed, all at once. Not differentiable.

        Raises what `BatchNormState.to` raises.

        >>> import numpy as np, anybn
        >>> anybn.moments(np.array([[1.0], [3.0]])).to("torch").mean
        tensor([2.], dtype=torch.float64)
        """
        backend, device = resolve_target(target)
        if backend.holds(self.mean, device):
            return self
        count, mean, m2, shift = self._in_numpy()
        dtype = "float64" if backend.has_float64(device) else "float32"
        with np.errstate(over="ignore", invalid="ignore"):
            there = mean.astype(dtype)
            rest = shift + (mean - there)
            moved = [there, m2.astype(dtype), *([rest.astype(dtype)] if rest.any() else [])]
        return Moments(
            count if isinstance(count, int) else backend.from_numpy(count, device),
            *(backend.from_numpy(a, device) for a in moved),
        )

    def _in_numpy(self) -> tuple[int | np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """count, and the others in float64: in one transfer, or one computation of what is lazy."""
        backend, shift, count = backend_for(self.mean), self.shift, self.count
        xp = backend.namespace(self.mean)
        rows = [self.mean, self.m2, xp.zeros_like(self.mean) if shift is None else shift]
        if not isinstance(count, int):
            if dtype_name(self.mean.dtype) == "float64":
                rows.append(_number(xp, count, self.mean) + xp.zeros_like(self.mean))
            else:  # which float32 may not hold
                count = backend.to_numpy(backend.detached(count)).astype(np.int64)
        values = backend.to_numpy(backend.detached(xp.stack(rows))).astype(np.float64)
        if len(values) > 3:
            count = values[3].astype(np.int64)[() if getattr(self.count, "ndim", 0) else (0,) * (values.ndim - 1)]
        count = count if isinstance(count, int) or count.ndim else int(count)
        return count, values[0], values[1], values[2]

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, as `BatchNormState.save` does. Raises what that raises.

        >>> import anybn, numpy as np, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "part.safetensors"
        >>> anybn.moments(np.array([[1.0], [3.0]])).save(path)
        >>> anybn.Moments.load(path)
        Moments(count=2, mean=array([2.]), m2=array([2.]))
        """
        from anybn.checkpoints import files  # late: json and hashlib take time to import

        count, mean, m2, shift = self._in_numpy()
        files.write(path, "anybn.Moments", {"count": np.asarray(count), "mean": mean, "m2": m2, "shift": shift}, "{}")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Moments:
        """The moments of a file that `save` wrote, in NumPy. Like `BatchNormState.load`, it trusts no file.

        Raises CheckpointError if it is truncated, damaged, forged, newer or no such file, BackendNotInstalled without
        safetensors, OSError if it cannot be opened.
        """
        from anybn.checkpoints import files

        _, tensors, _ = files.read(path, "Moments.save", "anybn.Moments")
        dtypes = {"count": np.int64, "mean": np.float64, "m2": np.float64, "shift": np.float64}
        if (
            {name: a.dtype for name, a in tensors.items()} != dtypes
            or not tensors["mean"].shape == tensors["m2"].shape == tensors["shift"].shape
            or tensors["count"].shape not in ((), tensors["mean"].shape)
            or min(np.min(tensors[name], initial=0) for name in ("count", "m2")) < 0
        ):
            raise CheckpointError(f"{path} holds no valid moments: it was not made by Moments.save")
        count, shift = tensors["count"], tensors["shift"]
        return Moments(
            count if count.ndim else int(count), tensors["mean"], tensors["m2"], shift if shift.any() else None
        )


def _number(xp: Any, count: int | Array, like: Array) -> Any:
    """count, to be calculated with beside an array."""
    return count if isinstance(count, int) else xp.astype(count, like.dtype)
