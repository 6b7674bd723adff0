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
from anybn.checkpoints.budget import Budget
from anybn.checkpoints.conventions import flattened
from anybn.errors import CheckpointError, required

Needed = Callable[[Iterable[str]], list[str]]
"""All names of a file -> those whose arrays are to be read."""


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
    what = f"{path} is a {path.suffix} file, which takes torch to read"
    with required(what, "torch, or save the state_dict as .safetensors where torch is"):
        import torch
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


#: suffix -> function of (path, needed) that returns arrays by name. `onnx_graphs` and `keras_files` read layers.
READERS: dict[str, Callable[[Path, Needed], dict[str, Any]]] = {
    ".safetensors": _safetensors_arrays,
    ".npz": _npz_arrays,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _torch_arrays),
}
