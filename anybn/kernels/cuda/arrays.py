"""Batch norm by batchnorm.cu on the arrays of a library: how they lie, what is allocated, which pointers go where."""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

from anybn.core.call import Array, Call, Gradients, Statistics, Update, dtype_name
from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import MOST_BLOCKS, TYPES
from anybn.kernels.layout import Layout, delivered, layout_of


class CudaArrays:
    """The operations of a `Backend` on a GPU. A subclass says where arrays are and what kernels run on; the rest is for
    a library with NumPy's functions, and overridden for others."""

    #: The module with ``empty`` and ``empty_like``.
    library: Any

    # -- arrays ------------------------------------------------------------------------------------------------

    def on(self, x: Array) -> AbstractContextManager[Any]:
        """Makes x's device the current one."""
        raise NotImplementedError

    def gpu(self, x: Array) -> _cuda.Gpu:
        """x's device, which is the current one, and the stream that the user has chosen there."""
        raise NotImplementedError

    def pointer(self, a: Array) -> int:
        """The address of the first element."""
        raise NotImplementedError

    def layout_of(self, x: Array, axis: int) -> Layout | None:
        return layout_of(x, axis)

    def strides(self, a: Array) -> Hashable:
        """Equal for arrays of one shape that lie in memory alike: those of axes of size 1 mean nothing."""
        return tuple(stride // a.itemsize for stride, size in zip(a.strides, a.shape, strict=True) if size > 1)

    def dense(self, x: Array) -> Array:
        """A copy of x without gaps, its axes in the same order in memory."""
        return x.copy(order="K")

    def beside(self, x: Array, dtype: Any = None) -> Array:
        """An array that lies like x, which is dense."""
        return self.library.empty_like(x, dtype=dtype)

    def per_channel(self, x: Array, rows: int, channels: int, dtype: Any = "float64") -> Any:
        """Arrays for one number per channel."""
        return self.library.empty((rows, channels), dtype=dtype)

    def vector(self, a: Array, dtype: str | None = None) -> Array:
        """a, or a copy with its values side by side and of this dtype."""
        return self.library.ascontiguousarray(a, dtype)

    def positions(self, mask: Array, shape: tuple[int, ...], order: tuple[int, ...]) -> Array:
        """A byte for each, side by side: the mask in this shape, its axes in this order."""
        return self.library.ascontiguousarray(self.library.broadcast_to(mask, shape).transpose(order))

    def first_shown(self, positions: Array) -> Array:
        """Which position is the first that is True; any if none is. It stays on the device, as their sum does."""
        return positions.argmax()

    def note_update(self, x: Array) -> None:
        """Running statistics are being updated on x's device, on the stream that the user has chosen there."""

    # -- operations --------------------------------------------------------------------------------------------

    def supports(self, x: Array) -> bool:
        return 0 < max(x.shape) <= MOST_BLOCKS[0] and 0 not in x.shape and dtype_name(x.dtype) in TYPES

    def takes_mask(self, call: Call) -> bool:
        """Whether there are kernels for the call's mask: for one that all channels share."""
        if call.mask is None:
            return True
        shape, axis = call.x.shape, call.spec.axis
        positions = math.prod(shape) // shape[axis]
        return positions < 2**31 and bool(call.mask.shape[axis] == 1)  # CuPy's argmax counts no further

    def batch_statistics(self, call: Call) -> Statistics:
        with self.on(call.x):
            how, x, _ = self._arranged(call.x, call.spec.axis)
            arrays, statistics = self._statistics(x, how, call)
            self._call("statistics", x, how[1:], {"x": x, **arrays})
            return statistics

    def train(self, call: Call) -> tuple[Array, Statistics, tuple[Array, Array] | None]:
        """y, the statistics of x, and the updated running ones if that was asked for."""
        x, spec, weight, bias, residual, _, _, update, out = call
        with self.on(x):
            how, x, (residual,) = self._arranged(x, spec.axis, residual)
            y = self._destination(x, out)
            arrays, statistics = self._statistics(x, how, call)
            arrays |= {"x": x, "y": y, "residual": residual, "weight": weight, "bias": bias}
            options: dict[str, Any] = {"eps": spec.eps, "relu": spec.relu}
            running = None
            if update is not None:
                running = self._committed(arrays, options, update)
            self._call("train", x, how[1:], arrays, **options)
            if update is not None:
                self.note_update(x)
            return delivered(y, out), statistics, running

    def evaluate(self, call: Call, statistics: Statistics) -> Array:
        x, spec, weight, bias, residual, _, _, _, out = call
        with self.on(x):
            how, x, (residual,) = self._arranged(x, spec.axis, residual)
            y = self._destination(x, out)
            arrays = {"x": x, "y": y, "residual": residual, "weight": weight, "bias": bias, **_known(statistics)}
            arrays |= {"shown": self._positions(call, how)}
            self._call("evaluate", x, how[1:], arrays, eps=spec.eps, relu=spec.relu)
            return delivered(y, out)

    def gradients(
        self, call: Call, statistics: Statistics, dy: Array, active: Array | None, wants_residual: bool
    ) -> Gradients:
        x, spec, weight, bias = call[:4]
        with self.on(x):
            given = dy
            how, x, (dy, active) = self._arranged(x, spec.axis, dy, active)
            dx = self.beside(x)
            hides = active is not None or call.mask is not None
            dresidual = self.beside(x) if wants_residual and hides else None
            parameter = bias if weight is None else weight
            dweight = dbias = None
            if parameter is not None:  # kernels give both
                dweight, dbias = self.per_channel(x, 2, how.channels, parameter.dtype)
            arrays = {"dy": dy, "x": x, "y": dx, "active": active, "dresidual": dresidual, "weight": weight}
            arrays |= {"dweight": dweight, "dbias": dbias, **_known(statistics)}
            if call.mask is not None:
                arrays |= {"shown": self._positions(call, how), "shown_count": statistics.count}
            self._call("backward", x, how[1:], arrays, eps=spec.eps, training=statistics.count is not None)
            dresidual = given if wants_residual and dresidual is None else dresidual
            return Gradients(dx, None if weight is None else dweight, None if bias is None else dbias, dresidual)

    def updated_running_statistics(self, update: Update, statistics: Statistics) -> tuple[Array, Array]:
        """By a launch of its own. The count is an int."""
        with self.on(update.running_mean):
            arrays, options = {**_known(statistics), "m2": statistics.m2}, dict[str, Any]()
            del arrays["var"]
            running = self._committed(arrays, options, update)
            self._commit(statistics, arrays, options)
            return running

    def update_in_place(self, update: Update, statistics: Statistics, counter: Array | None) -> None:
        """Fold statistics into the running ones where these lie, and count the batch, all without waiting.

        Counter is 0-d, int64; with momentum None it makes the average cumulative. The count is an int.
        """
        with self.on(update.running_mean):
            arrays = {**_known(statistics), "m2": statistics.m2, "counter": counter}
            del arrays["var"]
            kept = {"running_mean": update.running_mean, "running_var": update.running_var}
            arrays |= kept | {f"new_{name}": a for name, a in kept.items()}
            options: dict[str, Any] = {"ddof": update.ddof, "propagate": update.propagate}
            options |= {"cumulative": True} if update.momentum is None else {"momentum": update.momentum}
            self._commit(statistics, arrays, options)
            self.note_update(update.running_mean)

    # -- their parts -------------------------------------------------------------------------------------------

    def _arranged(self, x: Array, axis: int, *others: Array | None) -> tuple[Layout, Array, list[Array | None]]:
        """How x lies in memory, x and the others all lying that way: themselves, or copies."""
        found = self.layout_of(x, axis)
        if found is None:
            x = self.dense(x)
            found = self.layout_of(x, axis)
            assert found is not None
        strides = self.strides(x)
        return found, x, [a if a is None or self.strides(a) == strides else self._laid_like(x, a) for a in others]

    def _laid_like(self, x: Array, a: Array) -> Array:
        copy = self.beside(x, a.dtype)
        copy[...] = a
        return copy

    def _destination(self, x: Array, out: Array | None) -> Array:
        return out if out is not None and self.strides(out) == self.strides(x) else self.beside(x)

    def _positions(self, call: Call, how: Layout) -> Array | None:
        """The call's mask as x lies in memory, one byte for what all channels have at a position."""
        shape, axis = call.x.shape, call.spec.axis
        return (
            None if call.mask is None else self.positions(call.mask, (*shape[:axis], 1, *shape[axis + 1 :]), how.order)
        )

    def _statistics(self, x: Array, how: Layout, call: Call) -> tuple[dict[str, Array | None], Statistics]:
        """Room for those of x: by the kernels' names, with what these need of a mask, and as a whole."""
        mean, shift, var, m2 = self.per_channel(x, 4, how.channels)
        shift = shift if dtype_name(x.dtype) == "float64" else None
        arrays, count = {"mean": mean, "shift": shift, "var": var, "m2": m2}, how.outer * how.inner
        shown = self._positions(call, how)
        if shown is not None:
            count = shown.sum()
            arrays |= {"shown": shown, "shown_count": count, "first_shown": self.first_shown(shown)}
        return arrays, Statistics(count, mean, shift, var, m2)

    def _committed(
        self, arrays: dict[str, Array | None], options: dict[str, Any], update: Update
    ) -> tuple[Array, Array]:
        """Room for updated running statistics; what a kernel needs to fill it is added to arrays and options."""
        new_mean, new_var = self.per_channel(update.running_mean, 2, update.running_mean.shape[0])
        arrays |= {"running_mean": self.vector(update.running_mean, "float64")}
        arrays |= {"running_var": self.vector(update.running_var, "float64")}
        arrays |= {"new_running_mean": new_mean, "new_running_var": new_var}
        options |= {"momentum": update.momentum, "ddof": update.ddof, "propagate": update.propagate}
        return new_mean, new_var

    def _commit(self, statistics: Statistics, arrays: dict[str, Array | None], options: dict[str, Any]) -> None:
        running_mean = arrays["running_mean"]
        assert running_mean is not None
        assert isinstance(statistics.count, int)
        self._call("commit", running_mean, (statistics.count, running_mean.shape[0], 1), arrays, **options)

    def _call(
        self,
        op: str,
        x: Array,
        shape: tuple[int, int, int],
        arrays: dict[str, Array | None],
        eps: float = 0.0,
        momentum: float = 0.0,
        **options: Any,
    ) -> None:
        """`_cuda.queue` with arrays for pointers. What is only read per channel is copied if it has gaps, or, as
        statistics, another dtype."""
        held, pointers, parameter_dtype, running_dtype = [], [0] * len(_cuda.INDEX), "float32", "float64"
        for name, a in arrays.items():
            if a is None:
                continue
            if name in ("mean", "shift", "var", "m2"):
                a = self.vector(a, "float64")
            elif name in ("weight", "bias"):
                a = self.vector(a)
            elif name in ("shown_count", "first_shown"):
                a = self.vector(a, "int64")
            if name in ("weight", "bias", "dweight"):
                parameter_dtype = dtype_name(a.dtype)
            elif name == "running_mean":
                running_dtype = dtype_name(a.dtype)
            pointers[_cuda.INDEX[name]] = self.pointer(a)
            held.append(a)
        kind = _cuda.Kind(op, shape, dtype_name(x.dtype), parameter_dtype, running_dtype, **options)
        _cuda.queue(self.gpu(x), kind, pointers, eps, momentum)


def _known(statistics: Statistics) -> dict[str, Array | None]:
    return {"mean": statistics.mean, "shift": statistics.shift, "var": statistics.var}
