"""What code for any library uses: targets, asarray, parameters and gradients by name, equality, one file for a net."""

import contextlib

import array_api_compat
import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle


@pytest.fixture
def x(target):
    return target.array((inputs.normal((8, 3)) * 2 + 5).astype(np.float32))


# -- where -----------------------------------------------------------------------------------------------------


def test_namespaces_are_targets(target, x):
    for xp in (target.backend.module(), array_api_compat.array_namespace(x)):
        state = anybn.BatchNormState(3, like=xp)
        assert type(state.weight) is type(anybn.BatchNormState(3, like=target.backend.name).weight)
        assert anybn.BatchNorm(3).to(xp).state.backend == target.backend.name
        assert anybn.BatchNormState(3).to(np).backend == "numpy"


def test_a_namespace_of_a_library_without_a_backend(monkeypatch):
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict: not installed")
    monkeypatch.setattr("anybn.backends.registry._built_in", lambda name: None)
    assert anybn.BatchNormState(3, like=strict).backend == "array_api_strict"


def test_a_registered_backend_takes_its_namespace():
    from anybn.backends.numpy import NumPyBackend

    class Own(NumPyBackend):
        name = "own"

    anybn.register_backend(Own)
    try:
        assert anybn.BatchNormState(3, like=np).backend == "own"
    finally:
        anybn.unregister_backend("own")


def test_what_is_no_target():
    import math

    for target in (math, 3, None):
        with pytest.raises(TypeError, match="target is a "):
            anybn.BatchNormState(3).to(target)


def test_where_a_state_is(target, x):
    state = anybn.BatchNormState(3, like=x)
    assert state.backend == target.backend.name
    other = anybn.BatchNormState(3).to(f"{state.backend}:{state.device}")
    assert (other.backend, other.device) == (state.backend, state.device)
    assert target.backend.holds(other.weight, target.device)
    nothing = anybn.BatchNormState(3, affine=False, track_running_stats=False)
    assert (nothing.backend, nothing.device) == ("", "")


# -- asarray ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "bool"])
def test_asarray_there_and_back(target, x, dtype):
    values = (inputs.normal((2, 3)) * 3).astype(dtype)
    there = anybn.asarray(values, like=x)
    assert target.backend.holds(there, target.device)
    kept = "float32" if dtype == "float64" and not target.has_float64 else dtype
    back = anybn.asarray(there, like=np)
    assert back.dtype == kept
    assert np.array_equal(back, values.astype(kept))
    assert anybn.asarray(there, like=x) is there
    assert target.backend.holds(anybn.asarray(values, like=target.name), target.device)


def test_asarray_keeps_torchs_graph(torch):
    leaf = torch.ones(3, requires_grad=True)
    assert anybn.asarray(leaf, like=torch) is leaf
    assert np.array_equal(anybn.asarray(leaf, like=np), np.ones(3))


def test_asarray_of_what_has_no_values(jax):
    with pytest.raises(TypeError, match="a is traced by jax and has no values yet, so numpy cannot have it"):
        jax.jit(lambda a: anybn.asarray(a, like=np))(np.ones(3))
    jax.jit(lambda a: anybn.asarray(a, like=jax.numpy))(np.ones(3))
    with pytest.raises(TypeError, match="a is a list"):
        anybn.asarray([1.0], like=np)


# -- parameters and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"scale": False}, {"affine": False}], ids=str)
def test_an_optimizer_is_a_loop(target, x, options):
    """Weight decay but for the bias, and clipping, by name: against the formula in NumPy."""
    state = anybn.BatchNormState(3, like=x, **options)
    y, pullback = anybn.batch_norm_vjp(x, state, training=True)
    grads = pullback(y)
    assert set(state.parameters()) == set(grads.keys()) - {"x"} == set(dict(grads)) - {"x"}
    before = {name: target.numpy(a) for name, a in state.parameters().items()}
    for name, parameter in state.parameters().items():
        decay = 0.0 if name == "bias" else 0.01
        setattr(state, name, parameter - 0.1 * (grads[name] + decay * parameter))
    for name, old in before.items():
        expected = old - 0.1 * (target.numpy(grads[name]).astype(float) + (0.01 if name == "weight" else 0) * old)
        assert oracle.error(target.numpy(getattr(state, name)), expected, "float32", 4) <= 2


def test_adam_across_libraries(target):
    """Its moments go along with asarray; the weights are those that NumPy alone would have made."""

    def trained(places):
        state, moments = anybn.BatchNormState(3), {}
        for step in range(6):
            x = places[step % len(places)]((inputs.normal((8, 3), step) + 1).astype(np.float32))
            y, pullback = anybn.batch_norm_vjp(x, state, training=True)
            grads = pullback(y - 1)
            for name, parameter in state.parameters().items():
                m, v = (anybn.asarray(a, like=x) for a in moments.get(name, (np.zeros(3, np.float32),) * 2))
                m, v = 0.9 * m + 0.1 * grads[name], 0.99 * v + 0.01 * grads[name] ** 2
                moments[name] = m, v
                setattr(state, name, parameter - 0.1 * m / (v**0.5 + 1e-3))
        return state.to("numpy")

    alone, switched = trained([np.asarray]), trained([np.asarray, target.array])
    for name, parameter in alone.parameters().items():
        assert np.abs(parameter - (1 if name == "weight" else 0)).max() > 0.1
        assert np.allclose(getattr(switched, name), parameter, rtol=1e-4, atol=1e-5)


