"""Our own files, of one state or several: safetensors of their arrays, with their settings and a checksum over both."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anybn import _checks, _settings
from anybn.backends.registry import backend_for, backend_named
from anybn.checkpoints import translation
from anybn.errors import BackendNotInstalled, CheckpointError, required

_FORMAT, _NESTED = "anybn.BatchNormState", "anybn.states"
_VERSION = 1

#: Of the settings in a file exactly these are taken, and each only as what it can be.
_READ_AS: dict[str, Callable[[Any], Any]] = {
    "num_features": _settings.num_features,
    "eps": _settings.eps,
    "momentum": _settings.momentum,
    "affine": partial(_settings.flag, "affine"),
    "scale": partial(_settings.flag, "scale"),
    "bias": partial(_settings.flag, "bias"),
    "track_running_stats": partial(_settings.flag, "track_running_stats"),
    "ddof": _settings.ddof,
    "dtype": partial(_settings.choice, "dtype", choices=_settings.FLOATING),
}
#: Written where they are False only, since files of version 1 were read by what did not know them.
_LATER = "scale", "bias"


def safetensors_library() -> Any:
    """Raises BackendNotInstalled."""
    with required("checkpoints need safetensors", "safetensors"):
        import safetensors.numpy
    return safetensors


def arrays_of(file: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an open safetensors file. Raises BackendNotInstalled for bfloat16 without ml_dtypes."""
    names = list(names)
    if any(file.get_slice(name).get_dtype() == "BF16" for name in names):
        backend_named("numpy").dtype("bfloat16")  # safetensors takes it from NumPy, which learns of it here
    return {name: file.get_tensor(name) for name in names}


@contextmanager
def checkpoint_errors(problem: str) -> Iterator[None]:
    """What a library raises about a file is a CheckpointError that tells the problem and the library's words."""
    try:
        yield
    except (BackendNotInstalled, CheckpointError):
        raise
    except Exception as error:  # each library has its own kinds, and several, depending on which part is damaged
        raise CheckpointError(f"{problem} ({error or type(error).__name__})") from error


# -- writing ---------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """See `BatchNormState.save`. arrays: by the state's names, None for one that is switched off."""
    safetensors_library()
    write(path, _FORMAT, _tensors_of(arrays), _text_of(settings))


def save_nested(
    path: str | os.PathLike[str], tree: Any, states: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """tree: dicts and lists of the names of states; states: (settings, arrays) as `save` takes them, by name."""
    safetensors_library()
    text = {name: json.loads(_text_of(settings)) for name, (settings, _) in states.items()}
    tensors = {
        f"{name}.{field}": tensor
        for name, (_, arrays) in states.items()
        for field, tensor in _tensors_of(arrays).items()
    }
    write(path, _NESTED, tensors, json.dumps({"tree": tree, "states": text}))


def _text_of(settings: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in settings.items() if not (name in _LATER and value)})


