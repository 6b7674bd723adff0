"""load_batch_norms: whole models, from arrays and from files, whole and damaged."""

import os
import pickle
import subprocess
import sys
import zipfile

import frameworks
import numpy as np
import pytest

import anybn
from anybn import interop
from anybn.conformance import inputs

# Evaluation depends on eps, which arrays do not tell: test_settings.py has what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not tell e:UserWarning")


def weights(**layers):
    """Two batch norms, one of them unaffine, among what is none; names as torch has them."""
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "conv.bias": np.zeros(4, np.float32),
        "layer1.0.bn1.weight": np.array([1, 2, 3, 4], np.float32),
        "layer1.0.bn1.bias": np.array([5, 6, 7, 8], np.float32),
        "layer1.0.bn1.running_mean": np.array([0.5, 0, -1, 2], np.float32),
        "layer1.0.bn1.running_var": np.array([1, 4, 9, 0], np.float32),
        "layer1.0.bn1.num_batches_tracked": np.array(12),
        "groupnorm.weight": np.ones(4, np.float32),
        "groupnorm.bias": np.ones(4, np.float32),
        "bn2.running_mean": np.array([1, 2], np.float32),
        "bn2.running_var": np.array([3, 4], np.float32),
        "bn2.num_batches_tracked": np.array(3),
        "epoch": np.array(7),
    }


def assert_those(states, bn1="layer1.0.bn1", bn2="bn2"):
    assert sorted(states) == sorted([bn1, bn2])  # safetensors sorts
    given = weights()
    for name in ("weight", "bias", "running_mean", "running_var"):
        array = getattr(states[bn1], name)
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, given[f"layer1.0.bn1.{name}"])
    assert (states[bn1].dtype, states[bn1].num_batches_tracked) == ("float32", 12)
    assert (states[bn2].affine, states[bn2].num_batches_tracked) == (False, 3)
    assert np.array_equal(states[bn2].running_mean, [1, 2])


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy", reason="safetensors: not installed").save_file(arrays, path)
    elif path.suffix == ".pt":
        torch = pytest.importorskip("torch", reason="torch: not installed")
        torch.save({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}, path)
    else:
        pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx").save(onnx_model(arrays), path)


