# mypy: warn-unused-ignores
"""What users may rely on when they check types; tests/package/test_types.py has it checked, nothing runs it."""

from collections.abc import Callable
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch

import anybn
import anybn.torch
from anybn import variants
from anybn.backends import Backend
from anybn.diagnosis import Diagnosis
from anybn.norms import layer_norm_vjp

Floats = npt.NDArray[np.float32]


def calls(x: Floats, residual: Floats, state: anybn.BatchNormState) -> None:
    assert_type(anybn.batch_norm(x, state, training=True, residual=residual, activation="relu"), Floats)
    y, pullback = anybn.batch_norm_vjp(x, state, nonfinite="raise")
    assert_type(y, Floats)
    assert_type(pullback, Callable[[Any], anybn.Gradients])
    assert_type(variants.batch_norm(x, state, statistics="running"), Floats)
    assert_type(variants.batch_norm_vjp(x, state)[0], Floats)
    assert_type(anybn.moments(x), anybn.Moments)
    assert_type(anybn.moments(x) + anybn.moments(x), anybn.Moments)
    assert_type(anybn.fold(state, x)[0], Floats)


def norms(x: Floats, t: torch.Tensor) -> None:
    assert_type(anybn.group_norm(x, 2), Floats)
    assert_type(anybn.instance_norm(x), Floats)
    assert_type(anybn.layer_norm(x, axes=(1, 2)), Floats)
    assert_type(anybn.rms_norm(t), torch.Tensor)
    assert_type(layer_norm_vjp(x)[0], Floats)


def layers(x: Floats, t: torch.Tensor, bn: anybn.BatchNorm2d) -> None:
    assert_type(bn(x), Floats)
    assert_type(bn(t), torch.Tensor)
    assert_type(bn.vjp(x)[0], Floats)
    assert_type(bn.train().to("numpy"), anybn.BatchNorm2d)
    assert_type(anybn.recalibrate(bn, [x]), anybn.BatchNorm2d)
    assert_type(anybn.diagnose(bn, [x]), Diagnosis)


def a_step(x: Floats, state: anybn.BatchNormState) -> None:
    y, pullback = anybn.batch_norm_vjp(x, state, training=True)
    grads = pullback(2 * y)
    state.weight = state.weight - 0.1 * grads.weight
    state.bias -= 0.1 * grads.bias
    assert_type(state.num_batches_tracked, int)
    assert_type(state.momentum, float | None)
    assert_type(state.copy(), anybn.BatchNormState)
    assert_type(state.parameters(), dict[str, Any])
    assert_type(state.equals(state.copy()), bool)
    assert_type(anybn.BatchNorm1d(3, 1e-5, None, False).copy(), anybn.BatchNorm1d)
    for name, gradient in grads.items():
        setattr(state, name, gradient)


def modules(model: torch.nn.Sequential, x: torch.Tensor) -> None:
    assert_type(anybn.torch.convert(model), torch.nn.Sequential)
    assert_type(anybn.torch.convert(model, fuse=(x,)), torch.fx.GraphModule)
    assert_type(anybn.torch.revert(model), torch.nn.Sequential)
    assert_type(anybn.torch.BatchNorm2d(3).state.num_features, int)


def backends() -> None:
    assert_type(anybn.backends()["numpy"], anybn.BackendInfo)
    assert_type(anybn.backends()["numpy"].devices, tuple[str, ...])
    assert issubclass(Backend, object)


def refused(x: Floats, state: anybn.BatchNormState) -> None:
    anybn.batch_norm(x, state, activation="gelu")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    anybn.batch_norm(x, state, nonfinite="ignore")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    anybn.BatchNorm(3, activation="gelu")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    state.state_dict("tensorflow")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
