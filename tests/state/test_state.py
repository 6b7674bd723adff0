"""BatchNormState as an object: settings, sharing, copies, files."""

import copy
import pickle

import numpy as np
import pytest

import anybn
from anybn.checkpoints import files
from anybn.conformance import inputs


def trained(**options):
    state = anybn.BatchNormState(3, **options)
    for seed in range(2):
        anybn.batch_norm(inputs.normal((9, 3), seed) + seed, state, training=True)
    return state


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features is -1"),
        ({"num_features": 3.0}, TypeError, "num_features is 3.0, a float; it must be an int"),
        ({"num_features": True}, TypeError, "num_features is True, a bool"),
        ({"num_features": "3"}, TypeError, "num_features is '3', a str"),
        ({"eps": 0}, ValueError, "eps is 0.0; it must be positive and finite"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"eps": float("inf")}, ValueError, "eps is inf"),
        ({"eps": "1e-5"}, TypeError, "eps is '1e-5', a str"),
        ({"eps": True}, TypeError, "eps is True, a bool"),
        (
            {"momentum": 1.5},
            ValueError,
            r"momentum is 1.5; it must lie in \[0, 1\]: new = \(1 - momentum\) \* old \+ momentum \* batch; "
            "Keras's momentum is 1 minus this",
        ),
        ({"momentum": -0.1}, ValueError, "momentum is -0.1"),
        ({"momentum": float("nan")}, ValueError, "momentum is nan"),
        ({"momentum": "0.1"}, TypeError, "momentum is '0.1', a str"),
        ({"ddof": 2}, ValueError, r"ddof is 2; running_var averages m2 / \(count - ddof\)"),
        ({"ddof": 1.0}, TypeError, "ddof is 1.0, a float"),
        ({"affine": 1}, TypeError, "affine is 1, a int; it must be True or False"),
        ({"dtype": "int32"}, TypeError, "dtype is 'int32'; weight and bias must be one of float16, bfloat16"),
        ({"dtype": np.complex64}, TypeError, "weight and bias must be one of"),
        ({"like": [1.0]}, TypeError, "target is a list"),
        ({"like": "tensorflow"}, ValueError, "backend 'tensorflow' is not known; known are numpy, array_api_strict"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        anybn.BatchNormState(**{"num_features": 3, **settings})


def test_settings_from_numpy_scalars():
    state = anybn.BatchNormState(
        np.int64(3), eps=np.float32(0.5), momentum=np.float64(1), ddof=np.int8(0), affine=np.True_
    )
    assert (state.num_features, state.eps, state.momentum, state.ddof, state.affine) == (3, 0.5, 1.0, 0, True)
    assert type(state.eps) is float


def test_what_is_switched_off_stays_off():
    state = anybn.BatchNormState(3, affine=False, track_running_stats=False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(state, name) is None
        with pytest.raises(ValueError, match=f"{name} cannot be set, this state has .*=False: make one with"):
            setattr(state, name, np.ones(3))


@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_a_weight_or_a_bias_alone(absent):
    options = {"scale": False} if absent == "weight" else {"bias": False}
    state, (option,) = trained(**options), options
    present = {"weight": "bias", "bias": "weight"}[absent]
    assert getattr(state, absent) is None
    assert getattr(state, present).shape == (3,)
    assert state.affine
    assert repr(state) == f"BatchNormState(3, eps=1e-05, momentum=0.1, {option}=False) on numpy, 2 batches tracked"
    with pytest.raises(ValueError, match=f"{absent} cannot be set, this state has {option}=False: make one with"):
        setattr(state, absent, np.ones(3))
    saved = state.state_dict()
    assert absent not in saved
    assert present in saved
    twin = anybn.BatchNormState(3, **options)
    twin.load_state_dict(saved)
    assert inputs.state_values(twin) == inputs.state_values(state)
    with pytest.raises(anybn.CheckpointError, match=f"extra key '{absent}'"):
        twin.load_state_dict(anybn.BatchNormState(3).state_dict())
    with pytest.raises(anybn.CheckpointError, match=f"missing key '{absent}'"):
        anybn.BatchNormState(3).load_state_dict(saved)


def test_neither_weight_nor_bias_is_not_affine():
    state = anybn.BatchNormState(3, scale=False, bias=False)
    assert not state.affine
    assert repr(state) == repr(anybn.BatchNormState(3, affine=False))


def test_conventions_of_a_weight_or_a_bias_alone():
    """Left out where the framework can; where it cannot, the constant that changes nothing."""
    state = anybn.BatchNormState(3, scale=False, dtype="float64")
    state.bias = np.array([1.0, -2.0, 3.0])
    assert list(state.state_dict("keras")) == ["beta", "moving_mean", "moving_variance"]
    assert np.array_equal(state.state_dict("onnx")["scale"], np.ones(3))
    for convention in ("keras", "onnx", "mlx"):
        twin = anybn.BatchNormState(3, scale=False, dtype="float64")
        twin.load_state_dict(state.state_dict(convention), convention)
        assert inputs.state_values(twin) == inputs.state_values(state)
    with pytest.raises(anybn.CheckpointError, match="weight is not 1, but the state has scale=False"):
        twin.load_state_dict(state.state_dict("onnx") | {"scale": np.array([1.0, 1.0, 2.0])}, "onnx")


def test_initial_values_and_dtypes():
    state = anybn.BatchNormState(2, dtype=np.float16)
    for name, value, dtype in (
        ("weight", 1, "float16"),
        ("bias", 0, "float16"),
        ("running_mean", 0, "float64"),
        ("running_var", 1, "float64"),
    ):
        array = getattr(state, name)
        assert array.dtype == dtype
        assert np.array_equal(array, [value, value])
    assert anybn.BatchNormState(0).weight.shape == (0,)


def test_arrays_are_replaced_not_written_to():
    state = anybn.BatchNormState(3)
    mean = state.running_mean
    anybn.batch_norm(inputs.normal((9, 3)), state, training=True)
    assert np.array_equal(mean, np.zeros(3))
    saved = state.state_dict()
    saved["weight"][:] = 7
    assert np.array_equal(state.weight, np.ones(3))


@pytest.mark.parametrize(
    "twin_of", [copy.copy, copy.deepcopy, anybn.BatchNormState.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_are_independent(twin_of):
    state = trained(momentum=None, ddof=0)
    twin = twin_of(state)
    before = inputs.state_values(state)
    assert inputs.state_values(twin) == before
    assert repr(twin) == repr(state)
    anybn.batch_norm(inputs.normal((9, 3)), twin, training=True)
    twin.weight[:] = 5
    assert inputs.state_values(state) == before


def test_loading_is_all_or_nothing():
    state = trained()
    before = inputs.state_values(state)
    good = state.state_dict()
    for name, value, message in (
        ("running_var", np.array([1, -1, 1.0]), "running_var is -1.0 in channel 1; it must be finite and not negative"),
        ("running_mean", np.array([0, 0, np.inf]), "running_mean is inf in channel 2; it must be finite"),
        ("weight", np.ones(4), r"weight has shape \(4,\)"),
        ("bias", [0.0, 0.0, 0.0], "bias is a list"),
        ("num_batches_tracked", np.array(-1), "num_batches_tracked is -1"),
        ("num_batches_tracked", np.array([1.5]), "it must be one integer"),
    ):
        with pytest.raises(anybn.CheckpointError, match=f"nothing was loaded: .*{message}"):
            state.load_state_dict({**good, name: value})
    with pytest.raises(ValueError, match="convention is 'tensorflow'; it must be one of 'torch'"):
        state.load_state_dict(good, convention="tensorflow")
    assert inputs.state_values(state) == before


# -- files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("safetensors", reason="checkpoints need safetensors: pip install safetensors")
    return tmp_path / "bn.safetensors"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None, "ddof": 0, "eps": 1e-3},
        {"affine": False},
        {"scale": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_files_round_trip(path, options):
    if options.get("dtype") == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    state = trained(**options)
    state.save(path)
    loaded = anybn.BatchNormState.load(str(path))
    assert inputs.state_values(loaded) == inputs.state_values(state)
    assert repr(loaded) == repr(state)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_every_truncation_and_bit_flip_is_seen(path):
    """Each ends in CheckpointError or, where the byte meant nothing (JSON's padding), in the right state."""
    state = trained(eps=1e-3, momentum=None, ddof=0)
    state.save(path)
    whole = path.read_bytes()
    expected = inputs.state_values(state), repr(state)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        for load in (anybn.BatchNormState.load, anybn.load_batch_norms):
            with pytest.raises(anybn.CheckpointError):
                load(path)
    wrong = 0
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        for load in (anybn.BatchNormState.load, lambda path: anybn.load_batch_norms(path)[""]):
            try:
                loaded = load(path)
            except anybn.CheckpointError:
                wrong += 1
            else:
                assert (inputs.state_values(loaded), repr(loaded)) == expected
    assert wrong > 0.9 * 16 * len(whole)


def test_files_whose_header_looks_like_a_pickle(path):
    """A safetensors file starts with the length of its header, and some lengths start as pickles do."""
    starts = set()
    for digits in range(130):
        state = anybn.BatchNormState(
            10, eps=float(f"0.{'1' * (1 + digits % 15)}"), momentum=float(f"0.{'1' * (1 + digits // 10)}")
        )
        state.save(path)
        starts.add(path.read_bytes()[:1])
        assert inputs.state_values(anybn.BatchNormState.load(path)) == inputs.state_values(state)
    assert b"\x80" in starts


def test_file_modes_and_links(path):
    state = trained()
    state.save(path)
    mode = path.parent / "plain"
    mode.touch()
    assert path.stat().st_mode == mode.stat().st_mode
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path)
    state.save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_could_not_be_loaded_is_not_saved(path):
    x = inputs.normal((9, 3))
    x[0, 1] = np.nan
    state = trained()
    anybn.batch_norm(x, state, training=True, nonfinite="propagate")
    with pytest.raises(
        anybn.CheckpointError, match="nothing was saved, since load would refuse it: running_mean is nan"
    ):
        state.save(path)
    assert not path.exists()


def test_misspelt_settings_are_errors():
    """torch's idiom bn.momentum = 0.01 must not pass unnoticed."""
    for thing, name in ((anybn.BatchNorm(3), "momentum"), (anybn.BatchNormState(3), "runing_mean")):
        with pytest.raises(AttributeError):
            setattr(thing, name, 0.01)


def test_running_statistics_in_numpy_are_read_only():
    state = trained()
    with pytest.raises(ValueError, match="read-only"):
        state.running_var -= 5
    assert np.all(state.running_var > 0)


def test_foreign_files_are_refused(path):
    import safetensors.numpy

    safetensors.numpy.save_file({"weight": np.ones(3)}, path)
    with pytest.raises(anybn.CheckpointError, match=r"was not written by BatchNormState.save: read its arrays"):
        anybn.BatchNormState.load(path)
    np.savez(path.with_suffix(".npz"), weight=np.ones(3))
    path.with_suffix(".pkl").write_bytes(pickle.dumps({"weight": 1}))
    for suffix in (".npz", ".pkl"):
        with pytest.raises(
            anybn.CheckpointError, match=r"is a pickle or a zip .* torch.load\(path, weights_only=True\)"
        ):
            anybn.BatchNormState.load(path.with_suffix(suffix))
    with pytest.raises(FileNotFoundError):
        anybn.BatchNormState.load(path.with_name("absent"))


def test_newer_files_are_refused(path, monkeypatch):
    monkeypatch.setattr(files, "_VERSION", 2)
    trained().save(path)
    monkeypatch.undo()
    with pytest.raises(anybn.CheckpointError, match="has version '2', this anybn reads 1: upgrade anybn"):
        anybn.BatchNormState.load(path)


def test_a_failed_save_keeps_the_old_file(path, monkeypatch):
    state = trained()
    state.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        anybn.BatchNormState(3).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