def onnx_model(arrays, opset=15, **attributes):
    from onnx import TensorProto, helper, numpy_helper

    ones = {"ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}
    constants = [numpy_helper.from_array(np.asarray(a), name) for name, a in {**arrays, **ones}.items()]
    constants = [c for c in constants if c.name != "bn2.running_mean"]
    names = ("weight", "bias", "running_mean", "running_var")
    nodes = [
        helper.make_node("BatchNormalization", ["x", *(f"layer1.0.bn1.{n}" for n in names)], ["y"], **attributes),
        helper.make_node("Constant", [], ["mean"], value=numpy_helper.from_array(arrays["bn2.running_mean"], "m")),
        helper.make_node("Identity", ["mean"], ["bn2.running_mean"]),
        helper.make_node(
            "BatchNormalization", ["x2", "ones", "zeros", "bn2.running_mean", "bn2.running_var"], ["y2"], epsilon=1e-3
        ),
    ]
    x, x2, y, y2 = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (5, 2 if "2" in n else 4)) for n in ("x", "x2", "y", "y2")
    )
    graph = helper.make_graph(nodes, "g", [x, x2], [y, y2], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


# -- arrays ----------------------------------------------------------------------------------------------------


def test_a_mapping():
    assert_those(anybn.load_batch_norms(weights()))
    assert_those(anybn.load_batch_norms({"state_dict": weights()}), "state_dict/layer1.0.bn1", "state_dict/bn2")
    assert anybn.load_batch_norms(weights())["bn2"].eps == 1e-5
    states = anybn.load_batch_norms(weights(), eps=1e-3, momentum=0.25)
    assert {(s.eps, s.momentum, s.ddof) for s in states.values()} == {(1e-3, 0.25, 1)}


def test_arrays_without_any_batch_norm():
    with pytest.raises(anybn.CheckpointError, match="the mapping has no batch norm: it holds no arrays"):
        anybn.load_batch_norms({})
    with pytest.raises(
        anybn.CheckpointError,
        match=r"none of its 3 names \('a\.weight', 'a\.bias', 'text'\) is that of a running mean or variance; 1 layers "
        "have a weight and a bias, into which exporters fold batch norms",
    ):
        anybn.load_batch_norms({"a.weight": np.ones(3), "a.bias": np.ones(3), "text": "running_mean"})


@pytest.mark.parametrize(
    "convention", ["torch", "keras", "flax", "haiku", "chainer", "equinox", "equinox-ema", "mxnet"]
)
@pytest.mark.parametrize("layer", ["", "net/bn_1/", "net.0.bn."])
def test_each_conventions_names_are_recognized(convention, layer):
    start = frameworks.start(convention)
    arrays = {f"{layer}{name}": a for name, a in start.state_dict(convention).items()}
    arrays |= {"net/norm/scale": np.ones(3), "net/norm/weight": np.ones(3), "net/norm/gamma": np.ones(3)}
    rules = interop.CONVENTIONS[convention]
    ((name, state),) = anybn.load_batch_norms(
        arrays, **{rules.momentum[0]: start.momentum if not rules.decay else 0.75}
    ).items()
    assert name == layer[:-1]
    assert state.ddof == rules.ddof
    assert state.eps == rules.eps[1]
    state.num_batches_tracked = 0
    assert inputs.state_values(state) == inputs.state_values(start)


def test_names_with_collections():
    start = frameworks.start("flax")
    weight, bias, mean, var = (getattr(start, n) for n in ("weight", "bias", "running_mean", "running_var"))
    for arrays, layer in (
        ({"params": {"bn": {"scale": weight, "bias": bias}}, "batch_stats": {"bn": {"mean": mean, "var": var}}}, "bn"),
        (
            {"arg:bn0_gamma": weight, "arg:bn0_beta": bias, "aux:bn0_moving_mean": mean, "aux:bn0_moving_var": var},
            "bn0",
        ),
        ({"b/gamma:0": weight, "b/beta:0": bias, "b/moving_mean:0": mean, "b/moving_variance:0": var}, "b"),
        (
            {
                "params": {"net/~/bn": {"scale": weight[None], "offset": bias[None]}},
                "state": {
                    "net/~/bn/~/mean_ema": {"average": mean[None], "hidden": mean[None], "counter": np.int32(5)},
                    "net/~/bn/~/var_ema": {"average": var[None], "hidden": var[None], "counter": np.int32(5)},
                },
            },
            "net/~/bn",
        ),
        (
            {
                "trainable_variables": {"bn": {"gamma": weight, "beta": bias}},
                "non_trainable_variables": {"bn": {"moving_mean": mean, "moving_variance": var}},
                "optimizer_variables": {"adam": {"bn_gamma_momentum": weight}},
            },
            "bn",
        ),
    ):
        states = anybn.load_batch_norms(arrays)
        assert list(states) == [layer]
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(getattr(states[layer], name), getattr(start, name))


def test_words_that_anybody_uses():
    with pytest.raises(anybn.CheckpointError, match="has no batch norm: none of its 2 names"):
        anybn.load_batch_norms({"prior": {"mean": np.zeros(3)}, "noise": {"var": np.ones(3)}})
    with pytest.raises(anybn.CheckpointError, match="layer 'bn': missing key 'var'"):
        anybn.load_batch_norms({"batch_stats": {"bn": {"mean": np.zeros(3)}}})
    with pytest.raises(anybn.CheckpointError, match="layer 'bn': missing key 'var'"):
        anybn.load_batch_norms({"bn": {"mean": np.zeros(3), "scale": np.zeros(3)}})


def test_fixed_gamma_is_for_the_user_to_know():
    start = frameworks.start("mxnet")
    arrays = {"bn_gamma": start.weight, "bn_beta": start.bias, "bn_moving_mean": start.running_mean}
    arrays["bn_moving_var"] = start.running_var
    assert np.array_equal(anybn.load_batch_norms(arrays)["bn"].weight, start.weight)
    fixed = anybn.load_batch_norms(arrays, convention="mxnet-fix-gamma")["bn"]
    assert np.array_equal(fixed.weight, [1, 1, 1])
    assert fixed.eps == 1e-3
    with pytest.raises(anybn.CheckpointError, match="has no batch norm: none of its 4 names"):
        anybn.load_batch_norms(arrays, convention="torch")


def test_every_layer_that_cannot_be_loaded_is_named():
    arrays = weights() | {"bn2.running_var": np.array([1, -1], np.float32), "params/bn3/mean": np.zeros(2)}
    arrays |= {"bn3/var": np.ones(2), "bn3/mean": np.ones(2), "bn4.running_mean": np.zeros(2)}
    arrays |= {"bn5.running_var": np.ones(2), "bn6.running_mean": np.ones(2), "bn6.running_var": np.ones(3)}
    arrays["layer1.0.bn1.bias"] = np.ones(3, np.float32)
    with pytest.raises(anybn.CheckpointError) as error:
        anybn.load_batch_norms(arrays)
    text = str(error.value)
    for problem in (
        "nothing was loaded: layer 'layer1.0.bn1': bias has shape (3,); the state has 4 channels: it must be (4,)",
        "; layer 'bn2': running_var is -1.0 in channel 1; it must be finite and not negative",
        "; layer 'bn3': 'params/bn3/mean' and 'bn3/mean' are both its mean",
        "; layer 'bn4': missing key 'running_var'",
        "; layer 'bn5': missing key 'running_mean'",
        "; layer 'bn6': running_var has shape (3,); the state has 2 channels: it must be (2,)",
    ):
        assert problem in text


def test_wrong_calls(tmp_path):
    with pytest.raises(TypeError, match=r"source is a list; it must be a model of torch, .* a path or a mapping"):
        anybn.load_batch_norms([np.ones(3)])
    with pytest.raises(ValueError, match="convention is 'caffe'; it must be one of 'torch', "):
        anybn.load_batch_norms({}, convention="caffe")
    with pytest.raises(TypeError, match="'epsilon' is no setting of this convention: it has 'eps' and 'momentum'"):
        anybn.load_batch_norms(weights(), epsilon=1e-3)
    with pytest.raises(ValueError, match=r"model\.pb is none of \.keras, \.h5, \.onnx, .*pass the model"):
        anybn.load_batch_norms(tmp_path / "model.pb")
    with pytest.raises(FileNotFoundError):
        anybn.load_batch_norms(str(tmp_path / "model.npz"))


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".onnx"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write(path, weights())
    states = anybn.load_batch_norms(str(path))
    if suffix == ".onnx":
        assert states["bn2"].eps == 1e-3
        assert np.array_equal(states["bn2"].weight, [1, 1])
        states["bn2"] = anybn.load_batch_norms({n: a for n, a in weights().items() if n.startswith("bn2")})["bn2"]
        assert states["layer1.0.bn1"].num_batches_tracked == 0
        states["layer1.0.bn1"].num_batches_tracked = 12
        assert anybn.load_batch_norms(path, epsilon=0.5)["bn2"].eps == 0.5
    else:
        assert {s.eps for s in anybn.load_batch_norms(path, eps=0.5).values()} == {0.5}
    assert_those(states)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".onnx"])
