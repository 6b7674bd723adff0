"""Copies of frameworks' files in which some arrays have other values, and everything else is as it was."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anybn.checkpoints import files, keras_files
from anybn.checkpoints.budget import Budget
from anybn.checkpoints.conventions import flattened

Replaced = Mapping[str, np.ndarray]
"""{key in the file: array of the shape and dtype that it has there}"""


def _copy_safetensors(source: Path, target: Path, replaced: Replaced) -> None:
    """The same bytes, but for those of the arrays: header, order and padding stay."""
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for key, array in replaced.items():
            begin, end = header[key]["data_offsets"]
            content = array.tobytes()
            if len(content) != end - begin:
                raise ValueError(f"{key} has {end - begin} bytes in the file, not {len(content)}")
            file.seek(8 + size + begin)
            file.write(content)


def _copy_npz(source: Path, target: Path, replaced: Replaced) -> None:
    def content(name: str) -> bytes | None:
        if (array := replaced.get(name.removesuffix(".npy"))) is None:
            return None
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        return buffer.getvalue()

    _copy_zip(source, target, content, force_zip64=True)  # as NumPy does


def _copy_zip(source: Path, target: Path, content: Callable[[str], bytes | None], force_zip64: bool = False) -> None:
    """Members in their order, with their names, times and compression; content gives new ones of those that change."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        new.comment = old.comment
        for info in old.infolist():
            changed = content(info.filename)
            member = old.open(info) if changed is None else io.BytesIO(changed)
            with member, new.open(info, "w", force_zip64=force_zip64 or info.file_size >= 2**31) as copied:
                shutil.copyfileobj(member, copied, 2**20)


def _copy_torch(source: Path, target: Path, replaced: Replaced) -> None:
    """Through torch's own loader, with ``weights_only``, so that nothing in the file is executed."""
    import torch

    content = torch.load(source, map_location="cpu", weights_only=True)
    tensors = dict(flattened(content, "."))
    with torch.no_grad():
        for key, array in replaced.items():
            tensors[key].copy_(_tensor(array))
    torch.save(content, target)


def _tensor(array: np.ndarray) -> Any:
    """Also of bfloat16, which torch does not take from NumPy."""
    import torch

    if array.dtype.kind in "iub":
        return torch.from_numpy(np.array(array))
    return torch.from_numpy(array.astype(np.float64)).to(getattr(torch, array.dtype.name))


# -- Keras -----------------------------------------------------------------------------------------------------


def copy_keras(source: Path, target: Path, values: Mapping[str, tuple[Replaced, Mapping[str, Any]]]) -> None:
    """Arrays by layer, and the settings that the file's config tells."""
    with keras_files.opened(source, Budget(source)) as (file, config):
        places = keras_files.places(file, config, Budget(source))
    told = False
    for layer, (_, settings) in values.items():
        present = places[layer].config
        told |= any(present.get(name) != value for name, value in settings.items())
        present.update(settings)  # which is a part of config
    datasets = {
        places[layer].datasets[name]: array for layer, (arrays, _) in values.items() for name, array in arrays.items()
    }
    if source.suffix.lower() != ".keras":
        shutil.copyfile(source, target)
        with keras_files.h5_library().File(target, "r+") as file:
            _write_datasets(file, datasets)
            if told:
                file.attrs["model_config"] = json.dumps(config)
        return

    def content(name: str) -> bytes | None:
        if name == keras_files.CONFIG:
            return json.dumps(config).encode() if told else None
        if name != keras_files.WEIGHTS:
            return None
        with zipfile.ZipFile(source) as archive:
            buffer = io.BytesIO(archive.read(name))
        with keras_files.h5_library().File(buffer, "r+") as file:
            _write_datasets(file, datasets)
        return buffer.getvalue()

    _copy_zip(source, target, content)


def _write_datasets(file: Any, datasets: Replaced) -> None:
    for path, array in datasets.items():
        dataset = file[path]
        dataset[...] = array.view(dataset.dtype) if dataset.dtype.kind == "V" else array


#: suffix -> function of (source, target, replaced).
COPIES: dict[str, Callable[[Path, Path, Replaced], None]] = {
    ".safetensors": _copy_safetensors,
    ".npz": _copy_npz,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _copy_torch),
}


# -- new files -------------------------------------------------------------------------------------------------


def _new_safetensors(target: Path, arrays: Replaced) -> None:
    files.safetensors_library().numpy.save_file(dict(arrays), target)


def _new_npz(target: Path, arrays: Replaced) -> None:
    with target.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _new_torch(target: Path, arrays: Replaced) -> None:
    import torch

    torch.save({key: _tensor(array) for key, array in arrays.items()}, target)


#: suffix -> function of (target, arrays by key) that writes a file of nothing else.
NEW: dict[str, Callable[[Path, Replaced], None]] = {
    ".safetensors": _new_safetensors,
    ".npz": _new_npz,
    **dict.fromkeys((".pt", ".pth"), _new_torch),
}
