"""Files that were made to harm."""

import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import anybn
from anybn.checkpoints import files
from anybn.conformance import inputs

# Evaluation depends on eps, which arrays do not tell: test_settings.py has what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not tell e:UserWarning")
MiB = 2**20
SETTINGS = {"num_features": 3, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True, "ddof": 1}
SETTINGS |= {"dtype": "float32"}


@pytest.fixture
def library():
    return pytest.importorskip("safetensors.numpy", reason="safetensors: not installed")


def arrays(c=3):
    return {
        "weight": np.ones(c, np.float32),
        "bias": np.zeros(c, np.float32),
        "running_mean": np.zeros(c),
        "running_var": np.ones(c),
    }


def forged(path, settings, tensors=None):
    """A file of our own, with the right checksum, and whatever settings."""
    import safetensors.numpy

    tensors = arrays() | {"num_batches_tracked": np.asarray(7)} if tensors is None else tensors
    text = settings if isinstance(settings, str) else json.dumps(settings)
    metadata = {"format": files._FORMAT, "version": "1", "settings": text, "sha256": files._checksum(tensors, text)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return path


def peak_of(call):
    """The most memory of Python and NumPy that a call had at once, and what it raised."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1], None
    except Exception as error:
        return tracemalloc.get_traced_memory()[1], error
    finally:
        tracemalloc.stop()


def growth_of(path):
    """(the growth of a process's memory, in bytes, over load_batch_norms; what came of it): of torch too."""
    if not Path("/proc/self/status").exists():
        pytest.skip("what a process has had of memory is read in /proc")
    code = (
        "import pathlib, re, sys, torch, anybn, anybn.torch\n"
        "most = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "before = most()\n"
        "try: result = len(anybn.load_batch_norms(sys.argv[1]))\n"
        "except Exception as error: result = type(error).__name__\n"
        "print((most() - before) * 1024, result)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    growth, result = run.stdout.split()
    return int(growth), result


# -- our own ---------------------------------------------------------------------------------------------------


def test_a_forged_file_can_be_right(tmp_path, library):
    state = anybn.BatchNormState.load(forged(tmp_path / "bn.safetensors", SETTINGS))
    assert (state.num_features, state.num_batches_tracked, state._settings()) == (
        3,
        7,
        SETTINGS | {"scale": True, "bias": True},
    )


def test_a_file_imports_nothing(tmp_path, library, monkeypatch):
    (tmp_path / "trap.py").write_text("__array_namespace_info__ = None")
    monkeypatch.syspath_prepend(tmp_path)
    path = forged(tmp_path / "bn.safetensors", SETTINGS | {"like": "trap"})
    for load in (anybn.BatchNormState.load, anybn.load_batch_norms):
        with pytest.raises(anybn.CheckpointError, match=r"holds no valid state .*they must be num_features, eps, "):
            load(path)
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        {"num_features": 10**9},
        {"num_features": 10**30},
        {"num_features": "3"},
        {"num_features": -1},
        {"num_features": 2},
        {"eps": float("nan")},
        {"eps": None},
        {"momentum": "0.1"},
        {"momentum": float("inf")},
        {"affine": 1},
        {"affine": False},
        {"scale": False},
        {"scale": 1},
        {"bias": None},
        {"track_running_stats": False},
        {"ddof": [1]},
        {"dtype": None},
        {"dtype": ["float32"]},
        {"dtype": "trap.float32"},
        "[]",
        "3",
        "{}",
        json.dumps(SETTINGS | {"ddof": None}).replace(', "ddof": null', ""),
        '{"num_features": 1' + 5000 * "0" + "}",
        100_000 * "[",
        100_000 * '{"a":',
    ],
    ids=lambda change: str(change)[:60],
)
def test_settings_are_taken_as_what_they_can_be(tmp_path, library, change):
    path = forged(tmp_path / "bn.safetensors", change if isinstance(change, str) else SETTINGS | change)
    peak, error = peak_of(lambda: anybn.BatchNormState.load(path))
    assert isinstance(error, anybn.CheckpointError)
    assert peak < 16 * MiB


@pytest.mark.parametrize("affine", [True, False])
def test_arrays_that_are_not_there_take_no_memory(tmp_path, library, affine):
    """Of a state without arrays num_features may be anything; one that lacks them is refused before it is made."""
    settings = SETTINGS | {"num_features": 10**9, "affine": affine, "track_running_stats": False}
    path = forged(tmp_path / "bn.safetensors", settings, {"num_batches_tracked": np.asarray(0)})
    peak, error = peak_of(lambda: anybn.BatchNormState.load(path))
    assert error is None if not affine else "missing key 'weight'" in str(error)
    assert peak < 16 * MiB


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("count", [-1, 2**63, np.ones(2, int), np.asarray(1.5), None], ids=str)
def test_counts_are_counts(tmp_path, library, tracks, count):
    tensors = arrays() if tracks else {n: a for n, a in arrays().items() if "running" not in n}
    if count is not None:
        tensors["num_batches_tracked"] = np.asarray(count)
    path = forged(tmp_path / "bn.safetensors", SETTINGS | {"track_running_stats": tracks}, tensors)
    with pytest.raises(anybn.CheckpointError, match="num_batches_tracked"):
        anybn.BatchNormState.load(path)


def test_a_count_that_no_file_holds_is_neither_taken_nor_saved(tmp_path, library):
    state = anybn.BatchNormState(3)
    with pytest.raises(anybn.CheckpointError, match=r"num_batches_tracked is 2\*\*63 or more"):
        state.load_state_dict(arrays() | {"num_batches_tracked": 2**63})
    state.num_batches_tracked = 2**63
    with pytest.raises(anybn.CheckpointError, match="nothing was saved: num_batches_tracked is more than int64 holds"):
        state.save(tmp_path / "bn.safetensors")


def test_a_weight_too_wide_for_the_dtype_that_is_told(tmp_path, library):
    tensors = arrays() | {"weight": np.full(3, 1e300), "num_batches_tracked": np.asarray(0)}
    state = anybn.BatchNormState.load(forged(tmp_path / "bn.safetensors", SETTINGS, tensors))
    assert np.isinf(state.weight).all()  # and no warning, which can be an exception


def test_what_load_has_no_use_for_is_not_read(tmp_path, library):
    """A foreign file is told by its first lines."""
    path = tmp_path / "bn.safetensors"
    library.save_file({"conv.weight": np.zeros(32 * MiB, np.uint8)}, path)
    peak, error = peak_of(lambda: anybn.BatchNormState.load(path))
    assert "was not written by BatchNormState.save" in str(error)
    assert peak < MiB


# -- of frameworks ---------------------------------------------------------------------------------------------


def refused(call, match, limit=32 * MiB):
    peak, error = peak_of(call)
    assert isinstance(error, anybn.CheckpointError)
    assert match in str(error)
    assert peak < limit


def test_an_npz_that_inflates(tmp_path):
    path = tmp_path / "model.npz"
    one = np.zeros(48 * MiB // 4, np.float32)
    np.savez_compressed(path, **{"bn.running_mean": one, "bn.running_var": one})
    assert path.stat().st_size < MiB
    refused(lambda: anybn.load_batch_norms(path), "more than 16 MiB and 8 times its size, with 50331776 bytes for")
    np.savez_compressed(path, **arrays(4) | {"conv.weight": one})
    peak, error = peak_of(lambda: anybn.load_batch_norms(path))
    assert error is None
    assert peak < MiB


@pytest.mark.parametrize("shape", ["(10000000000,)", "(100000, 100000, 100000)", "(-1, -99999999999)"])
def test_an_npz_with_more_shape_than_bytes(tmp_path, shape):
    path = tmp_path / "model.npz"
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(path, "w") as file:
        for name in ("running_mean", "running_var"):
            file.writestr(f"bn.{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234")
    refused(lambda: anybn.load_batch_norms(path), "bytes, but ")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_compressed_otherwise(tmp_path, method):
    path = tmp_path / "model.npz"
    np.savez(tmp_path / "plain.npz", **arrays())
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(path, "w", method) as file:
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    with pytest.raises(anybn.CheckpointError, match="is compressed in a way that NumPy does not write"):
        anybn.load_batch_norms(path)


def test_a_pt_with_an_expanded_weight(torch, tmp_path):
    path = tmp_path / "model.pt"
    one = torch.ones(1).expand(64 * MiB)
    torch.save({"bn.running_mean": one, "bn.running_var": one}, path)
    assert path.stat().st_size < 4096
    growth, result = growth_of(path)
    assert result == "CheckpointError"
    assert growth < 64 * MiB


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pt_reads_what_it_needs(torch, tmp_path, compression):
    path = tmp_path / "model.pt"
    tensors = {f"bn.{name}": torch.from_numpy(a) for name, a in arrays().items()}
    torch.save(tensors | {"conv.weight": torch.ones(64 * MiB)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", compression) as file:
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    growth, result = growth_of(path)
    assert result == ("1" if compression == zipfile.ZIP_STORED else "CheckpointError")
    assert growth < 64 * MiB


def test_a_pt_compressed_by_hand(torch, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({name: torch.from_numpy(a) + 2 for name, a in arrays().items()}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    assert inputs.state_values(anybn.load_batch_norms(path)[""]) == inputs.state_values(
        anybn.load_batch_norms(tmp_path / "plain.pt")[""]
    )


def test_a_pt_from_before_torch_1_6(torch, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({n: torch.from_numpy(a) for n, a in arrays().items()}, path, _use_new_zipfile_serialization=False)
    assert list(anybn.load_batch_norms(path)) == [""]


def test_a_pt_with_a_text_longer_than_the_file(torch, tmp_path):
    """Where a file is asked for as many bytes, it makes room for them first."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02X" + (2**30).to_bytes(4, "little") + b"abc")
    with pytest.raises(anybn.CheckpointError):  # imports torch
        anybn.load_batch_norms(path)
    refused(lambda: anybn.load_batch_norms(path), "nothing was loaded")


def test_a_pt_of_mappings_that_hold_each_other(torch, tmp_path):
    path = tmp_path / "model.pt"
    nested = {"x": 1}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    torch.save(nested, path)
    refused(lambda: anybn.load_batch_norms(path), "more than 16 MiB and 8 times its size", limit=512 * MiB)
    endless = {}
    endless["endless"] = endless
    torch.save(endless, path)
    refused(lambda: anybn.load_batch_norms(path), "nothing was loaded", limit=64 * MiB)


def test_a_pt_of_things_that_are_no_arrays(torch, tmp_path):
    path = tmp_path / "model.pt"
    mean, var = torch.zeros(3), torch.ones(3)
    for strange in (
        mean.to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(3, dtype=torch.float8_e5m2),
        "text",
        [1, 2, 3],
        None,
        10**400,
    ):
        torch.save({"bn.running_mean": strange, "bn.running_var": var}, path)
        with pytest.raises(anybn.CheckpointError, match="nothing was loaded"):
            anybn.load_batch_norms(path)
    torch.save({"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": 10**400}, path)
    with pytest.raises(anybn.CheckpointError, match="nothing was loaded: layer 'bn': num_batches_tracked is 2"):
        anybn.load_batch_norms(path)


def test_a_lazy_batch_norm_has_no_shape_yet(torch):
    lazy = torch.nn.Sequential(torch.nn.LazyBatchNorm1d()).state_dict()
    with pytest.raises(anybn.CheckpointError, match=r"layer '0': weight has no shape yet .*: give the model a batch"):
        anybn.load_batch_norms(lazy)
    state = anybn.BatchNormState(3)
    with pytest.raises(
        anybn.CheckpointError, match="nothing was loaded: weight is a lazy module's and has no shape yet"
    ):
        state.load_state_dict(torch.nn.LazyBatchNorm1d().state_dict())


def onnx_model(path, settings=None, external=None, length=None):
    """A batch norm of 3 channels beside a tensor that it does not need; external: the file of all tensors."""
    onnx = pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx")
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [onnx.numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays().items()]
    tensors.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "conv.weight"))
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"], **(settings or {}))
    graph = onnx.helper.make_graph([node], "g", [], [], tensors)
    for tensor in graph.initializer if external else ():
        onnx.external_data_helper.set_external_data(tensor, external, 0, length)
        tensor.ClearField("raw_data")
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("length", [12, None])
def test_onnx_reads_of_a_file_beside_it_what_it_needs(tmp_path, length):
    path = onnx_model(tmp_path / "model.onnx", external="data", length=length)
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", 256 * MiB)
    anybn.load_batch_norms(path)  # imports onnx
    peak, error = peak_of(lambda: anybn.load_batch_norms(path))
    assert error is None
    assert peak < 8 * MiB


def test_onnx_with_more_bytes_beside_it_than_its_shapes(tmp_path):
    path = onnx_model(tmp_path / "model.onnx", external="data", length=256 * MiB)
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", 256 * MiB)
    refused(lambda: anybn.load_batch_norms(path), "weight has 12 bytes by its shape, but 268435456 in its file")


def test_onnx_does_not_look_for_what_nobody_needs(tmp_path):
    import onnx

    path = onnx_model(tmp_path / "model.onnx")
    model = onnx.load(path)
    onnx.external_data_helper.set_external_data(model.graph.initializer[-1], "absent")
    model.graph.initializer[-1].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    assert len(anybn.load_batch_norms(path)) == 1


@pytest.mark.parametrize("settings", [{"epsilon": float("nan")}, {"epsilon": 0.0}, {"momentum": 3.0}])
def test_settings_of_onnx_that_cannot_be(tmp_path, settings):
    path = onnx_model(tmp_path / "model.onnx", settings)
    with pytest.raises(anybn.CheckpointError, match=f"nothing was loaded: layer 'y': {next(iter(settings))} is"):
        anybn.load_batch_norms(path)
    assert len(anybn.load_batch_norms(path, epsilon=1e-3, momentum=0.9)) == 1  # the caller knows better
    with pytest.raises(ValueError, match="epsilon is 0") as error:
        anybn.load_batch_norms(path, epsilon=0.0)
    assert not isinstance(error.value, anybn.CheckpointError)