def test_truncated_files(tmp_path, suffix):
    """Wherever a file ends too early. Only ONNX has something behind all of its arrays that can be done without."""
    path = tmp_path / f"model{suffix}"
    arrays = {name: a for name, a in weights().items() if "conv" not in name}
    write(path, arrays)
    whole = path.read_bytes()
    expected = {name: inputs.state_values(state) for name, state in anybn.load_batch_norms(path).items()}
    sizes = range(0, len(whole), 1 + len(whole) // 400)
    refused = 0
    for size in sizes:
        path.write_bytes(whole[:size])
        try:
            states = anybn.load_batch_norms(path)
        except anybn.CheckpointError as error:
            assert str(error).startswith("nothing was loaded: ")  # noqa: PT017 one of two right endings
            refused += 1
        else:
            assert suffix == ".onnx"
            assert {name: inputs.state_values(state) for name, state in states.items()} == expected
    assert refused >= 0.95 * len(sizes)


def test_flipped_bits_in_an_npz_are_seen(tmp_path):
    """By the checksums of the zip; a flip in its padding or in an array that is not needed changes nothing."""
    path = tmp_path / "model.npz"
    np.savez(path, **{n: a for n, a in weights().items() if n.startswith("bn2") and "num" not in n})
    whole = path.read_bytes()
    expected = inputs.state_values(anybn.load_batch_norms(path)["bn2"])
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            states = anybn.load_batch_norms(path)
        except anybn.CheckpointError:
            refused += 1
        else:
            assert [inputs.state_values(state) for state in states.values()] in ([expected], [])
    assert refused > len(whole) // 2


def test_files_of_another_kind(tmp_path):
    for suffix in (".safetensors", ".npz", ".pt", ".onnx"):
        if suffix == ".onnx":
            pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx")
        path = tmp_path / f"model{suffix}"
        for content in (b"", b"hello", pickle.dumps({"bn.running_mean": np.zeros(2)}), b"\x00" * 100):
            path.write_bytes(content)
            with pytest.raises(anybn.CheckpointError, match=r"nothing was loaded: .*model\.\w+ "):
                anybn.load_batch_norms(path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("model.npz", trap=np.array([Trap()], dtype=object), **weights())
    assert_those(anybn.load_batch_norms("model.npz"))  # it is not even looked at
    np.savez("model.npz", **weights() | {"bn2.running_mean": np.array([Trap(), 1], dtype=object)})
    with pytest.raises(anybn.CheckpointError, match="Object arrays cannot be loaded"):
        anybn.load_batch_norms("model.npz")
    torch = pytest.importorskip("torch", reason="torch: not installed")
    torch.save({"bn2.running_mean": Trap()}, "model.pt")
    with pytest.raises(anybn.CheckpointError, match=r"holds more than arrays.* save model\.state_dict\(\) instead"):
        anybn.load_batch_norms("model.pt")
    assert not os.path.exists("sprung")  # noqa: PTH110
    np.load("model.npz", allow_pickle=True)["bn2.running_mean"]
    assert os.path.exists("sprung")  # noqa: PTH110 the trap works


def test_a_file_of_our_own_keeps_its_settings(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors: not installed")
    state = anybn.BatchNormState(3, eps=0.5, momentum=None, ddof=0, affine=False)
    anybn.batch_norm(inputs.normal((9, 3)), state, training=True)
    path = tmp_path / "bn.safetensors"
    state.save(path)
    loaded = anybn.load_batch_norms(path)
    assert list(loaded) == [""]
    assert repr(loaded[""]) == repr(state)
    assert inputs.state_values(loaded[""]) == inputs.state_values(state)
    with pytest.raises(TypeError, match=r"eps given, but .* is a file of BatchNormState\.save, which tells them"):
        anybn.load_batch_norms(path, eps=1e-3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(anybn.CheckpointError):
        anybn.load_batch_norms(path)


def test_bfloat16(tmp_path):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes").bfloat16
    path = tmp_path / "model.safetensors"
    write(path, {n: a.astype(bfloat16) if a.dtype == np.float32 else a for n, a in weights().items()})
    states = anybn.load_batch_norms(path)
    assert states["layer1.0.bn1"].dtype == "bfloat16"
    assert np.array_equal(states["layer1.0.bn1"].running_mean, [0.5, 0, -1, 2])


def test_bfloat16_in_a_process_that_has_not_met_it(tmp_path, monkeypatch):
    """NumPy knows bfloat16 once ml_dtypes is imported, which reading a file does itself."""
    pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    path = tmp_path / "bn.safetensors"
    state = anybn.BatchNormState(2, dtype="bfloat16")
    state.load_state_dict(state.state_dict() | {"running_mean": np.array([0.1, -3.0])})
    state.save(path)
    for call in ("BatchNormState.load(sys.argv[1])", "load_batch_norms(sys.argv[1])['']"):
        code = f"import sys, anybn; s = anybn.{call}; print(s.dtype, *s.running_mean, *s.weight)"
        run = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
        assert run.stdout.split() == ["bfloat16", "0.1", "-3.0", "1", "1"]
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for load in (anybn.BatchNormState.load, anybn.load_batch_norms):
        with pytest.raises(anybn.BackendNotInstalled, match="pip install ml_dtypes"):
            load(path)


def test_no_framework_is_imported(tmp_path):
    for suffix in (".safetensors", ".npz"):
        write(tmp_path / f"model{suffix}", weights())
    code = (
        "import sys, anybn\n"
        "for path in sys.argv[1:]: assert len(anybn.load_batch_norms(path)) == 2\n"
        "print(*{'torch', 'jax', 'flax', 'keras', 'tensorflow', 'onnx', 'mlx'} & sys.modules.keys())"
    )
    files = [str(tmp_path / f"model{suffix}") for suffix in (".safetensors", ".npz")]
    run = subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    for library, suffix in (("torch", ".pt"), ("onnx", ".onnx"), ("safetensors.numpy", ".safetensors")):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"x")
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(anybn.BackendNotInstalled, match=f"pip install {library.partition('.')[0]}"):
            anybn.load_batch_norms(path)


# -- models of the frameworks themselves -----------------------------------------------------------------------


def test_a_torch_model_and_its_files(torch, tmp_path):
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)),
    )
    model(torch.randn(8, 3, 9, 9))
    model.eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model.pt")
    states = anybn.load_batch_norms(tmp_path / "model.pt")
    assert list(states) == ["state_dict.1", "state_dict.3.0"]
    x = torch.randn(2, 4, 5, 5)
    for name, state in states.items():
        y = model.get_submodule(name.removeprefix("state_dict."))(x)
        assert np.abs(anybn.batch_norm(x.numpy(), state) - y.detach().numpy()).max() <= 4 * 2**-23 * y.abs().max()


