"""A state as a safetensors file: its arrays, its settings and a checksum over both. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from anybn import _checks
from anybn.backends.registry import backend_for, backend_named
from anybn.errors import BackendNotInstalled, CheckpointError
from anybn.state.state import BatchNormState

_FORMAT = "anybn.BatchNormState"
_VERSION = 1
_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats", "ddof", "dtype")


def safetensors() -> Any:
    """The library. Raises BackendNotInstalled."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise BackendNotInstalled(f"checkpoints need safetensors ({error}): pip install safetensors") from error
    return safetensors


def arrays_of(file: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an open file. Raises BackendNotInstalled for bfloat16 without ml_dtypes."""
    names = list(names)
    if any(file.get_slice(name).get_dtype() == "BF16" for name in names):
        backend_named("numpy").dtype("bfloat16")  # safetensors takes it from NumPy, which learns of it here
    return {name: file.get_tensor(name) for name in names}


def _checksum(tensors: dict[str, np.ndarray], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(state: BatchNormState, path: str | os.PathLike[str]) -> None:
    """See `BatchNormState.save`."""
    library = safetensors()
    arrays = state._arrays
    tensors = {name: backend_for(a).to_numpy(a) for name, a in arrays.held().items()}
    for name in ("running_mean", "running_var"):
        if name in tensors and (problem := _checks.impossible_statistics(name, tensors[name])):
            raise CheckpointError(f"nothing was saved, since load would refuse it: {problem}")
    tensors["num_batches_tracked"] = np.asarray(int(arrays.num_batches_tracked), np.int64)
    settings = json.dumps({name: getattr(state, name) for name in _SETTINGS})
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "settings": settings,
        "sha256": _checksum(tensors, settings),
    }
    # Whole or not at all: a reader never meets half a file, and the old one survives a full disk.
    path = Path(path).resolve()  # a link stays one
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(library.numpy.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_own(path: Path) -> bool:
    """Whether `save` wrote a safetensors file; also if one of its marks is damaged, so that `load` refuses it."""
    with safetensors().safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return metadata.get("format") == _FORMAT or {"settings", "sha256"} <= metadata.keys()


def load(path: str | os.PathLike[str]) -> BatchNormState:
    """See `BatchNormState.load`."""
    library = safetensors()
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    try:
        with library.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = arrays_of(file, file.keys())
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
    if metadata.get("sha256") != _checksum(tensors, metadata.get("settings", "")):
        raise CheckpointError(f"{path} is damaged: its contents do not have the checksum that was written with them")
    try:
        settings = json.loads(metadata["settings"])
        state = BatchNormState(**settings)
        if not state.track_running_stats:
            state.num_batches_tracked = int(tensors.pop("num_batches_tracked"))
        state.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no valid state ({error})") from error
    return state
