"""What batch norm does to the values of one channel, or of a row of channels, compiled by Numba.

All arithmetic is float64, so that results are rounded once and equal the core's. In the cache that is what takes the
time: 0.11 ns a float32 value to sum, 0.17 to normalize and 0.23 for dx, where copying takes 0.03 (outside: 0.13). Most
of it goes into converting to float64 and back; C with vectors by hand takes 0.11 and 0.15. 16-bit numbers come as their
bits: bfloat16 as uint16, float16 as int16. Parameters and statistics are float64 arrays of C values; ``shift`` is None
where the mean alone is exact enough, and so are other arguments that a call does without: Numba compiles a version
without them.

Sums run under ``fastmath``, which lets them run in lanes; nothing else adds in another order: it would make
``x - (mean + shift)`` of ``(x - mean) - shift``, and lose both. An inner loop runs from 0 over a slice: Numba lets an
index that could be negative count from the end, which costs the vectorization. No function returns or takes arrays in
tuples: what LLVM cannot tell from memory that is written to, it loads again for every value.

Every function is untyped, since Numba compiles one version per combination of dtypes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import platform

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.primitives import by_types

#: Numba's options for kernels, which Python calls.
KERNEL = {"nogil": True, "error_model": "numpy"}
#: For functions that kernels call: Python has no way in, which halves the time to compile them.
EXACT = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
#: For dx, a tenth faster with products and sums in one instruction, rounded once; y is the core's bit for bit.
FUSED = {**EXACT, "fastmath": {"contract"}}
#: For those among them that only add up.
SUMS = {**EXACT, "fastmath": {"reassoc", "contract", "nsz"}}

#: Rows of the array ``(5, C)`` that forward kernels fill, ``statistics``; the scale is ``rstd * weight``.
MEAN, SHIFT, VAR, M2, SCALE = range(5)
#: Rows of the array that backward kernels fill, ``gradients``, with SCALE as the fifth. The mean of dy and the slope, 0
#: for constant statistics, are how x acts through the statistics: see `dx_of`.
DWEIGHT, DBIAS, MEAN_DY, SLOPE = range(4)


# -- values ----------------------------------------------------------------------------------------------------


@functools.cache
def converts_half() -> bool:
    """Whether LLVM has instructions for it; else it would call functions that are not there, and the process end.

    Numba may compile for less than the processor can, by ``NUMBA_CPU_NAME``.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return platform.machine() in ("aarch64", "arm64") or "+f16c" in features


