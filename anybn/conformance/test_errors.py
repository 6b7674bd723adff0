"""Bad input of every kind: the same class and text as on NumPy, and a state that is byte for byte what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs
from anybn.conformance.targets import Target

#: of (array maker, state of 3 channels)
Call = Callable[[Callable[..., Any], anybn.BatchNormState], Any]


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def normalized(*shape: int, dtype: Any = np.float32, **options: Any) -> Call:
    """batch_norm of zeros; options that are NumPy arrays go where x is."""

    def call(a: Callable[..., Any], s: anybn.BatchNormState) -> Any:
        placed = {name: a(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
        return anybn.batch_norm(a(zeros(*shape, dtype=dtype)), s, **placed)

    return call


def assigned(name: str, values: np.ndarray) -> Call:
    return lambda a, s: setattr(s, name, a(values))


#: name -> (call, class, a part of the message)
CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "one axis": (
        normalized(5),
        ValueError,
        "x has shape (5,); batch norm needs (N, C, ...): for one sample use x[None]",
    ),
    "no axis": (normalized(), ValueError, "x has shape (); batch norm needs (N, C, ...)"),
    "channels last": (
        normalized(2, 8, 8, 3),
        ValueError,
        "x has 8 channels on axis 1 but the state has 3; its shape (2, 8, 8, 3) looks channels-last: pass axis=-1",
    ),
    "channels first": (
        normalized(2, 3, 8, 8, axis=-1),
        ValueError,
        "x has 8 channels on axis -1 but the state has 3; its shape (2, 3, 8, 8) looks channels-first: pass axis=1",
    ),
    "other channels": (
        normalized(2, 4),
        ValueError,
        "x has 4 channels on axis 1 but the state has 3; its shape is (2, 4): pass the channel axis",
    ),
    "one value": (
        normalized(1, 3, training=True),
        ValueError,
        "training needs more than 1 value per channel, got shape (1, 3): use a larger batch, eval mode, or a layer or "
        "group norm",
    ),
    "int": (normalized(2, 3, dtype=np.int32), TypeError, "x has dtype int32: cast to float32"),
    "bool": (normalized(2, 3, dtype=bool), TypeError, "x has dtype bool: cast to float32"),
    "complex": (
        normalized(2, 3, dtype=np.complex64),
        TypeError,
        "x has dtype complex64: normalize real and imaginary parts separately",
    ),
    "list": (lambda a, s: anybn.batch_norm([[1.0, 2.0, 3.0]], s), TypeError, "x is a list"),
    "axis out of range": (
        normalized(2, 3, axis=2),
        ValueError,
        "axis is 2 but x has shape (2, 3): the channel axis must lie in [-2, 1]",
    ),
    "axis no int": (normalized(2, 3, axis=1.0), TypeError, "axis is 1.0, a float"),
    "axis a bool": (normalized(2, 3, axis=True), TypeError, "axis is True, a bool"),
    "training no bool": (
        normalized(2, 3, training="yes"),
        TypeError,
        "training is 'yes', a str; it must be True or False",
    ),
    "activation": (
        normalized(2, 3, activation="gelu"),
        ValueError,
        "activation is 'gelu'; it must be one of None, 'relu'",
    ),
    "nonfinite": (
        normalized(2, 3, nonfinite="ignore"),
        ValueError,
        "nonfinite is 'ignore'; it must be one of 'skip', 'raise', 'propagate'",
    ),
    "state": (lambda a, s: anybn.batch_norm(a(zeros(2, 3)), {}), TypeError, "state is a dict"),  # type: ignore[arg-type]
    "mask shape": (
        normalized(2, 3, 4, mask=zeros(2, 3, 4, dtype=bool)),
        ValueError,
        "mask has shape (2, 3, 4); x has (2, 3, 4) with channels on axis 1, so it must be (2, 4)",
    ),
    "mask size": (normalized(2, 3, 4, mask=zeros(2, 5, dtype=bool)), ValueError, "mask has shape (2, 5)"),
    "mask dtype": (normalized(2, 3, 4, mask=zeros(2, 4)), TypeError, "mask has dtype float32; it must be bool"),
    "mask a list": (normalized(2, 3, mask=[True, False]), TypeError, "mask is a builtins.list but x is a"),
    "residual shape": (
        normalized(2, 3, 4, residual=zeros(2, 3, 1)),
        ValueError,
        "residual has shape (2, 3, 1) but x has (2, 3, 4): they must be the same",
    ),
    "residual dtype": (
        normalized(2, 3, residual=zeros(2, 3, dtype=np.int32)),
        TypeError,
        "residual has dtype int32 but x has float32: cast residual to x's dtype",
    ),
    "moments of one axis": (lambda a, s: anybn.moments(a(zeros(5))), ValueError, "x has shape (5,)"),
    "weight shape": (assigned("weight", zeros(4)), ValueError, "weight has shape (4,); the state has 3 channels"),
    "bias dtype": (assigned("bias", zeros(3, dtype=np.int32)), TypeError, "bias has dtype int32"),
    "running_mean rank": (assigned("running_mean", zeros(1, 3)), ValueError, "running_mean has shape (1, 3)"),
    "extra and missing keys": (
        lambda a, s: s.load_state_dict({"weight": a(zeros(3)), "gamma": a(zeros(3)), "running_var": a(zeros(2))}),
        anybn.CheckpointError,
        "missing key 'running_mean'; missing key 'num_batches_tracked'; extra key 'gamma'; running_var has shape (2,)",
    ),
}
VALUES: dict[str, tuple[Call, str]] = {
    "negative variance": (
        assigned("running_var", np.array([1, -1, 1.0], np.float32)),
        "running_var is -1.0 in channel 1",
    ),
    "NaN variance": (assigned("running_var", np.array([1, 1, np.nan], np.float32)), "running_var is nan in channel 2"),
    "NaN mean": (assigned("running_mean", np.array([np.nan, 1, 1], np.float32)), "running_mean is nan in channel 0"),
    "masked to one value": (
        normalized(2, 3, training=True, mask=np.array([True, False])),
        "got shape (2, 3) with 1 unmasked",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(target: Target, name: str) -> None:
    call, cls, message = CALLS[name]
    if name == "complex":
        target.require("complex64")
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    arrays = state._arrays
    with pytest.raises(cls) as caught:
        call(target.array, state)
    assert message in str(caught.value)
    assert type(caught.value) is cls
    assert state._arrays is arrays, "the state was replaced"
    assert inputs.state_values(state) == before

    with pytest.raises(cls) as on_numpy, anybn.use_backend("numpy"):
        call(np.asarray, anybn.BatchNormState(3))
    name_of_target = f"a {target.backend.name} array"
    assert str(caught.value).replace(name_of_target, "a numpy array") == str(on_numpy.value)


def test_bad_gradients(target: Target) -> None:
    _, pullback = anybn.batch_norm_vjp(target.array(zeros(2, 3)), anybn.BatchNormState(3))
    with pytest.raises(ValueError, match=r"dy has shape \(3, 2\) but x has \(2, 3\): they must be the same"):
        pullback(target.array(zeros(3, 2)))
    with pytest.raises(TypeError, match=r"dy has dtype int32: cast to float32"):
        pullback(target.array(zeros(2, 3, dtype=np.int32)))
    with pytest.raises(TypeError, match=r"dy is a float, not an array that anybn knows: wrap it with np.asarray"):
        pullback(1.0)


@pytest.mark.parametrize("name", VALUES)
def test_bad_values(target: Target, name: str) -> None:
    """What can be seen only in values that are there, which a lazy library's are not."""
    call, message = VALUES[name]
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    if target.backend.is_traced(target.array(zeros(1))):
        call(target.array, state)
        return
    with pytest.raises(ValueError, match=r".") as caught:
        call(target.array, state)
    assert message in str(caught.value)
    assert inputs.state_values(state) == before