def _tensors_of(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    with checkpoint_errors("nothing was saved: num_batches_tracked is more than int64 holds"):
        count = np.asarray(int(arrays["num_batches_tracked"]), np.int64)
    tensors = {
        name: count if name == "num_batches_tracked" else backend_for(a).to_numpy(a)
        for name, a in arrays.items()
        if a is not None
    }
    for name in ("running_mean", "running_var"):
        if name in tensors and (problem := _checks.impossible_statistics(name, tensors[name])):
            raise CheckpointError(f"nothing was saved, since load would refuse it: {problem}")
    return tensors


def write(path: str | os.PathLike[str], format: str, tensors: dict[str, np.ndarray], text: str) -> None:
    """A file of this format: arrays, a text, and a checksum over both."""
    metadata = {"format": format, "version": str(_VERSION), "settings": text, "sha256": _checksum(tensors, text)}
    content = safetensors_library().numpy.save(tensors, metadata)
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device, which takes bytes and must stay what it is
        path.write_bytes(content)
    else:
        with replacing(path.resolve()) as temporary:  # resolved, so that a link stays one
            if not _written_without_name(temporary, content):
                with temporary.open("xb") as file:
                    _write_through(file, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for what is to be at path, whole or not at all: a reader never meets half a file, and the old one survives
    a full disk."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")  # not of path's name, which may be as long as names may be
    try:
        yield temporary
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _written_without_name(path: Path, content: bytes) -> bool:
    """Write a file that gets its name when it is whole, so that nothing is left of it if the process is killed before.

    False where the system or the file system has no such files.
    """
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        _write_through(file, content)
        try:  # src_dir_fd makes Python call linkat, which alone follows the link in /proc
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
        except OSError:
            return False
    return True


def _write_through(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


# -- reading ---------------------------------------------------------------------------------------------------


def holds_a_state(metadata: Mapping[str, str]) -> bool:
    """Whether `save` wrote a file with this metadata; also with one of its marks damaged, so that `load` refuses."""
    return metadata.get("format") == _FORMAT or {"settings", "sha256"} <= metadata.keys()


State = tuple[dict[str, Any], dict[str, Any]]
"""(settings, values in NumPy by field) of a state, all of them checked."""


def load(path: str | os.PathLike[str]) -> State:
    """See `BatchNormState.load`."""
    _, tensors, text = read(path, "BatchNormState.save", _FORMAT)
    with _valid(path):
        return _state_in(json.loads(text), tensors)


def load_nested(path: str | os.PathLike[str]) -> tuple[Any, dict[str, State]]:
    """The tree and the states by name that `save_nested` was given; of a file of `save`, "" and the state called ""."""
    kind, tensors, text = read(path, "anybn.save", _FORMAT, _NESTED)
    with _valid(path):
        content = json.loads(text)
        if kind == _FORMAT:
            return "", {"": _state_in(content, tensors)}
        tree, told = content["tree"], content["states"]
        named: dict[str, dict[str, np.ndarray]] = {name: {} for name in told}
        for key, tensor in tensors.items():
            name, _, field = key.rpartition(".")
            named[name][field] = tensor
        if missing := set(_leaves(tree)) ^ named.keys():
            raise ValueError(f"the tree and the states do not have the same names: {sorted(missing)!r:.200}")
        return tree, {name: _state_in(told[name], tensors) for name, tensors in named.items()}


def _leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif type(tree) in (dict, list):
        for branch in tree.values() if type(tree) is dict else tree:
            yield from _leaves(branch)
    else:
        raise ValueError(f"there is a {type(tree).__name__} in its tree")


@contextmanager
def _valid(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what a file holds that was made to look like ours, down to RecursionError from JSON
        raise CheckpointError(
            f"{path} holds no valid state ({error or type(error).__name__}): it was not made by BatchNormState.save, "
            "so read its arrays with safetensors and give them to load_state_dict"
        ) from error


def read(path: str | os.PathLike[str], writer: str, *formats: str) -> tuple[str, dict[str, np.ndarray], str]:
    """(format, arrays, text) of a file of one of these formats, as writer wrote them."""
    library = safetensors_library()
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    problem = f"{path} is truncated, damaged or no safetensors file"
    if start == b"PK\x03\x04" or start[:1] == b"\x80":  # or a safetensors file whose header has such a length
        problem = (
            f"{path} is a pickle or a zip (torch or npz), which may run code when read: read it with "
            "torch.load(path, weights_only=True) or np.load(path), then give the arrays to load_state_dict"
        )
    with checkpoint_errors(problem), library.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        kind = metadata.get("format", "")
        if kind == _NESTED and kind not in formats:
            raise CheckpointError(f"{path} holds several states: read it with anybn.load")
        if kind not in formats:
            raise CheckpointError(
                f"{path} was not written by {writer}: read its arrays with safetensors and give one layer's to "
                "load_state_dict"
            )
        if metadata.get("version") != str(_VERSION):
            raise CheckpointError(
                f"{path} has version {metadata.get('version')!r}, this anybn reads {_VERSION}: upgrade anybn"
            )
        tensors = arrays_of(file, file.keys())
    text = metadata.get("settings", "{}")
    if metadata.get("sha256") != _checksum(tensors, text):
        raise CheckpointError(f"{path} is damaged: its contents do not have the checksum that was written with them")
    return kind, tensors, text


def _state_in(told: Any, tensors: dict[str, np.ndarray]) -> State:
    settings = _settings_in(told)
    count = {}
    if not settings["track_running_stats"]:  # and so no array to translate, but `save` wrote it
        count = {"num_batches_tracked": translation.count_of("num_batches_tracked", tensors.pop("num_batches_tracked"))}
    return settings, translation.decode(tensors, settings, "torch") | count


def _settings_in(settings: Any) -> dict[str, Any]:
    if type(settings) is dict:
        settings = dict.fromkeys(_LATER, True) | settings
    if type(settings) is not dict or settings.keys() != _READ_AS.keys():
        raise ValueError(f"its settings are {settings!r:.200}; they must be {', '.join(_READ_AS)}, and no others")
    return {name: check(settings[name]) for name, check in _READ_AS.items()}


def _checksum(tensors: dict[str, np.ndarray], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
