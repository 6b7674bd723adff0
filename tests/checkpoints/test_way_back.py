"""save_batch_norms into files: a copy with other values, everything else as it was; and new files."""

import hashlib
import zipfile

import numpy as np
import pytest
from checkpoints.models import MODELS, C, fill
from checkpoints.test_models import weights, write

import anybn
from anybn.conformance import inputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(keras|absl|h5py)", "ignore:::(keras|jax)")
SUFFIXES = [".safetensors", ".npz", ".pt"]


def trained(states):
    """The same states with other values, which float32 holds."""
    for i, state in enumerate(states.values()):
        x = inputs.normal((9, state.num_features), i).astype(np.float32)
        anybn.batch_norm(x, state, training=True)
        for field in ("running_mean", "running_var"):
            setattr(state, field, getattr(state, field).astype(np.float32).astype(np.float64))
        if state.weight is not None:
            state.weight = state.weight + 1
    return states


def assert_same(states, others):
    assert list(states) == list(others)
    for name, state in states.items():
        assert inputs.state_values(state) == inputs.state_values(others[name])


def everything(path):
    """All arrays of a file, by its own library."""
    if path.suffix == ".safetensors":
        import safetensors.numpy

        return safetensors.numpy.load_file(path)
    if path.suffix == ".npz":
        return dict(np.load(path))
    import torch

    return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_everything_else_stays(tmp_path, suffix, elsewhere):
    path = tmp_path / f"model{suffix}"
    write(path, weights())
    before, digest = everything(path), hashlib.sha256(path.read_bytes()).digest()
    states = trained(anybn.load_batch_norms(path, eps=1e-3))
    target = tmp_path / f"copy{suffix}" if elsewhere else path
    assert anybn.save_batch_norms(target, states, like=path if elsewhere else None) is None
    assert_same(anybn.load_batch_norms(target, eps=1e-3), states)
    after = everything(target)
    assert list(after) == list(before)
    for name, array in before.items():
        assert (after[name].dtype, after[name].shape) == (array.dtype, array.shape)
        if not name.startswith(("layer1.0.bn1", "bn2")):
            assert np.array_equal(after[name], array)
    assert (hashlib.sha256(path.read_bytes()).digest() == digest) is elsewhere
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({path.name, target.name})