@intrinsic
def _half_to_float(_, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float_to_half(_, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def prefer_eight_lanes(_, x):
    """Has LLVM take 8 lanes for float32 in the loops of the function that this stands in, on processors with AVX-512.

    It would take 16, as many as a register holds, and then join two registers of float64 before it stores: 0.19 ns a
    value in place of 0.17. Loops that read float64 of each column, too, are better off with 16, and so are sums.
    """

    def generate(context, builder, signature, arguments):
        if x.dtype == types.float32:
            set.add(builder.function.attributes, '"prefer-vector-width"="256"')  # llvmlite's own `add` knows no values
        return context.get_dummy_value()

    return types.void(x), generate


@by_types(inline=True)
def load(value):
    """A value of x as float64."""
    if value == types.uint16:
        return lambda value: np.float64(np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32))
    if value == types.int16:
        return lambda value: np.float64(_half_to_float(value))
    return lambda value: np.float64(value)


@by_types(inline=True)
def store(out, i, value):
    """``out[i] = value``, rounded to out's dtype: to nearest even, and 16 bits through float32."""
    return _storing(out)


def _storing(out):
    """How a value goes into out, by its type."""
    if out.dtype == types.uint16:

        def bfloat16(out, i, value):
            bits = np.float32(value).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            out[i] = np.uint16(rounded) if value == value else np.uint16(0x7FC0)

        return bfloat16
    if out.dtype == types.int16:

        def float16(out, i, value):
            out[i] = _float_to_half(np.float32(value))

        return float16
    if out.dtype == types.float32:

        def float32(out, i, value):
            out[i] = np.float32(value)

        return float32

    def float64(out, i, value):
        out[i] = value

    return float64


@by_types(inline=True)
def at(values, i):
    """``values[i]``, and None if there are none."""
    if isinstance(values, types.NoneType):
        return lambda values, i: None
    return lambda values, i: values[i]


@by_types(inline=True)
def if_given(values, replacement):
    """replacement, and None if there are no values."""
    if isinstance(values, types.NoneType):
        return lambda values, replacement: None
    return lambda values, replacement: replacement


@by_types
def room_for_mask(mask, rows, columns):
    """A byte for each value of some rows; None without a mask."""
    if isinstance(mask, types.NoneType):
        return lambda mask, rows, columns: None
    return lambda mask, rows, columns: np.empty((rows, columns), np.bool_)


@by_types(inline=True)
def cut(values, first, last):
    """``values[first:last]``, and None if there are none."""
    if isinstance(values, types.NoneType):
        return lambda values, first, last: None
    return lambda values, first, last: values[first:last]


@by_types(inline=True)
def shift_in(statistics, x):
    """The row of shifts for float64 x, whose mean is ``mean + shift``; None for narrower x."""
    if x.dtype == types.float64:
        return lambda statistics, x: statistics[SHIFT]
    return lambda statistics, x: None


@njit(**EXACT)
def shown(value, keep):
    """value, or 0 where the mask does not keep it; keep is None without a mask."""
    if keep is not None:
        value = value if keep else 0.0
    return value


@njit(**EXACT)
def shown_count(mask, size, channels):
    """How many values of each channel count, of so many in all: those that the mask shows, but at least 1; or all."""
    count = size // channels
    if mask is not None:
        count = 0
        for i in range(len(mask)):
            count += mask[i]
        count = max(1, count)
    return count


@njit(**EXACT)
def first_shown(mask, channels, inner):
    """Where in flat memory the first value of the first channel is that the mask shows; -1 if it shows none."""
    first = 0
    if mask is not None:
        i = 0
        while i < len(mask) and not mask[i]:
            i += 1
        first = i // inner * channels * inner + i % inner if i < len(mask) else -1
    return first


@njit(**EXACT)
def take_origins(x, first, inner, c0, c1, mean):
    """Fills in a value of each channel, as `first_shown` has found them; 0 where there is none."""
    for c in range(c0, c1):
        mean[c] = load(x[first + c * inner]) if first >= 0 else 0.0


@njit(**EXACT)
def deviation(value, mean, shift):
    """``(value - mean) - shift``; shift may be None."""
    d = load(value) - mean
    if shift is not None:
        d = d - shift
    return d


@njit(**EXACT)
def normalized(value, mean, shift, scale, bias, residual, floor):
    """``max(floor, ((value - mean) - shift) * scale + bias + residual)``; shift, residual and floor may be None."""
    v = deviation(value, mean, shift) * scale + bias
    if residual is not None:
        v = v + load(residual)
    if floor is not None:
        v = floor if v < floor else v  # NaN stays
    return v


@by_types(inline=True)
def is_active(value):
    """Whether dy counts: what a mask says, or whether y is above 0 where y itself is given."""
    if value == types.boolean:
        return lambda value: value
    infinity = {types.uint16: 0x7F80, types.int16: 0x7C00}.get(value)  # the last of positive bits that is no NaN
    if infinity is not None:
        return lambda value: value > 0 and value <= infinity
    return lambda value: value > 0.0


@by_types(inline=True)
def put(out, i, value):
    """`store` where there is an out."""
    if isinstance(out, types.NoneType):
        return lambda out, i, value: None
    return _storing(out)  # of two functions, one put into the other, Numba 0.68.1 loses what is local


@njit(**EXACT)
def active_dy(dvalue, active):
    """A value of dy as float64, 0 where it is not active; see `is_active`."""
    dy = load(dvalue)
    if active is not None:
        dy = dy if is_active(active) else 0.0
    return dy


@njit(**FUSED)
def dx_of(dy, value, mean, shift, mean_dy, slope, scale):
    """``(dy - mean_dy - ((x - mean) - shift) * slope) * scale``; shift may be None."""
    return (dy - mean_dy - deviation(value, mean, shift) * slope) * scale


@njit(**EXACT)
def fill(values, value):
    for i in range(len(values)):
        values[i] = value


@njit(**EXACT)
def compensated(total, lost, term):
    """``total + term`` and what rounding lost, to be taken from the next term (Kahan 1965): errors do not add up."""
    term = term - lost
    new = total + term
    return new, (new - total) - term


@njit(**EXACT)
def add_compensated(totals, lost, terms):
    for i in range(len(terms)):
        totals[i], lost[i] = compensated(totals[i], lost[i], terms[i])


@njit(**EXACT)
def rstd_of(var, eps):
    return 1.0 / np.sqrt(var + eps)


@njit(**EXACT)
def scales_of(var, eps, weight):
    scale = np.empty(len(var))
    for c in range(len(var)):
        scale[c] = rstd_of(var[c], eps) * weight[c]
    return scale


@njit(**EXACT)
def finish_statistics(c0, c1, count, sums, eps, weight, statistics, shift):
    """Columns c0 to c1 of ``statistics`` from ``sum(x - origin)`` and ``sum((x - origin)**2)`` of each; MEAN holds the
    origins before, and weight may be None.

    With shifts, the origin is the mean already, and what it lacks is the shift.
    """
    s1, s2, weights, shifts = sums[0][c0:c1], sums[1][c0:c1], cut(weight, c0, c1), cut(shift, c0, c1)
    mean, var = statistics[MEAN][c0:c1], statistics[VAR][c0:c1]
    m2, scale = statistics[M2][c0:c1], statistics[SCALE][c0:c1]
    for c in range(len(mean)):
        step = s1[c] / count
        if shift is None:
            mean[c] += step
        else:
            shifts[c] = step
        m2[c] = s2[c] - s1[c] * step
        var[c] = m2[c] / count
        rstd = rstd_of(var[c], eps)
        scale[c] = rstd if weight is None else rstd * weights[c]


@njit(**EXACT)
def finish_gradients(c0, c1, count, sums, eps, weight, shift, var, gradients):
    """Columns c0 to c1 of ``gradients`` from ``sum(dy)`` and ``sum(dy * (x - mean))`` of each.

    The count of constants is 0.
    """
    s1, s2, weights, shifts = sums[0][c0:c1], sums[1][c0:c1], weight[c0:c1], cut(shift, c0, c1)
    dweight, dbias, mean_dy = gradients[DWEIGHT][c0:c1], gradients[DBIAS][c0:c1], gradients[MEAN_DY][c0:c1]
    slope, scale, variances = gradients[SLOPE][c0:c1], gradients[SCALE][c0:c1], var[c0:c1]
    for c in range(len(dweight)):
        rstd = rstd_of(variances[c], eps)
        dweight[c] = (s2[c] if shift is None else s2[c] - shifts[c] * s1[c]) * rstd
        dbias[c] = s1[c]
        mean_dy[c] = s1[c] / count if count else 0.0
        slope[c] = dweight[c] / count * rstd if count else 0.0
        scale[c] = rstd * weights[c]


@cached(**KERNEL)
def finish_all_gradients(count, sums, eps, weight, shift, var, gradients):
    finish_gradients(0, len(var), count, sums, eps, weight, shift, var, gradients)


@cached(**KERNEL)
def update_running(mean, shift, m2, count, ddof, momentum, propagate, running_mean, running_var):
    """Fold the statistics of a batch into the running ones, in place."""
    for c in range(len(mean)):
        batch_mean = mean[c] if shift is None else mean[c] + shift[c]
        batch_var = m2[c] / (count - ddof)
        if propagate or (np.isfinite(batch_mean) and np.isfinite(batch_var)):
            running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * batch_mean
            running_var[c] = (1.0 - momentum) * running_var[c] + momentum * batch_var
