"""The files in which frameworks keep a model, as arrays by name or as layers. Nothing is ever unpickled by us.

A file may be made to harm: what is read of it is bounded by what is needed, and by a `Budget` for all of it.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from anybn.checkpoints import files
from anybn.checkpoints.conventions import CONVENTIONS, Layer, flattened
from anybn.errors import BackendNotInstalled, CheckpointError

Needed = Callable[[Iterable[str]], list[str]]
"""All names of a file -> those whose arrays are to be read."""


class Budget:
    """The bytes that may be made of a file: 16 MiB, and 8 times its size.

    No network's batch norms come near, for they lie in the file. If it is compressed, layers share an array, or an ONNX
    model's arrays lie beside it, there are the 16 MiB, a million channels. A file that inflates is soon beyond.
    """

    def __init__(self, path: Path):
        self.path = path
        self.left = 16 * 2**20 + 8 * path.stat().st_size

    def take(self, name: str, size: int) -> None:
        """Raises CheckpointError when it is used up."""
        self.left -= size
        if self.left < 0:
            raise CheckpointError(
                f"nothing was loaded: {self.path} holds more than 16 MiB and 8 times its size, with {size} bytes for "
                f"{name!r:.200}, as if made to fill the memory: if you trust it, read it with its own library and pass "
                "names to arrays"
            )


def _safetensors_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    with files.safetensors_library().safe_open(path, framework="numpy") as file:
        return files.arrays_of(file, needed(file.keys()))  # which lie side by side in the file, as the library checks


def is_a_state(path: Path) -> bool:
    """Whether `BatchNormState.save` wrote this safetensors file."""
    with files.safetensors_library().safe_open(path, framework="numpy") as file:
        return files.holds_a_state(file.metadata() or {})


# -- npz -------------------------------------------------------------------------------------------------------


def _npz_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    budget = Budget(path)
    with path.open("rb") as opened, zipfile.ZipFile(opened) as file:  # ZipFile leaves damaged paths open
        members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
        return {name: _npy_array(file, members[name], budget) for name in needed(members)}


def _npy_array(file: zipfile.ZipFile, info: zipfile.ZipInfo, budget: Budget) -> np.ndarray:
    """An array of an npz file, whose sizes are compared before anything is made of them."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is compressed in a way that NumPy does not write")
    budget.take(info.filename, info.file_size)  # zipfile reads no more of it than that
    with file.open(info) as member:
        version = npy.read_magic(member)
        if version not in (readers := {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}):
            raise ValueError(f"{info.filename} has version {version}, which no array of numbers has")
        shape, _, dtype = readers[version](member)
        if (size := math.prod(shape) * dtype.itemsize) > info.file_size and not dtype.hasobject:
            raise ValueError(f"{info.filename} has shape {shape}, {size} bytes, but {info.file_size} bytes are there")
    with file.open(info) as member:
        return npy.read_array(member, allow_pickle=False)


# -- torch -----------------------------------------------------------------------------------------------------


def _torch_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise BackendNotInstalled(
            f"{path} is a {path.suffix} file, which takes torch to read ({error}): pip install torch, or save the "
            "state_dict as .safetensors where torch is"
        ) from error
    budget = Budget(path)
    try:
        if zipfile.is_zipfile(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path, budget))
        else:  # from before torch 1.6; out of memory, since a file makes room for as many bytes as it is asked for
            content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"nothing was loaded: {path} is damaged or holds more than arrays, such as a whole module, which may run "
            "code when read: where that code is at home, save model.state_dict() instead"
        ) from error
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}, not a state_dict")
    arrays: dict[str, Any] = {}
    for name, value in flattened(content, "."):
        budget.take(name, 16 + len(name))  # mappings that hold each other have no end, or one that is far off
        arrays[name] = value
    names = needed(arrays)
    for name in names:
        budget.take(name, getattr(arrays[name], "nbytes", 0))  # of an expanded tensor all of them
    return {name: arrays[name] for name in names}


def _can_be_mapped(path: Path, budget: Budget) -> bool:
    """Whether the arrays lie in a zip as they are, so that those that are not needed are never read."""
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
    if all(info.compress_type == zipfile.ZIP_STORED for info in members):
        return True
    for info in members:
        budget.take(info.filename, info.file_size)
    return False


# -- ONNX ------------------------------------------------------------------------------------------------------


def _onnx_layers(path: Path) -> dict[str, Layer]:
    """The BatchNormalization nodes of the main graph by their names, with their attributes."""
    try:
        import onnx
    except ImportError as error:
        raise BackendNotInstalled(f"{path} takes onnx to read ({error}): pip install onnx") from error
    model = onnx.load(path, load_external_data=False)
    if not model.HasField("graph"):
        raise ValueError("it has no graph")
    budget = Budget(path)
    rules = CONVENTIONS["onnx"]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    layers: dict[str, Layer] = {}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        if node.op_type == "Identity" and node.input[0] in constants:  # torch's exporter keeps equal arrays once
            constants[node.output[0]] = constants[node.input[0]]
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs = dict(zip(rules.names, node.input[1:], strict=False))
        found = {n: _onnx_array(constants[i], path, budget) for n, i in inputs.items() if i in constants}
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


def _onnx_array(tensor: Any, path: Path, budget: Budget) -> np.ndarray:
    """The array of a tensor. Where it lies in a file beside the model's, no more is read than its shape asks for."""
    from onnx import external_data_helper, helper, numpy_helper

    if external_data_helper.uses_external_data(tensor):
        size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        lengths = [entry.value for entry in tensor.external_data if entry.key == "length"]
        if lengths not in ([], [str(size)]):
            raise ValueError(f"{tensor.name} has {size} bytes by its shape, but {', '.join(lengths)} in its file")
        if not lengths:  # up to the file's end
            tensor.external_data.add(key="length", value=str(size))
        budget.take(tensor.name, size)
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        return numpy_helper.to_array(tensor)
    array = numpy_helper.to_array(tensor)
    budget.take(tensor.name, array.nbytes)  # each time that a layer has it
    return array


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
