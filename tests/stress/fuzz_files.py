"""Mutated files of every reader: each is refused with CheckpointError, or read as states that are whole.

    python tests/stress/fuzz_files.py [--cases N | --seconds S] [--seed N] [--keep FOLDER]

N files per reader (1000), or as many as fit the time, say a night's. A case depends on seed, reader and number alone.
A file that breaks a promise is named with what it breaks, and stays in FOLDER. What is promised of every file:

- nothing is raised but CheckpointError;
- what is read has arrays of one size and possible statistics, evaluates, and survives save and load;
- no module that it names is imported, no process is started, no file is changed;
- Python and NumPy take no more than 128 MiB for it; the run prints the most that the process has had, torch's included.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import re
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import anybn
from stress import mutation

MiB = 2**20


# -- real files ------------------------------------------------------------------------------------------------


def weights(seed: int, dtype: str = "float32", c: int = 5) -> dict[str, np.ndarray]:
    """A small network's, with two batch norms, of which one is not affine."""
    rng = np.random.default_rng(seed)
    statistics = {"running_mean": rng.normal(size=c), "running_var": rng.uniform(size=c)}
    affine = {"weight": rng.normal(size=c), "bias": rng.normal(size=c)}
    arrays = {f"layer1.0.bn1.{n}": a.astype(dtype) for n, a in (affine | statistics).items()}
    arrays |= {f"bn2.{n}": a.astype(dtype) for n, a in statistics.items()}
    arrays |= {f"{layer}.num_batches_tracked": np.array(seed) for layer in ("layer1.0.bn1", "bn2")}
    return arrays | {"conv.weight": rng.normal(size=(4, 3, 2, 2)).astype(dtype), "conv.bias": np.ones(4, dtype)}


def own_files(folder: Path) -> Iterator[Path]:
    options = (
        {},
        {"momentum": None, "ddof": 0},
        {"affine": False},
        {"track_running_stats": False},
        {"dtype": "float16"},
    )
    for i, settings in enumerate(options):
        state = anybn.BatchNormState(5, **settings)
        anybn.batch_norm(np.random.default_rng(i).normal(size=(9, 5)), state, training=True)
        state.save(folder / f"own{i}.safetensors")
        yield folder / f"own{i}.safetensors"


def safetensors_files(folder: Path) -> Iterator[Path]:
    import safetensors.numpy

    for i, dtype in enumerate(("float32", "float16", "float64")):
        safetensors.numpy.save_file(weights(i, dtype), folder / f"{dtype}.safetensors", {"format": "np"})
        yield folder / f"{dtype}.safetensors"
    haiku = anybn.BatchNormState(5, momentum=0.1).state_dict("haiku")
    safetensors.numpy.save_file({f"net/bn/{n}": np.array(a) for n, a in haiku.items()}, folder / "haiku.safetensors")
    yield folder / "haiku.safetensors"


def npz_files(folder: Path) -> Iterator[Path]:
    np.savez(folder / "plain.npz", **weights(0))
    np.savez_compressed(folder / "compressed.npz", **weights(1, "float64"))
    np.savez(folder / "chainer.npz", **{f"bn/{n}": a for n, a in anybn.BatchNormState(5).state_dict("chainer").items()})
    yield from (folder / f"{name}.npz" for name in ("plain", "compressed", "chainer"))


def torch_files(folder: Path) -> Iterator[Path]:
    import torch

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5, affine=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), folder / "plain.pt")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, folder / "nested.pt")
    torch.save(model.bfloat16().state_dict(), folder / "bfloat16.pt")
    torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    yield from (folder / f"{name}.pt" for name in ("plain", "nested", "bfloat16", "legacy"))


