"""Calls for the storms: each on threads of some kind, with what it must give."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np

import anybn
from anybn.kernels.cpu import openmp

try:
    import torch

    import anybn.torch
except ImportError:
    torch = None

#: Two whose channels lie together or take turns, large enough for several threads, and a small one.
SHAPES = [(16, 8, 64, 64), (512, 512), (8, 16)]
KINDS = ["numpy", "masked", "torch"] if torch else ["numpy", "masked"]

_torchs_team = openmp.team


class Trained(NamedTuple):
    """A call, the state that it trains, and what this is before and after."""

    state: anybn.BatchNormState
    train: Callable[[], Any]
    before: list[list[float]]
    after: list[list[float]]
    out: np.ndarray
    expected: np.ndarray


def values(state: anybn.BatchNormState) -> list[list[float]]:
    return [
        np.asarray(state.running_mean).tolist(),
        np.asarray(state.running_var).tolist(),
        [state.num_batches_tracked],
    ]


def reset(state: anybn.BatchNormState) -> None:
    state.load_state_dict(anybn.BatchNormState(state.num_features).state_dict())


def choose_threads(random: Random) -> None:
    """torch's or our own, some of them."""
    openmp.team = random.choice([_torchs_team, lambda: None])
    anybn.set_num_threads(random.choice([1, 2, 3]))


def trained(random: Random) -> Trained:
    kind, shape, seed = random.choice(KINDS), random.choice(SHAPES), random.randrange(2**32)
    x = np.random.default_rng(seed).normal(3, 2, shape).astype("f4")
    axes = (0, *range(2, x.ndim))
    mean, var = x.mean(axes, dtype="f8", keepdims=True), x.var(axes, dtype="f8", keepdims=True)
    expected = (x - mean) / np.sqrt(var + 1e-5)
    if kind == "torch":
        module = (anybn.torch.BatchNorm2d if x.ndim == 4 else anybn.torch.BatchNorm1d)(shape[1])
        given, out = torch.from_numpy(x), np.full_like(x, np.nan)

        def train() -> None:
            out[...] = module(given).detach().numpy()

        state = module.state
    else:
        state, out = anybn.BatchNormState(shape[1]), np.full_like(x, np.nan)
        mask = np.ones((shape[0], *shape[2:]), bool) if kind == "masked" else None

        def train() -> None:
            anybn.batch_norm(x, state, training=True, mask=mask, out=out)

    before = values(state)
    train()
    after = values(state)
    reset(state)
    np.testing.assert_allclose(after[0], 0.1 * mean.ravel(), rtol=1e-5)
    return Trained(state, train, before, after, out, expected)


def is_right(call: Trained) -> bool:
    return bool(np.abs(call.out - call.expected).max() < 1e-4)
