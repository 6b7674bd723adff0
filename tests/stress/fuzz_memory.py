"""Arrays between pages that nobody may touch: a kernel that reads or writes beside one ends the process.

    python tests/stress/fuzz_memory.py [--cases N | --seconds S] [--seed N] [--float32]

Arrays of random shape, dtype and layout lie against a page without access, with their end or their beginning. Results
must have the bits that arrays elsewhere give, on any number of threads of either kind, and inputs must keep theirs.
After a crash, the case is the one after the last that ``--cases`` gets through.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import anybn
from anybn import norms
from stress import calls, program

PAGE, NO_ACCESS = mmap.PAGESIZE, 0  # PROT_NONE
DTYPES = ["float16", "float32", "float32", "float64"]
try:
    import ml_dtypes

    DTYPES.append(ml_dtypes.bfloat16)
except ImportError:
    pass

_c = ctypes.CDLL(None, use_errno=True)
_c.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(random: Random, values: np.ndarray) -> np.ndarray:
    """A copy, dense, at one end of pages between two without access."""
    size = -(-max(values.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + size):
        assert _c.mprotect(page, PAGE, NO_ACCESS) == 0, ctypes.get_errno()
    offset = PAGE + random.choice([0, size - values.nbytes])
    array = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    array[...] = values
    return array


def laid_out(random: Random, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``values`` as a view of guarded memory, and as the same view of other memory."""
    order = list(range(values.ndim))
    random.shuffle(order)
    if random.random() < 0.4:
        order.sort()
    flips = tuple(slice(None, None, -1 if random.random() < 0.15 else 1) for _ in order)
    steps = tuple(slice(None, None, 2 if random.random() < 0.1 else 1) for _ in order)
    base = values.transpose(order)[flips]
    sizes = [(n - 1) * (step.step or 1) + 1 for n, step in zip(base.shape, steps, strict=True)]
    spread = np.zeros(sizes, values.dtype)
    spread[steps] = base

    def view(a: np.ndarray) -> np.ndarray:
        return a[steps][flips].transpose(np.argsort(order))

    return view(guarded(random, spread)), view(spread)


def shape_of(random: Random) -> tuple[int, ...]:
    """With more than one value per channel, on the second axis or the last, and per row of a norm."""
    while True:
        limit = random.choice([4, 40, 700])
        shape = tuple(random.randint(1, limit) for _ in range(random.choice([2, 2, 3, 4, 4, 5])))
        size = np.prod(shape)
        if size <= 1 << 19 and min(size // shape[1], size // shape[-1], shape[-1], size // shape[0]) > 1 < shape[1]:
            return shape


def same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def case(random: Random) -> str:
    rng, shape = np.random.default_rng(random.randrange(2**32)), shape_of(random)
    dtype, axis = np.dtype(random.choice(DTYPES)), random.choice([1, 1, -1])
    channels, training = shape[axis], random.random() < 0.6
    calls.choose_threads(random)

    def array() -> tuple[np.ndarray, np.ndarray]:
        return laid_out(random, rng.normal(random.choice([0, 100]), 1, shape).astype(dtype))

    with_residual, with_mask, relu = (random.random() < p for p in (0.2, 0.15, 0.3))
    x, dy, out, residual = array(), array(), array(), array()
    mask = None
    if with_mask:
        keep = np.ones(np.delete(np.array(shape), axis), bool)
        keep.flat[rng.integers(keep.size, size=keep.size // 3)] = False
        keep.flat[:2] = True
        mask = keep
    parameters = {n: rng.normal(size=channels).astype("f4") for n in ("weight", "bias")}
    groups = random.choice([g for g in range(1, shape[1]) if shape[1] % g == 0])
    operation = random.choice(["batch_norm", "vjp", "vjp", "moments", "layer_norm", "group_norm"])

    def run(which: int) -> list[Any]:
        state = anybn.BatchNormState(channels)
        for name, values in parameters.items():
            setattr(state, name, guarded(random, values) if which == 0 else values)
        options = {"axis": axis, "mask": mask, "activation": "relu" if relu else None, "training": training}
        options["residual"] = residual[which] if with_residual else None
        if operation == "batch_norm":
            y = anybn.batch_norm(x[which], state, out=out[which], **options)
            return [y, state.running_mean, state.running_var]
        if operation == "vjp":
            y, pullback = anybn.batch_norm_vjp(x[which], state, **options)
            found = pullback(dy[which])
            return [y, found.x, found.weight, found.bias]
        if operation == "moments":
            found = anybn.moments(x[which], axis=axis, mask=mask)
            return [found.mean, found.m2]
        if operation == "layer_norm":
            y, pullback = norms.layer_norm_vjp(x[which])
            return [y, pullback(dy[which]).x]
        return [norms.group_norm(x[which], groups)]

    before = [a[0].tobytes() for a in (x, dy, residual)]
    found = run(0)
    assert before == [a[0].tobytes() for a in (x, dy, residual)], "an input has changed"
    anybn.set_num_threads(1)
    for a, b in zip(found, run(1), strict=True):
        same(np.ascontiguousarray(a), np.ascontiguousarray(b))
    return operation


def main() -> int:
    if "--float32" in sys.argv:  # alone, whose kernels most other tests compile
        sys.argv.remove("--float32")
        DTYPES[:] = ["float32"]
    np.seterr(all="ignore")
    return program.run("guarded arrays", __doc__, case, 1000)


if __name__ == "__main__":
    sys.exit(main())