def test_arrays_of_another_library(target: Target) -> None:
    other = "array_api_strict" if target.backend.owns(np.ndarray) else "numpy"
    if other == "array_api_strict":
        pytest.importorskip("array_api_strict", reason="a second library to mix with NumPy")
    elsewhere = anybn.BatchNormState(3).to(other)
    state, x = anybn.BatchNormState(3), target.array(zeros(4, 3))
    foreign = anybn.batch_norm(_on(other, zeros(4, 3)), elsewhere)
    for arguments in ({"residual": foreign}, {"mask": foreign}):
        with pytest.raises(
            TypeError, match=f"but x is a {target.backend.name} array: pass .* as an array of x's library"
        ):
            anybn.batch_norm(x, state, **arguments)


def _on(library: str, values: np.ndarray) -> Any:
    from anybn.backends.registry import resolve_target

    backend, device = resolve_target(library)
    return backend.from_numpy(values, device)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["train", "evaluate", "gradients"])
def test_an_exception_inside_a_kernel_leaves_the_state(
    target: Target, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    state = anybn.BatchNormState(3)
    x = target.array(inputs.normal((4, 3)).astype(np.float32))
    _, pullback = anybn.batch_norm_vjp(x, anybn.BatchNormState(3), training=True)
    before, arrays = inputs.state_values(state), state._arrays

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(type(target.backend), stage, fail)
    if stage == "evaluate":
        monkeypatch.setattr(type(target.backend), "evaluate_at_once", fail)
    with pytest.raises(error):
        pullback(x) if stage == "gradients" else anybn.batch_norm(x, state, training=stage == "train")
    assert state._arrays is arrays
    assert inputs.state_values(state) == before