def test_onnx_and_its_runtime(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime: not installed, pip install onnxruntime")
    model = onnx_model(weights(), epsilon=0.25)
    onnx.checker.check_model(model)
    x, x2 = inputs.normal((5, 4)).astype(np.float32), inputs.normal((5, 2), 1).astype(np.float32)
    theirs = runtime.InferenceSession(model.SerializeToString()).run(["y", "y2"], {"x": x, "x2": x2})
    ours = dict(zip(("layer1.0.bn1", "bn2"), theirs, strict=True))
    states = _states_of(tmp_path / "model.onnx", model)
    for x_, (name, y) in zip((x, x2), ours.items(), strict=True):
        assert np.abs(anybn.batch_norm(x_, states[name]) - y).max() <= 4 * 2**-23 * np.abs(y).max()


def _states_of(path, model):
    path.write_bytes(model.SerializeToString())
    return anybn.load_batch_norms(path)


def test_onnx_that_is_no_constant_batch_norm(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx")
    path = tmp_path / "model.onnx"
    model = onnx_model(weights())
    del model.graph.initializer[2:4]  # layer1.0.bn1.weight, bias
    with pytest.raises(
        anybn.CheckpointError, match=r"'layer1\.0\.bn1': missing key 'scale'; .*; its scale is 'layer1\.0\.bn1\.w"
    ):
        _states_of(path, model)
    with pytest.raises(anybn.CheckpointError, match="it has spatial=0"):
        _states_of(path, onnx_model(weights(), opset=8, spatial=0))
    model = onnx_model(weights())
    model.graph.node.append(model.graph.node[0])
    with pytest.raises(anybn.CheckpointError, match="another one has this name"):
        _states_of(path, model)
    with pytest.raises(anybn.CheckpointError, match="it has no graph"):
        _states_of(path, onnx.ModelProto(ir_version=10))


@pytest.mark.filterwarnings("ignore")
def test_models_of_flax():
    pytest.importorskip("flax", reason="flax: not installed, pip install flax")
    import jax
    from flax import linen, nnx

    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    )
    x = inputs.normal((6, 3)).astype(np.float32)
    model(x)
    for tree in (nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
        ((name, state),) = anybn.load_batch_norms(tree).items()
        assert name == "layers/1"
        assert np.array_equal(state.running_mean, model.layers[1].mean[...])

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True, use_bias=False)(linen.Dense(4)(x))
            return linen.LayerNorm()(linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)(x))

    states = anybn.load_batch_norms(Block().init(jax.random.key(0), x))
    assert {name: state.affine for name, state in states.items()} == {"BatchNorm_0": True, "BatchNorm_1": False}


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras: not installed, pip install keras")
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), layers.Dense(4), layers.BatchNormalization(scale=False)]
    )
    model.compile(optimizer="adam", loss="mse")
    for source in ({w.path: w for w in model.weights}, model.get_state_tree()):
        states = anybn.load_batch_norms(source)
        assert [state.num_features for state in states.values()] == [3, 4]
        for (name, state), layer in zip(states.items(), (model.layers[0], model.layers[2]), strict=True):
            assert name.endswith(layer.name)
            assert np.array_equal(state.bias, layer.beta)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_mlx_and_its_files(tmp_path):
    pytest.importorskip("mlx.core", reason="mlx: not installed, pip install mlx")
    from mlx import nn
    from mlx.utils import tree_flatten

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4), nn.LayerNorm(4))
    files = tmp_path / "model.npz", tmp_path / "model.safetensors"
    for path in files:
        model.save_weights(str(path))
    for source in (*files, dict(tree_flatten(model.parameters()))):
        ((name, state),) = anybn.load_batch_norms(source).items()
        assert (name, state.num_features) == ("layers.1", 4)


def test_npz_with_its_members_compressed(tmp_path):
    np.savez_compressed(tmp_path / "model.npz", **weights())
    assert zipfile.is_zipfile(tmp_path / "model.npz")
    assert_those(anybn.load_batch_norms(tmp_path / "model.npz"))