def test_gradients_are_a_tuple_and_a_mapping():
    x = np.ones((4, 3), np.float32)
    _, pullback = anybn.batch_norm_vjp(x, anybn.BatchNormState(3, bias=False))
    grads = pullback(x)
    assert grads[0] is grads.x is grads["x"]
    assert grads[:2] == (grads.x, grads.weight)
    assert grads.keys() == ("x", "weight")
    assert dict(grads.items()).keys() == {**grads}.keys() == {"x", "weight"}
    for name in ("bias", "residual", "gamma"):
        with pytest.raises(KeyError, match=f"'{name}' has no gradient here; there are those of x, weight"):
            grads[name]


# -- equality --------------------------------------------------------------------------------------------------


def test_equal_are_settings_and_values_wherever_they_are(target, x):
    state = anybn.BatchNormState(3)
    anybn.batch_norm(x, state, training=True)
    twin = state.copy()
    assert state.equals(twin.to("numpy"))
    assert state == twin
    assert hash(state) != hash(twin) or state is twin
    for name, value in (("eps", 1e-3), ("momentum", None), ("ddof", 0), ("num_batches_tracked", 7)):
        other = twin.copy()
        setattr(other, name, value)
        assert other != state
    for name in ("weight", "bias", "running_mean", "running_var"):
        other = twin.copy()
        setattr(other, name, np.full(3, 0.123, getattr(other, name).dtype))
        assert not state.equals(other)
    assert state != anybn.BatchNormState(3, bias=False)
    assert state != anybn.BatchNormState(4)
    assert state != 3
    with pytest.raises(TypeError, match="other is a int"):
        state.equals(3)


def test_nan_equals_nan():
    states = [anybn.BatchNormState(3) for _ in range(2)]
    for state in states:
        anybn.batch_norm(np.full((4, 3), np.nan), state, training=True, nonfinite="propagate")
    assert states[0] == states[1]


# -- files of several states -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("safetensors", reason="checkpoints need safetensors: pip install safetensors")
    return tmp_path / "net.safetensors"


def net(x):
    shared = anybn.BatchNormState(3, momentum=None, dtype="float64")
    layer = anybn.BatchNorm(3, eps=1e-3, bias=False)
    layer(x)
    anybn.batch_norm(x, shared, training=True)
    return {
        "stem": layer,
        "blocks": [shared, {"a.b": anybn.BatchNormState(4, affine=False), "again": shared}],
        "": anybn.BatchNormState(2, track_running_stats=False),
        "none": {},
    }


def test_a_net_in_one_file(path, x):
    saved = net(x)
    anybn.save(saved, path)
    loaded = anybn.load(path)
    assert list(loaded) == list(saved)
    assert loaded["stem"] == saved["stem"].state
    first, second = loaded["blocks"]
    assert first == saved["blocks"][0]
    assert second["again"] is first
    assert second["a.b"] == saved["blocks"][1]["a.b"]
    assert loaded[""] == saved[""]
    assert loaded["none"] == {}
    anybn.save(tuple(saved["blocks"]), path)
    assert anybn.load(path)[0] == first
    anybn.save(saved["stem"], path)
    assert anybn.load(path) == anybn.BatchNormState.load(path) == saved["stem"].state


def test_arrays_by_names_that_others_can_read(path):
    import safetensors.numpy

    anybn.save({"encoder": [anybn.BatchNormState(3)]}, path)
    assert sorted(safetensors.numpy.load_file(path)) == [
        f"encoder.0.{name}" for name in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")
    ]


def test_what_is_no_net(path):
    state = anybn.BatchNormState(3)
    for states, error, message in (
        ({"a": 3}, TypeError, "a is a int; it must be a BatchNormState, a layer, or a dict or list of these"),
        (3, TypeError, "states is a int"),
        ({"a": {1: state}}, TypeError, "states has the key 1, a int; keys must be str"),
        ({"a.b": state, "a": {"b": state.copy()}}, ValueError, "two states would have the name 'a.b'"),
    ):
        with pytest.raises(error, match=message):
            anybn.save(states, path)
    assert not path.exists()
    anybn.save({"a": state}, path)
    with pytest.raises(anybn.CheckpointError, match=r"holds several states: read it with anybn\.load"):
        anybn.BatchNormState.load(path)
    with pytest.raises(anybn.CheckpointError, match=r"holds several states: read it with anybn\.load"):
        anybn.load_batch_norms(path)


def test_every_truncation_and_bit_flip_is_seen(path):
    states = {"a": anybn.BatchNormState(2, eps=1e-3), "b": [anybn.BatchNormState(1, affine=False)]}
    anybn.save(states, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(anybn.CheckpointError):
            anybn.load(path)
    for position in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with contextlib.suppress(anybn.CheckpointError):
            assert anybn.load(path) == states


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"tree": {"a": "a"}, "states": {}}',
        '{"tree": {}, "states": {"a": {}}}',
        '{"tree": {"a": 3}, "states": {}}',
        '{"tree": {"a": "a"}, "states": {"a": {"num_features": 1000000000}}}',
        '{"tree": ' + 100_000 * "[",
    ],
    ids=lambda text: text[:40],
)
def test_forged_files(path, text):
    import safetensors.numpy

    from anybn.checkpoints import files

    tensors = {"a.weight": np.ones(3)}
    metadata = {"format": "anybn.states", "version": "1", "settings": text, "sha256": files._checksum(tensors, text)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    with pytest.raises(anybn.CheckpointError, match="holds no valid state"):
        anybn.load(path)
