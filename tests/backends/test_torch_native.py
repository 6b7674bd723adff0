"""use_backend("torch-native"): torch's own batch norm, in anybn's settings, with torch's accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

import anybn.torch  # noqa: E402


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """To a few units of torch's arithmetic in dtype, for values around 1."""
    return torch.allclose(a.double(), b.double(), rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(16, 5), (8, 5, 7), (4, 5, 6, 3)])
def test_it_is_torchs_module(shape: tuple[int, ...], affine: bool, dtype: torch.dtype) -> None:
    """Values, gradients, running statistics and evaluation."""
    kept = dtype if dtype is torch.float64 else torch.float32
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
    module = kind(5, affine=affine, dtype=kept)
    state = anybn.BatchNormState(5, affine=affine, dtype=str(kept).removeprefix("torch."), like=torch.zeros(1))
    parameters = []
    if affine:
        with torch.no_grad():
            module.weight.uniform_(0.5, 2), module.bias.normal_()
        state.weight, state.bias = (torch.nn.Parameter(p.detach().clone()) for p in module.parameters())
        parameters = [state.weight, state.bias]
    for step in range(3):
        training = step < 2
        values, dy = (torch.from_numpy(inputs.normal(shape, 2 * step + i) + 1 - i).to(dtype) for i in range(2))
        ours, theirs = (values.clone().requires_grad_() for _ in range(2))
        with anybn.use_backend("torch-native"):
            y = anybn.batch_norm(ours, state, training=training)
        expected = module.train(training)(theirs)
        found = torch.autograd.grad(y, [ours, *parameters], dy)
        reference = torch.autograd.grad(expected, [theirs, *module.parameters()], dy)
        assert torch.equal(y, expected) or not training  # the running statistics keep more digits than torch's
        assert close(y, expected, dtype)
        for a, b in zip(found, reference, strict=True):
            assert a.dtype == b.dtype
            scale = max(1, float(b.abs().max()))
            assert close(a / scale, b / scale, dtype)
    assert close(state.running_mean, module.running_mean, kept)
    assert close(state.running_var, module.running_var, kept)
    assert state.running_var.dtype is torch.float64
    assert state.num_batches_tracked == 2


def test_modules_take_it_too() -> None:
    x = torch.from_numpy(inputs.normal((8, 4, 5, 5))).float() + 100
    ours, theirs = anybn.torch.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    with anybn.use_backend("torch-native"):
        assert torch.equal(ours(x), theirs(x))
    assert close(ours.running_mean, theirs.running_mean, torch.float32)
    assert int(ours.num_batches_tracked) == 1


def test_it_is_torchs_arithmetic_and_not_anybns() -> None:
    x = torch.from_numpy(inputs.ROWS["mean 1e6, std 1"](inputs.normal((32, 4, 9, 9)))).float()
    y = anybn.batch_norm(x, anybn.BatchNormState(4), training=True)
    with anybn.use_backend("torch-native"):
        native = anybn.batch_norm(x, anybn.BatchNormState(4), training=True)
    assert torch.equal(native, torch.nn.BatchNorm2d(4)(x))
    assert not torch.equal(native, y)


def test_a_batch_with_nan_is_not_committed() -> None:
    x = torch.from_numpy(inputs.normal((8, 3, 4)))
    x[2, 1, 3] = torch.nan
    state = anybn.BatchNormState(3)
    with anybn.use_backend("torch-native"):
        y = anybn.batch_norm(x, state, training=True)
        with pytest.raises(anybn.NonFiniteError, match=r"1 of 3 channels \(1\)"):
            anybn.batch_norm(x, state, training=True, nonfinite="raise")
    assert y[2, 1].isnan().any()
    assert state.running_mean[1] == 0
    assert state.running_var[1] == 1
    assert torch.allclose(state.running_mean[[0, 2]], 0.1 * x.mean((0, 2))[[0, 2]])
    assert state.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_first_and_second_order(training: bool, relu: bool) -> None:
    """With a residual and on any axis, against finite differences."""
    x, residual = (torch.from_numpy(inputs.normal((5, 4, 3), seed)).requires_grad_() for seed in (0, 1))
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(*given: torch.Tensor) -> torch.Tensor:
        state = anybn.BatchNormState(3, dtype="float64", like=x)
        state.running_mean, state.running_var = torch.arange(3.0), torch.arange(3.0) + 0.5
        state.weight, state.bias = given[1:3]
        options: dict[str, Any] = {"residual": given[3], "activation": "relu" if relu else None}
        return anybn.batch_norm(given[0], state, training=training, axis=-1, **options)

    with anybn.use_backend("torch-native"):
        assert torch.autograd.gradcheck(f, (x, weight, bias, residual))
        assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))


def test_masks_out_errors_and_other_libraries_are_as_ever() -> None:
    values = inputs.normal((6, 3, 4))
    mask = np.arange(4) < 3
    results = []
    for name in ("torch-native", "torch"):
        x, state = torch.from_numpy(values.copy()), anybn.BatchNormState(3)
        with anybn.use_backend(name):
            masked = anybn.batch_norm(x, state, training=True, mask=torch.from_numpy(mask))
            assert anybn.batch_norm(x, state, out=x) is x
            with pytest.raises(ValueError, match="training needs more than 1 value per channel"):
                anybn.batch_norm(x[:1, :, 0], state, training=True)
            assert isinstance(anybn.batch_norm(values, anybn.BatchNormState(3), training=True), np.ndarray)
            assert anybn.batch_norm(x[:0], state, training=True).shape == (0, 3, 4)
            assert anybn.moments(x).count == 24
        results.append((masked, x, state.running_mean, state.running_var))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_known_by_name_alone() -> None:
    assert "torch-native" not in anybn.backends()
    assert type(anybn.backends.registry.backend_for(torch.zeros(1))).__name__ == "TorchBackend"
    state = anybn.BatchNormState(3).to("torch-native")
    assert isinstance(state.weight, torch.Tensor)