@pytest.mark.parametrize("convention", ["torch", "keras", "flax"])
@pytest.mark.parametrize("switched_off", ["scale", "bias"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weight_or_bias_alone(tmp_path, suffix, convention, switched_off):
    state = anybn.BatchNormState(3, **{switched_off: False})
    path = tmp_path / f"model{suffix}"
    anybn.save_batch_norms(path, trained({"bn": state}), convention)
    eps = anybn.interop.CONVENTIONS[convention].eps[0]
    states = anybn.load_batch_norms(path, **{eps: 1e-5})
    assert (states["bn"].weight is None, states["bn"].bias is None) == (switched_off == "scale", switched_off == "bias")
    keys = list(everything(path))
    states["bn"].running_mean = np.array([7.0, 8, 9])
    anybn.save_batch_norms(path, states)
    assert list(everything(path)) == keys
    again = anybn.load_batch_norms(path, **{eps: 1e-5})
    assert_same(again, states)
    missing = {"scale": "weight", "bias": "bias"}[switched_off]
    whole = anybn.BatchNormState(3)
    setattr(whole, missing, np.array([3.0, 1, 2], np.float32))
    with pytest.raises(anybn.CheckpointError, match=f"but the state's {missing} says something"):
        anybn.save_batch_norms(path, {"bn": whole})


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_same_states_make_the_same_bytes(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write(path, weights())
    before = path.read_bytes()
    anybn.save_batch_norms(path, anybn.load_batch_norms(path, eps=1e-3))
    assert path.read_bytes() == before


def test_what_a_torch_file_has_beside_its_arrays_stays(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).half()
    model(torch.randn(4, 2).half())
    path = tmp_path / "model.pt"
    torch.save({"epoch": 7, "net": model.state_dict(), "opt": {"lr": 0.5, "betas": (0.9, 0.99)}}, path)
    states = trained(anybn.load_batch_norms(path, eps=1e-3))
    states["net.1"].num_batches_tracked = 55
    anybn.save_batch_norms(path, states, "torch")
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["opt"]) == (7, {"lr": 0.5, "betas": (0.9, 0.99)})
    assert content["net"]._metadata == model.state_dict()._metadata
    assert content["net"]["1.num_batches_tracked"] == 55
    assert content["net"]["1.running_mean"].dtype == torch.float16
    assert np.array_equal(content["net"]["1.running_mean"], states["net.1"].running_mean.astype(np.float16))
    model.load_state_dict(content["net"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_or_nothing(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"model{suffix}"
    write(path, weights())
    before = path.read_bytes()
    states = trained(anybn.load_batch_norms(path, eps=1e-3))
    for foreign, message in (
        ({"bn3": states["bn2"]}, "there is no layer 'bn3'; .* has '"),
        ({"bn2": anybn.BatchNormState(5)}, r"layer 'bn2': .*running_mean has shape \(2,\) there, but the state has 5"),
    ):
        with pytest.raises(anybn.CheckpointError, match=f"nothing was saved: {message}"):
            anybn.save_batch_norms(path, states | foreign)
    state = anybn.BatchNormState(2, ddof=1)
    state.weight = np.array([2.0, 1.0])
    with pytest.raises(anybn.CheckpointError, match="layer 'bn2': it has no 'weight', but the state's weight says"):
        anybn.save_batch_norms(path, {"bn2": state})
    with pytest.raises(anybn.CheckpointError, match="there is no layer 'bn2'"):
        anybn.save_batch_norms(path, {"bn2": states["bn2"]}, "keras")
    monkeypatch.setattr("pathlib.Path.replace", _full_disk)
    with pytest.raises(OSError, match="full"):
        anybn.save_batch_norms(path, states)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _full_disk(*_):
    raise OSError("full")


def test_values_too_wide_for_the_file(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **{f"bn.{n}": a.astype(np.float16) for n, a in weights().items() if n.startswith("bn2.run")})
    arrays = {name.replace("bn.bn2", "bn"): a for name, a in np.load(path).items()}
    np.savez(path, **arrays)
    states = anybn.load_batch_norms(path, eps=1e-3)
    states["bn"].running_var = np.array([1e5, 1.0])
    with pytest.raises(anybn.CheckpointError, match="running_var is float16 there, which is too narrow"):
        anybn.save_batch_norms(path, states)


def test_new_files(tmp_path):
    state = anybn.BatchNormState(3, momentum=0.25)
    anybn.batch_norm(inputs.normal((9, 3)).astype(np.float32), state, training=True)
    for suffix in SUFFIXES:
        for convention in ("torch", "keras", "flax", "chainer"):
            path = tmp_path / f"{convention}{suffix}"
            anybn.save_batch_norms(path, {"a/bn": state}, convention)
            rules = anybn.interop.CONVENTIONS[convention]
            loaded = anybn.load_batch_norms(path, **{rules.eps[0]: 1e-5})
            (name,) = loaded
            assert name.replace(".", "/") == "a/bn"
            back = loaded[name]
            assert np.array_equal(back.running_mean, state.running_mean)
            assert np.array_equal(back.weight, state.weight)
    with pytest.raises(ValueError, match="a new file needs convention="):
        anybn.save_batch_norms(tmp_path / "new.npz", {"bn": state})
    with pytest.raises(ValueError, match=r"name it one of \.safetensors, \.npz, \.pt, \.pth"):
        anybn.save_batch_norms(tmp_path / "new.onnx", {"bn": state}, "onnx")


def test_wrong_calls(tmp_path):
    state = anybn.BatchNormState(3)
    state.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"is a file of BatchNormState\.save: use state\.save"):
        anybn.save_batch_norms(tmp_path / "own.safetensors", {"": state})
    with pytest.raises(ValueError, match=r"which is of another kind: name it \.safetensors"):
        anybn.save_batch_norms(tmp_path / "x.npz", {"": state}, like=tmp_path / "own.safetensors")
    with pytest.raises(TypeError, match="states is a BatchNormState; it must be a mapping"):
        anybn.save_batch_norms({}, state)
    with pytest.raises(TypeError, match="target is a int; it must be a model of torch, Keras"):
        anybn.save_batch_norms(3, {"bn": state})
    with pytest.raises(anybn.CheckpointError, match=r"no layer 'bn'; the mapping has no batch norm$"):
        anybn.save_batch_norms({}, {"bn": state})
    with pytest.raises(TypeError, match=r"states\['bn'\] is a dict; it must be a BatchNormState"):
        anybn.save_batch_norms({}, {"bn": {}})


def test_arrays_in_a_tree_are_replaced_in_a_copy():
    jnp = pytest.importorskip("jax.numpy", reason="jax: not installed")
    tree = {
        "params": {"net": {"bn": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}, "dense": {"kernel": jnp.ones((2, 2))}}},
        "batch_stats": {"net": {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}},
    }
    states = trained(anybn.load_batch_norms(tree, epsilon=1e-3))
    new = anybn.save_batch_norms(tree, states, "flax")
    assert np.array_equal(new["batch_stats"]["net"]["bn"]["mean"], states["net/bn"].running_mean)
    assert isinstance(new["batch_stats"]["net"]["bn"]["mean"], type(jnp.ones(2)))
    assert new["params"]["net"]["dense"] is not tree["params"]["net"]["dense"]
    assert new["params"]["net"]["dense"]["kernel"] is tree["params"]["net"]["dense"]["kernel"]
    assert not tree["batch_stats"]["net"]["bn"]["mean"].any()


def test_haiku_gets_its_rank_and_its_hidden_averages():
    start = anybn.BatchNormState(2, momentum=0.1).state_dict("haiku")
    tree = {f"bn/{name}": a if "counter" in name else a[None, None] for name, a in start.items()}
    states = trained(anybn.load_batch_norms(tree, eps=1e-3, decay_rate=0.9))
    new = anybn.save_batch_norms(tree, states)
    assert {name: a.shape for name, a in new.items()} == {name: np.shape(a) for name, a in tree.items()}
    again = anybn.load_batch_norms(new, eps=1e-3, decay_rate=0.9)["bn"]
    assert np.allclose(again.running_mean, states["bn"].running_mean, rtol=1e-6)


# -- Keras's files ---------------------------------------------------------------------------------------------


@pytest.fixture
def keras_files(tmp_path):
    pytest.importorskip("h5py", reason="h5py: not installed, pip install h5py")
    example = MODELS["keras"]()
    for name in ("model.keras", "model.h5"):
        example.source.save(tmp_path / name)
    example.source.save_weights(tmp_path / "model.weights.h5")
    return example, tmp_path


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
def test_a_file_of_keras_and_back(keras_files, name):
    import keras

    example, folder = keras_files
    told = name != "model.weights.h5"
    given = {} if told else {"epsilon": {n: eps for n, (eps, *_) in example.settings.items()}}
    given |= {} if told else {"momentum": {n: 1 - m for n, (_, m, _) in example.settings.items()}}
    found = anybn.load_batch_norms(folder / name, **given)
    assert {n: (s.eps, round(s.momentum, 9), found.axes[n]) for n, s in found.items()} == example.settings
    live = anybn.load_batch_norms(example.source)
    found = {n: found[n] for n in sorted(found, key=[*live].index)} if not told else found
    assert_same(found, live)
    for state in found.values():
        fill(lambda field, values, s=state: setattr(s, field, values))
        state.eps = 0.125 if told else state.eps
    anybn.save_batch_norms(folder / f"copy.{name.partition('.')[2]}", found, like=folder / name)
    if told:
        model = keras.models.load_model(folder / f"copy.{name.partition('.')[2]}")
        assert {layer.epsilon for layer in _batch_norms(keras, model)} == {0.125}
    else:
        model = example.source
        model.load_weights(folder / f"copy.{name.partition('.')[2]}")
    again = anybn.load_batch_norms(model)
    assert_same(again, found)
    if name == "model.keras":
        with zipfile.ZipFile(folder / name) as old, zipfile.ZipFile(folder / "copy.keras") as new:
            assert old.read("metadata.json") == new.read("metadata.json")
    x = np.random.default_rng(0).normal(size=(2, 3, 3, C)).astype(np.float32)
    for layer, state in found.items():
        y = anybn.batch_norm(x, state, axis=-1)
        assert np.abs(example.evaluate(model, layer, x) - y).max() <= 20 * 2**-23 * np.abs(y).max()


def _batch_norms(keras, model):
    return [m for m in model._flatten_layers() if isinstance(m, keras.layers.BatchNormalization)]


def test_renorm_goes_back_whole():
    keras = pytest.importorskip("keras", reason="keras: not installed, pip install keras")
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(renorm=True, name="bn")])
    states = anybn.load_batch_norms(model)
    states["bn"].running_mean, states["bn"].running_var = np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
    anybn.save_batch_norms(model, states)
    layer = model.layers[0]
    spread = np.sqrt(np.array([4.0, 5, 6]) + 1e-3)
    for variable in (layer.moving_stddev, layer.renorm_stddev):
        assert np.allclose(np.asarray(variable.value), spread, rtol=1e-6)
    assert np.array_equal(np.asarray(layer.renorm_mean.value), [1, 2, 3])


def test_layers_within_a_class_of_ones_own(tmp_path):
    """Which the file's config does not have, so that eps is assumed, and said to be."""
    keras = pytest.importorskip("keras", reason="keras: not installed, pip install keras")
    pytest.importorskip("h5py", reason="h5py: not installed, pip install h5py")

    class Block(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.norm = keras.layers.BatchNormalization(epsilon=0.5)
            self.others = [keras.layers.BatchNormalization(scale=False, center=False, name="bare")]
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return self.dense(self.others[0](self.norm(x)))

    model = keras.Sequential([keras.Input((3,)), Block(name="block")])
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="does not tell epsilon: assumed epsilon=0.001, momentum=0.99 for 2 layers"):
        states = anybn.load_batch_norms(tmp_path / "model.keras")
    assert sorted(states) == sorted(anybn.load_batch_norms(model))
    assert [state.affine for state in anybn.load_batch_norms(model).values()].count(False) == 1


def test_hdf5_that_points_elsewhere(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py: not installed, pip install h5py")
    path = tmp_path / "model.weights.h5"
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = np.ones(3)

    def refused(write, message):
        with h5py.File(path, "w") as file:
            group = file.create_group("layers/batch_normalization/vars")
            for i in (1, 2, 3):
                group[str(i)] = np.ones(3)
            write(group)
        with pytest.raises(anybn.CheckpointError, match=message):
            anybn.load_batch_norms(path, epsilon=1e-3)

    def link(group):
        group["0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "a")

    def soft(group):
        group["0"] = h5py.SoftLink("/layers/batch_normalization/vars/1")

    def external(group):
        group.create_dataset("0", (3,), "f4", external=[("/etc/hostname", 0, 12)])

    def virtual(group):
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", (3,))
        group.create_virtual_dataset("0", layout)

    def large(group):
        group.create_dataset("0", (2**40,), "f4", chunks=(2**20,), compression="gzip")

    refused(link, "0 is a link to somewhere else")
    refused(soft, "0 is a link to somewhere else")
    refused(external, "0 lies outside of the file")
    refused(virtual, "0 lies outside of the file")
    refused(large, "more than 16 MiB and 8 times its size")