def onnx_files(folder: Path) -> Iterator[Path]:
    import onnx
    from onnx import helper, numpy_helper

    for i, name in enumerate(("inline", "beside", "floats")):
        arrays = {n: a for n, a in weights(i).items() if not n.startswith("bn2.running_mean")}
        arrays |= {"ones": np.ones(5, np.float32), "zeros": np.zeros(5, np.float32)}
        tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
        if name == "floats":
            tensors = [helper.make_tensor(n, 1, a.shape, a.astype(np.float32).ravel()) for n, a in arrays.items()]
        constant = numpy_helper.from_array(weights(i)["bn2.running_mean"], "c")
        first = ["x", *(f"layer1.0.bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
        nodes = [
            helper.make_node("Conv", ["x0", "conv.weight", "conv.bias"], ["x"]),
            helper.make_node("BatchNormalization", first, ["y"], epsilon=1e-3, momentum=0.8),
            helper.make_node("Constant", [], ["c"], value=constant),
            helper.make_node("Identity", ["c"], ["bn2.running_mean"]),
            helper.make_node(
                "BatchNormalization", ["y", "ones", "zeros", "bn2.running_mean", "bn2.running_var"], ["z"]
            ),
        ]
        model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
        beside = {"save_as_external_data": True, "location": "data", "size_threshold": 0} if name == "beside" else {}
        onnx.save(model, folder / f"{name}.onnx", **beside)
        yield folder / f"{name}.onnx"


def keras_files(folder: Path) -> Iterator[Path]:
    """As Keras 3 writes them, the layers of a model by number, and as Keras 2 did, by name."""
    import h5py

    layers = {"batch_normalization": {}, "batch_normalization_1": {"scale": False, "epsilon": 1e-4, "axis": [3]}}
    entries = [
        {"class_name": "BatchNormalization", "config": {"name": f"bn{i}", "epsilon": 1e-3, "momentum": 0.9, **own}}
        for i, own in enumerate(layers.values())
    ]
    entries.append({"class_name": "Dense", "config": {"name": "dense", "units": 3}})
    config = {"class_name": "Functional", "config": {"name": "net", "layers": entries}}
    names = {
        False: ["gamma", "beta", "moving_mean", "moving_variance"],
        True: ["beta", "moving_mean", "moving_variance"],
    }
    rng = np.random.default_rng(0)

    def numbered(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_group("vars").attrs["name"] = "net"
            for i, (layer, own) in enumerate(layers.items()):
                group = file.create_group(f"layers/{layer}/vars")
                group.attrs["name"] = f"bn{i}"
                for j, _ in enumerate(names[bool(own)]):
                    group[str(j)] = rng.uniform(size=5).astype("f4")
            file["layers/dense/vars/0"] = rng.normal(size=(5, 3))

    weights_path = folder / "model.weights.h5"
    numbered(weights_path)
    for name, compression in (("plain", zipfile.ZIP_STORED), ("compressed", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / f"{name}.keras", "w", compression) as archive:
            archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("model.weights.h5", weights_path.read_bytes())
        yield folder / f"{name}.keras"
    weights_path.unlink()
    with h5py.File(folder / "named.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        for i, own in enumerate(layers.values()):
            for name in names[bool(own)]:
                file[f"model_weights/bn{i}/bn{i}/{name}"] = rng.uniform(size=5).astype("f4")
        file["model_weights/dense/dense/kernel"] = rng.normal(size=(5, 3))
    yield folder / "named.h5"


def _load(path: Path) -> dict[str, anybn.BatchNormState]:
    return {"": anybn.BatchNormState.load(path)}


#: name -> (what has written the files, what reads them, mutations of their containers)
READERS: dict[str, tuple[Callable[[Path], Iterator[Path]], Callable, mutation.Mutation]] = {
    "own": (own_files, _load, mutation.of_safetensors),
    "safetensors": (safetensors_files, anybn.load_batch_norms, mutation.of_safetensors),
    "npz": (npz_files, anybn.load_batch_norms, mutation.of_zip),
    "pt": (torch_files, anybn.load_batch_norms, mutation.of_zip),
    "onnx": (onnx_files, anybn.load_batch_norms, mutation.of_onnx),
    "keras": (keras_files, anybn.load_batch_norms, mutation.of_keras),
}


# -- what is promised ------------------------------------------------------------------------------------------

_watched: list[str] | None = None
"""what the reading under way has done to the world; None: nobody looks"""


def _watch(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event == "open":
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _watched.append(f"opened {arguments[0]!r} for writing")
    elif event.startswith(("os.", "subprocess.", "shutil.", "socket.")) and event not in ("os.listdir", "os.scandir"):
        _watched.append(f"{event}{arguments!r:.100}")


@contextmanager
def watched() -> Iterator[list[str]]:
    global _watched
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None


def check(read: Callable, path: Path) -> str:
    """Hold what is promised for one file, with AssertionError; "refused", "empty" or "read"."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    states, error = None, None
    with watched() as seen:
        try:
            states = read(path)
        except anybn.CheckpointError as refusal:
            error = refusal
    assert not seen, seen
    assert sys.modules.pop("canary", None) is None, "a module was imported that the file names"
    assert (peak := tracemalloc.get_traced_memory()[1] - before) < 128 * MiB, f"{peak / MiB:.0f} MiB"
    if states is None:
        assert str(error)
        return "refused"
    for name, state in states.items():
        check_state(name, state, path.with_name("again.safetensors"))
    return "read" if states else "empty"


def check_state(name: str, state: anybn.BatchNormState, again: Path) -> None:
    c = state.num_features
    assert isinstance(name, str)
    assert type(state.num_batches_tracked) is int
    assert 0 <= state.num_batches_tracked < 2**63
    held = state._arrays.held()
    for array in held.values():
        assert isinstance(array, np.ndarray)
        assert array.shape == (c,)
    for field in {"running_mean", "running_var"} & held.keys():
        assert np.isfinite(held[field]).all()
    if not held:
        return
    with np.errstate(all="ignore"):
        assert anybn.batch_norm(np.ones((2, c), np.float32), state).shape == (2, c)
    state.save(again)
    loaded = anybn.BatchNormState.load(again)
    assert repr(loaded) == repr(state)
    for field, array in loaded._arrays.held().items():
        assert array.tobytes() == held[field].tobytes()


def most_memory() -> int:
    """The most that this process has had, in bytes; 0 where it cannot be told."""
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else 0


# -- the run ---------------------------------------------------------------------------------------------------


def fuzz(reader: str, seed: int, cases: int, until: float, folder: Path, keep: Path) -> tuple[Counter, int]:
    """(how often what came of a file, failures)"""
    write, read, of_container = READERS[reader]
    contents = [(path, path.read_bytes()) for path in write(folder)]
    for path, _ in contents:
        read(path)  # imports what reading needs
    tracemalloc.start()
    for path, _ in contents:
        assert check(read, path) == "read", path
    tally: Counter = Counter()
    failures = 0
    for case in itertools.count() if not cases else range(cases):
        if time.monotonic() > until:
            break
        random = Random(f"{seed} {reader} {case}")
        (path, content), (_, other) = random.choice(contents), random.choice(contents)
        by_container = reader == "keras" or (random.random() < 0.6 and not path.name.startswith("legacy"))
        content = (of_container if by_container else mutation.of_bytes)(random, content, other)
        path = folder / f"case{path.suffix}"
        path.write_bytes(content)
        try:
            tally[check(read, path)] += 1
        except Exception as error:
            failures += 1
            kept = keep / f"{reader}-{seed}-{case}{path.suffix}"
            kept.write_bytes(content)
            print(f"{kept}: {type(error).__name__}: {error!s:.500}", flush=True)
    return tally, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, help="per reader")
    parser.add_argument("--seconds", type=float, help="for all readers together, in place of a number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()), help="a folder for files that fail")
    options = parser.parse_args()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".* does not tell e", UserWarning)  # eps, which is said of whole files too
    faulthandler.enable()
    sys.addaudithook(_watch)
    readers = options.readers.split(",")
    cases = 0 if options.seconds else options.cases or 1000
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        Path(folder, "canary.py").write_text("__array_namespace_info__ = None\n")
        start = time.monotonic()
        for i, reader in enumerate(readers):
            until = start + options.seconds * (i + 1) / len(readers) if options.seconds else float("inf")
            own = Path(folder, reader)
            own.mkdir()
            tally, failed = fuzz(reader, options.seed, cases, until, own, options.keep)
            failures += failed
            counts = ", ".join(f"{n} {outcome}" for outcome, n in tally.most_common())
            print(
                f"{reader}: {tally.total() + failed} files with seed {options.seed}: {counts}, {failed} failed",
                flush=True,
            )
    print(f"most memory: {most_memory() / MiB:.0f} MiB, {time.monotonic() - start:.0f} s")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
