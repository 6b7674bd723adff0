"""A group of three members, which are threads: what they compute together is what one would from the whole batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import oracle
from anybn.conformance.targets import Target, bar
from anybn.core.call import Array

MEMBERS = 3


class Nameless:
    """One member of a group that can sum, and nothing else. The sum is NumPy's, in the order of members."""

    def __init__(self, target: Target, number: int, barrier: threading.Barrier, arrays: list[np.ndarray]):
        self.target, self.number, self.barrier, self.arrays = target, number, barrier, arrays

    def all_reduce_sum(self, array: Array) -> Array:
        self.arrays[self.number] = self.target.numpy(array)
        self.barrier.wait()
        total = np.sum(self.arrays, axis=0)
        self.barrier.wait()  # nobody comes with the next array before all have read this one
        return self.target.array(total)


class Ranked(Nameless):
    """One member of a group with ranks."""

    size = MEMBERS

    @property
    def rank(self) -> int:
        return self.number


def on_threads(kind: type[Nameless], target: Target, function: Callable[[Nameless], Any]) -> list[Any]:
    """What function returns for each member. The first error ends all of them."""
    # so long only for compilers, which some threads may wait for
    barrier, arrays = threading.Barrier(MEMBERS, timeout=120), [np.zeros(0)] * MEMBERS

    def run(number: int) -> Any:
        try:
            return function(kind(target, number, barrier, arrays))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(MEMBERS) as pool:
        futures = [pool.submit(run, number) for number in range(MEMBERS)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [Ranked, Nameless])
def test_training_over_a_group(target: Target, kind: type[Nameless], masked: bool) -> None:
    """y, gradients and running statistics of two steps."""
    # One member has a single sample, and one none: not where x is lazy, since an empty lazy x takes no part.
    lazy = target.backend.is_traced(target.array(np.zeros(1, np.float32)))
    samples = (5, 1, 1) if lazy else (6, 1, 0)
    rng = np.random.default_rng(0)
    shape = (sum(samples), 3, 4, 5)
    # The means of samples differ, so that the statistics of a member alone are far off.
    x = (rng.standard_normal(shape) + np.arange(shape[0]).reshape(-1, 1, 1, 1)).astype(np.float32)
    residual, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    weight, bias = rng.uniform(0.5, 2, 3).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    mask = rng.random((shape[0], 4, 5)) < 0.7 if masked else None

    def two_steps(member: Nameless) -> dict[str, np.ndarray]:
        start = sum(samples[: member.number])
        share = slice(start, start + samples[member.number])
        x_, residual_, dy_, mask_ = (None if a is None else target.array(a[share]) for a in (x, residual, dy, mask))
        state = anybn.BatchNormState(3, like=x_)
        state.weight, state.bias = target.array(weight), target.array(bias)
        options: dict[str, Any] = {"mask": mask_, "residual": residual_, "activation": "relu", "group": member}
        y_alone = anybn.batch_norm(x_, state, training=True, **options)
        y, pullback = anybn.batch_norm_vjp(x_, state, training=True, **options)
        found = {"y_alone": y_alone, "y": y, **{f"d{name}": a for name, a in pullback(dy_)._asdict().items()}}
        assert state.num_batches_tracked == 2
        found |= {"mean": state.running_mean, "var": state.running_var}
        return {name: target.numpy(a) for name, a in found.items()}

    of_members = on_threads(kind, target, two_steps)
    whole = {
        name: np.concatenate([found[name] for found in of_members]) for name in ("y_alone", "y", "dx", "dresidual")
    }
    for name in ("dweight", "dbias"):
        whole[name] = np.stack([found[name] for found in of_members]).sum(0, np.longdouble)

    s = oracle.statistics(x, mask=mask)
    y = oracle.normalize(x, s.mean, s.var(), weight=weight, bias=bias, residual=residual, relu=True, mask=mask)
    g = oracle.gradients(dy, x, s.mean, s.var(), count=s.count, weight=weight, active=y > 0, mask=mask)
    wide, limit = target.has_float64, bar(target, "float32")
    # Without something wider, results are judged by the size of what was subtracted to get them.
    term = 1 if wide else np.abs(weight).max() * 5 + np.abs(bias).max()
    assert oracle.error(whole["y"], y, "float32", term) <= limit
    assert oracle.error(whole["y_alone"], y, "float32", term) <= limit
    assert oracle.error(whole["dx"], g.x, "float32", 1 if wide else np.maximum(1, g.x_size)) <= limit
    assert oracle.error(whole["dresidual"], g.residual, "float32") <= limit
    # Every member rounds its share of the parameters' gradients.
    assert oracle.error(whole["dweight"], g.weight, "float32", np.maximum(1, g.weight_size)) <= limit
    assert oracle.error(whole["dbias"], g.bias, "float32", np.maximum(1, g.bias_size)) <= limit
    for name, expected in zip(("mean", "var"), oracle.trained([s, s]), strict=True):
        first, *others = (found[name] for found in of_members)
        assert oracle.error(first, expected, "float64" if wide else "float32", np.abs(expected).max()) <= 4
        assert all(np.array_equal(first, other) for other in others)  # the same bits on every member
