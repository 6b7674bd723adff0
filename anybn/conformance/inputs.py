"""The inputs that break batch norms, and the layouts they come in; benchmarks use them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from anybn.core.call import Array

if TYPE_CHECKING:
    from anybn.conformance.targets import Target

SHAPE = (32, 8, 28, 28)

#: name -> float64 values from standard normal ones.
ROWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "N(0, 1)": lambda r: r,
    "mean 1e3, std 1": lambda r: r + 1e3,
    "mean 1e4, std 1e-2": lambda r: r * 1e-2 + 1e4,
    "mean 1e6, std 1": lambda r: r + 1e6,
    "mean 1, std 1e-3": lambda r: r * 1e-3 + 1,
    "1e30 * N(0, 1)": lambda r: r * 1e30,
}
OVERFLOWING = "1e30 * N(0, 1)"

#: One channel of ten million values, in rows and in a plane, mean 100.
HUGE_SHAPES = ((10_000_000, 1, 1, 1), (1, 1, 3163, 3163))

#: The batch norms of ResNet-50 (He et al. 2015) on 224x224 images: (channels, height and width), in order.
RESNET50: tuple[tuple[int, int], ...] = (
    (64, 112),
    *((64, 56), (64, 56), (256, 56), (256, 56), *((64, 56), (64, 56), (256, 56)) * 2),
    *((128, 56), (128, 28), (512, 28), (512, 28), *((128, 28), (128, 28), (512, 28)) * 3),
    *((256, 28), (256, 14), (1024, 14), (1024, 14), *((256, 14), (256, 14), (1024, 14)) * 5),
    *((512, 14), (512, 7), (2048, 7), (2048, 7), *((512, 7), (512, 7), (2048, 7)) * 2),
)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """values rounded to dtype, in NumPy. Raises ImportError for bfloat16 without ml_dtypes."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            from ml_dtypes import bfloat16

            return values.astype(bfloat16)
        return values.astype(dtype)


def normal(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Standard normal float64 values, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape)


def exact(shape: tuple[int, ...], axis: int = 1, seed: int = 0) -> np.ndarray:
    """Small integers in pairs ``x[i] + x[i + 1] = 2 * mean``: mean and variance are exact in any order of summation.

    Odd counts end in the mean itself.
    """
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    count = int(np.prod(shape)) // channels
    half = rng.integers(-16, 17, (count // 2, channels))
    means = rng.integers(-100, 101, channels)
    rows = np.concatenate([half, -half, np.zeros((count % 2, channels), int)]) + means
    rows = rng.permuted(rows, axis=0)
    rest = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    return np.moveaxis(rows.reshape(*rest, channels), -1, axis).astype(np.float64)


Layout = Callable[["Target", np.ndarray], tuple[Array, int]]


def _channels_last_view(target: Target, x: np.ndarray) -> tuple[Array, int]:
    axes = (0, x.ndim - 1, *range(1, x.ndim - 1))
    return target.xp.permute_dims(target.array(np.moveaxis(x, 1, -1)), axes), 1


def _offset(target: Target, x: np.ndarray) -> tuple[Array, int]:
    flat = target.array(np.concatenate([np.zeros(1, x.dtype), x.reshape(-1)]))
    return target.xp.reshape(flat[1:], x.shape), 1


#: name -> (target, x as (N, C, *spatial)) -> (the same values in the target's library, channel axis).
LAYOUTS: dict[str, Layout] = {
    "NCHW": lambda target, x: (target.array(x), 1),
    "NHWC": lambda target, x: (target.array(in_layout(x, "NHWC")), -1),
    "(N, C)": lambda target, x: (target.array(in_layout(x, "(N, C)")), 1),
    "channels-last view": _channels_last_view,
    "Fortran order": lambda target, x: (target.xp.permute_dims(target.array(x.T), tuple(range(x.ndim))[::-1]), 1),
    "strided view": lambda target, x: (target.array(np.repeat(x, 2, axis=-1))[..., ::2], 1),
    "offset view": _offset,
    "flipped view": lambda target, x: (target.xp.flip(target.array(x[:, :, ::-1].copy()), axis=2), 1),
}


def in_layout(values: np.ndarray, name: str) -> np.ndarray:
    """What (N, C, *spatial) values look like in a layout, to compare results with."""
    if name == "NHWC":
        return np.moveaxis(values, 1, -1)
    if name == "(N, C)":
        return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
    return values


def state_values(state: Any) -> bytes:
    """The bytes of a state's values, wherever they lie."""
    arrays = state.copy().to("numpy")._arrays
    return repr([*((name, a.tobytes()) for name, a in arrays.held().items()), int(state.num_batches_tracked)]).encode()
