"""Files: our own, which hold one state, and those in which frameworks keep a model. Nothing is ever unpickled.

Our own is a safetensors file of a state's arrays, with its settings and a checksum over both.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anybn import _checks
from anybn.backends.registry import backend_for, backend_named
from anybn.checkpoints.conventions import CONVENTIONS, Layer, flattened
from anybn.errors import BackendNotInstalled, CheckpointError

_FORMAT = "anybn.BatchNormState"
_VERSION = 1


def _safetensors() -> Any:
    """The library. Raises BackendNotInstalled."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise BackendNotInstalled(f"checkpoints need safetensors ({error}): pip install safetensors") from error
    return safetensors


def _arrays_of(file: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an open safetensors file. Raises BackendNotInstalled for bfloat16 without ml_dtypes."""
    names = list(names)
    if any(file.get_slice(name).get_dtype() == "BF16" for name in names):
        backend_named("numpy").dtype("bfloat16")  # safetensors takes it from NumPy, which learns of it here
    return {name: file.get_tensor(name) for name in names}


# -- our own ---------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """See `BatchNormState.save`. arrays: by the state's names, None for one that is switched off."""
    library = _safetensors()
    tensors = {
        name: np.asarray(int(a), np.int64) if name == "num_batches_tracked" else backend_for(a).to_numpy(a)
        for name, a in arrays.items()
        if a is not None
    }
    for name in ("running_mean", "running_var"):
        if name in tensors and (problem := _checks.impossible_statistics(name, tensors[name])):
            raise CheckpointError(f"nothing was saved, since load would refuse it: {problem}")
    text = json.dumps(settings)
    metadata = {"format": _FORMAT, "version": str(_VERSION), "settings": text, "sha256": _checksum(tensors, text)}
    _write_whole(Path(path).resolve(), library.numpy.save(tensors, metadata))  # resolved, so that a link stays one


def _write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all: a reader never meets half a file, and the old one survives a full disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(settings, arrays by name) as `save` was given them, see `BatchNormState.load`."""
    library = _safetensors()
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    try:
        with library.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = _arrays_of(file, file.keys())
    except BackendNotInstalled:
        raise
    except Exception as error:  # safetensors raises several kinds, depending on which part is damaged
        if start == b"PK\x03\x04" or start[:1] == b"\x80":
            raise CheckpointError(
                f"{path} is a pickle or a zip (torch or npz), which may run code when read: read it with "
                "torch.load(path, weights_only=True) or np.load(path), then give the arrays to load_state_dict"
            ) from error
        raise CheckpointError(f"{path} is truncated, damaged or no safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} was not written by BatchNormState.save: read its arrays with safetensors and give one layer's to "
            "load_state_dict"
        )
    if metadata.get("version") != str(_VERSION):
        raise CheckpointError(
            f"{path} has version {metadata.get('version')!r}, this anybn reads {_VERSION}: upgrade anybn"
        )
    settings = metadata.get("settings", "{}")
    if metadata.get("sha256") != _checksum(tensors, settings):
        raise CheckpointError(f"{path} is damaged: its contents do not have the checksum that was written with them")
    try:
        return json.loads(settings), tensors
    except ValueError as error:
        raise CheckpointError(f"{path} holds no valid state ({error})") from error


def _checksum(tensors: dict[str, np.ndarray], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# -- models ----------------------------------------------------------------------------------------------------


Needed = Callable[[Iterable[str]], list[str]]
"""All names of a file -> those whose arrays are to be read."""


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """What a library raises about a file that is not what its suffix says is a CheckpointError."""
    try:
        yield
    except (BackendNotInstalled, CheckpointError):
        raise
    except Exception as error:  # each library has its own kinds
        raise CheckpointError(
            f"nothing was loaded: {path} is truncated, damaged or no {path.suffix} file ({error})"
        ) from error


def holds_a_state(path: Path) -> bool:
    """Whether `save` wrote a safetensors file; also if one of its marks is damaged, so that `load` refuses it."""
    with _safetensors().safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return metadata.get("format") == _FORMAT or {"settings", "sha256"} <= metadata.keys()


def _safetensors_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    with _safetensors().safe_open(path, framework="numpy") as file:
        return _arrays_of(file, needed(file.keys()))


def _npz_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load leaves damaged paths open
        return {name: file[name] for name in needed(file.files)}


def _torch_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise BackendNotInstalled(
            f"{path} is a {path.suffix} file, which takes torch to read ({error}): pip install torch, or save the "
            "state_dict as .safetensors where torch is"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"nothing was loaded: {path} is damaged or holds more than arrays, such as a whole module, which may run "
            "code when read: where that code is at home, save model.state_dict() instead"
        ) from error
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}, not a state_dict")
    arrays = dict(flattened(content, "."))
    return {name: arrays[name] for name in needed(arrays)}


def _onnx_layers(path: Path) -> dict[str, Layer]:
    """The BatchNormalization nodes of the main graph by their names, with their attributes."""
    try:
        import onnx
    except ImportError as error:
        raise BackendNotInstalled(f"{path} takes onnx to read ({error}): pip install onnx") from error
    model = onnx.load(path)
    if not model.HasField("graph"):
        raise ValueError("it has no graph")
    rules = CONVENTIONS["onnx"]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    layers: dict[str, Layer] = {}
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = attributes["value"]
        if node.op_type == "Identity" and node.input[0] in constants:  # torch's exporter keeps equal arrays once
            constants[node.output[0]] = constants[node.input[0]]
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        inputs = dict(zip(rules.names, node.input[1:], strict=False))
        found = {n: onnx.numpy_helper.to_array(constants[i]) for n, i in inputs.items() if i in constants}
        problems = [
            f"its {n} is {i!r}, which is computed in the graph" for n, i in inputs.items() if i not in constants
        ]
        if attributes.get("spatial", 1) == 0:
            problems.append("it has spatial=0, statistics for each position, which is no batch norm of channels")
        # ONNX keeps float32: 1e-5 for what float64 would take for 9.99999974e-06.
        own = {name: float(str(np.float32(attributes[name]))) for name in ("epsilon", "momentum") if name in attributes}
        layer = _onnx_name(node)
        if layer in layers:
            problems.append("another one has this name")
        layers[layer] = Layer(rules, found, own, problems)
    return layers


def _onnx_name(node: Any) -> str:
    """What the statistics' names share, as "layer1.0.bn1" in torch's; or the node's name; or that of its output."""
    layers = {name.rpartition(".")[0] for name in node.input[3:5]}
    return layers.pop() if len(layers) == 1 and "" not in layers else node.name or node.output[0]


#: suffix -> function of (path, needed) that returns arrays by name, but for .onnx: of (path) that returns layers.
READERS: dict[str, Callable[..., Any]] = {
    ".safetensors": _safetensors_arrays,
    ".npz": _npz_arrays,
    ".onnx": _onnx_layers,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _torch_arrays),
}
