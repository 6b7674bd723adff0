"""Libraries that have an array namespace and not all that anybn would like to ask of it; and arrays that are more than
values, which are refused everywhere."""

import importlib
import types

import numpy as np
import pytest

import anybn
from anybn import norms
from anybn.backends import registry
from anybn.backends.array_api import ArrayAPIBackend
from anybn.conformance import inputs

X = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)


class Bare:
    """An array with DLPack, and neither ``__array__`` nor ``device``."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class Mute:
    """An array that gives its values to nobody: NumPy makes an object of it."""

    def __array__(self, dtype=None, copy=None):
        return np.array(None)


def backend_of(cls, **namespace):
    return ArrayAPIBackend(
        "bare", types.SimpleNamespace(asarray=lambda values, **_: cls(np.asarray(values)), **namespace), ""
    )


def test_values_come_by_dlpack_where_there_is_no_array_protocol():
    values = backend_of(Bare).to_numpy(Bare(X))
    assert type(values) is np.ndarray
    assert np.array_equal(values, X)
    values[0] = 0  # a copy
    assert X[0, 0, 0] != 0


@pytest.mark.parametrize("array", [Mute(), object()], ids=["objects", "nothing"])
def test_values_that_do_not_come_are_an_error_and_never_objects(array):
    with pytest.raises(
        TypeError, match=r"a bare array cannot be brought to NumPy, by neither __array__ nor __dlpack__"
    ):
        backend_of(Bare).to_numpy(array)


def test_what_a_namespace_does_not_tell():
    """Neither devices nor dtypes: one of before 2023.12."""
    old = backend_of(Bare, float64="float64")
    assert old.device_of(Bare(X)) is None
    assert (old.device(""), old.devices(), old.has_float64(None)) == (None, ["default"], True)
    assert not backend_of(Bare).has_float64(None)
    with pytest.raises(ValueError, match="bare has no device 'gpu'; it has default"):
        old.device("gpu")
    with pytest.raises(TypeError, match="bare has no bfloat16: use float32"):
        old.dtype("bfloat16")


# -- MLX and ndonnx: what the conformance suite does not look at --------------------------------------------------


def test_mlx():
    mx = pytest.importorskip("mlx.core", reason="mlx: not installed, pip install 'mlx[cpu]'")
    state = anybn.BatchNormState(3, dtype="bfloat16", like=mx.array(X))
    assert state.weight.dtype == mx.bfloat16
    assert "on mlx" in repr(state)
    x = inputs.exact((6, 3, 4)).astype(np.float32)
    y = anybn.batch_norm(mx.array(x), state, training=True)
    assert isinstance(y, mx.array)
    alone = anybn.BatchNormState(3, dtype="bfloat16")
    assert np.array_equal(np.array(y), anybn.batch_norm(x, alone, training=True))
    assert np.array_equal(state.to("numpy").running_var, alone.running_var)


def test_ndonnx_makes_a_graph_of_evaluation_for_batches_of_any_size():
    ndonnx = pytest.importorskip("ndonnx", reason="ndonnx: not installed, pip install ndonnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime: not installed, pip install onnxruntime")
    state = anybn.BatchNormState(3)
    anybn.batch_norm(X, state, training=True)
    x = ndonnx.argument(shape=("N", 3, 4), dtype=ndonnx.float32)
    graph = ndonnx.build({"x": x}, {"y": anybn.batch_norm(x, state, activation="relu")}).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (X, X[:2]):
        assert np.array_equal(session.run(None, {"x": batch})[0], anybn.batch_norm(batch, state, activation="relu"))
    for call in (lambda: anybn.batch_norm(x, state, training=True), lambda: anybn.moments(x)):
        with pytest.raises(ValueError, match=r"x has the unknown shape \(None, 3, 4\): evaluation takes it"):
            call()


# -- masks and units ----------------------------------------------------------------------------------------------


def of_numpy_ma():
    return np.ma.array(X, mask=X > 1)


def of_marray():
    return importlib.import_module("marray").masked_namespace(np).asarray(X, mask=X > 1)


def of_astropy():
    return X * importlib.import_module("astropy.units").m


def of_astropy_masked():
    return importlib.import_module("astropy.utils.masked").Masked(X, mask=X > 1)


def of_pint():
    return X * importlib.import_module("pint").UnitRegistry().meter


class Metres(np.ndarray):
    """As astropy's and unyt's are, which need not be installed."""

    unit = "m"


class Shown:
    """As marray's are, which need not be installed."""

    mask = property(lambda self: X > 1)

    def __array_namespace__(self):
        return np


CARRYING = {
    "numpy.ma": (of_numpy_ma, r"whose mask would be lost: pass its \.data, and as mask="),
    "a class with a mask": (Shown, r"whose mask would be lost: pass its \.data, and as mask="),
    "a class with a unit": (lambda: X.view(Metres), r"whose unit would be lost: pass its \.data, in the same unit"),
    "marray": (of_marray, r"whose mask would be lost: pass its \.data, and as mask="),
    "astropy": (of_astropy, r"whose unit would be lost: pass its \.value, in the same unit"),
    "astropy's masked": (of_astropy_masked, r"whose mask would be lost: pass its \.unmasked, and as mask="),
    "pint": (of_pint, r"whose unit would be lost: pass its \.magnitude, in the same unit"),
}
PATHS = {
    "batch_norm": lambda a, s: anybn.batch_norm(a, s),
    "in training": lambda a, s: anybn.batch_norm(a, s, training=True),
    "batch_norm_vjp": lambda a, s: anybn.batch_norm_vjp(a, s),
    "dy": lambda a, s: anybn.batch_norm_vjp(X, s)[1](a),
    "residual": lambda a, s: anybn.batch_norm(X, s, residual=a),
    "out": lambda a, s: anybn.batch_norm(X, s, out=a),
    "mask": lambda a, s: anybn.batch_norm(X, s, mask=a),
    "moments": lambda a, s: anybn.moments(a),
    "moments, a mask": lambda a, s: anybn.moments(X, mask=a),
    "recalibrate": lambda a, s: anybn.recalibrate(s, [a]),
    "a norm": lambda a, s: norms.layer_norm(a),
    "a norm's weight": lambda a, s: norms.layer_norm(X, a),
    "weight": lambda a, s: setattr(s, "weight", a),
    "like": lambda a, s: anybn.BatchNormState(3, like=a),
    "to": lambda a, s: s.to(a),
    "state_dict": lambda a, s: s.load_state_dict({**s.state_dict(), "weight": a}),
    "fold": lambda a, s: anybn.fold(s, a),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CARRYING)
def test_masks_and_units_are_refused_with_the_way_out(name, path):
    make, message = CARRYING[name]
    try:
        array = make()
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
    state = anybn.BatchNormState(3)
    before = state._arrays
    with pytest.raises((TypeError, anybn.CheckpointError), match=message), anybn.use_backend("numpy"):
        PATHS[path](array, state)
    assert state._arrays is before


def test_torchs_masked_tensors_are_refused():
    torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    with pytest.warns(UserWarning, match="prototype"):
        x = torch.masked.masked_tensor(torch.from_numpy(X), torch.from_numpy(X < 1))
    with pytest.raises(TypeError, match=r"whose mask would be lost: pass its \.get_data\(\), and as mask="):
        anybn.batch_norm(x, anybn.BatchNormState(3))


def test_other_subclasses_are_arrays_as_before(tmp_path):
    class Named(np.ndarray):
        def mask(self):
            """A method of this name, and no mask."""

    assert registry.backend_for(X.view(Named)) is registry.backend_named("numpy")
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    file[:] = X
    assert np.array_equal(anybn.moments(file).m2, anybn.moments(X).m2)
