"""The batch norms of Keras's own files, with the settings of those that tell them.

=============  ==================================================================================================
``.keras``     a zip of ``config.json``, which has each layer's settings, and ``model.weights.h5``
``.weights.h5``  layers by where they are in the model, their arrays by number: ``layers/batch_normalization/vars/0``
``.h5``        Keras 2, and ``model.save("x.h5")`` since: arrays by name, settings in the attribute ``model_config``
=============  ==================================================================================================

HDF5 can point into other files, and at values that are not there. Of a file, only arrays that lie in it are taken.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anybn._settings import numpy_dtype
from anybn.checkpoints.budget import Budget
from anybn.checkpoints.conventions import CONVENTIONS, Layer, one_axis
from anybn.errors import CheckpointError, required

_RULES = CONVENTIONS["keras"]
_ORDER = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
_LINK = 64
"""bytes that a name in a file is taken for"""
WEIGHTS = "model.weights.h5"
CONFIG = "config.json"


def h5_library() -> Any:
    """Raises BackendNotInstalled."""
    with required("Keras's files take h5py to read", "h5py"):
        import h5py
    return h5py


class Place(NamedTuple):
    """Where a batch norm is in an HDF5 file, and what the file tells of it."""

    datasets: Mapping[str, str]
    """{array: path}, by the convention's names"""
    config: dict[str, Any]
    problems: list[str]


def layers_of(path: Path) -> dict[str, Layer]:
    """Batch norms by the names of the layers that lead to them, "resnet/conv1_bn", without the model's own."""
    budget = Budget(path)
    with opened(path, budget) as (file, config):
        return {name: _layer(file, place, budget) for name, place in places(file, config, budget).items()}


@contextmanager
def opened(path: Path, budget: Budget) -> Iterator[tuple[Any, Any]]:
    """(the HDF5 file of the weights, the model's config or None)"""
    library = h5_library()
    if path.suffix.lower() != ".keras":
        with library.File(path, "r") as file:
            text = file.attrs.get("model_config", "null")
            yield file, json.loads(text)
        return
    with path.open("rb") as source, zipfile.ZipFile(source) as archive:
        if WEIGHTS not in archive.namelist():
            raise ValueError(f"it has no {WEIGHTS}: {', '.join(archive.namelist())!r:.200}")
        config = json.loads(_member(archive, CONFIG, budget))
        with library.File(io.BytesIO(_member(archive, WEIGHTS, budget)), "r") as file:
            yield file, config


def _member(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        budget.take(name, info.file_size)
    elif info.file_size != info.compress_size:
        raise ValueError(f"{name} has two sizes")
    return archive.read(name)


def places(file: Any, config: Any, budget: Budget) -> dict[str, Place]:
    """Where the batch norms of a file are, by name."""
    datasets = dict(_datasets(file, "", budget, 0))
    configs = dict(_configs(config, ()))
    numbered = any(path.endswith("/vars/0") for path in datasets)
    found = _numbered(file, datasets, configs) if numbered else _named(datasets, configs)
    result: dict[str, Place] = {}
    told = {"/".join(names): i for i, names in enumerate(configs)}
    for name, place in sorted(found, key=lambda item: told.get(item[0], len(told))):
        if name in result:
            place.problems.append("another layer has this name")
        result[name] = place
    return result


def _datasets(group: Any, prefix: str, budget: Budget, depth: int) -> Iterator[tuple[str, Any]]:
    """{path: dataset} of what lies in the file itself, in the order in which people count."""
    h5py = h5_library()
    if depth > 100:
        raise ValueError("its groups have more than 100 levels")
    for key in sorted(group, key=_counted):
        budget.take(key, _LINK + len(prefix) + len(key))
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{prefix}{key} is a link to somewhere else")
        item = group[key]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, f"{prefix}{key}/", budget, depth + 1)
        elif isinstance(item, h5py.Dataset):
            yield f"{prefix}{key}", item


def _counted(name: str) -> list[Any]:
    """A key by which layer_2 comes before layer_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,9})", name)]


def _configs(node: Any, path: tuple[str, ...], top: bool = True) -> Iterator[tuple[tuple[str, ...], Any]]:
    """{names of the layers that lead to a layer: its entry in the config}, without the model's own."""
    if isinstance(node, list):
        for item in node:
            yield from _configs(item, path, top)
    elif isinstance(node, dict):
        config = node.get("config")
        if isinstance(config, dict) and isinstance(name := config.get("name"), str) and "class_name" in node:
            path = () if top else (*path, name)
            top = False
            yield path, node
        for value in node.values():
            yield from _configs(value, path, top)


def _numbered(
    file: Any, datasets: Mapping[str, Any], configs: Mapping[tuple[str, ...], Any]
) -> Iterator[tuple[str, Place]]:
    """Of the layout of Keras 3: groups by the layers' classes, or the attributes that hold them, and a name beside."""
    groups: dict[str, dict[int, str]] = {}
    for path in datasets:
        group, _, number = path.rpartition("/vars/")
        if number.isdecimal() and len(number) < 3:
            groups.setdefault(group, {})[int(number)] = path
    for group, numbered in groups.items():
        parts = group.split("/")
        ancestors = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
        names = tuple(filter(None, (_name_of(file, ancestor) for ancestor in ancestors)))
        entry = configs.get(names)
        paths = [numbered[i] for i in sorted(numbered)]
        shapes = {datasets[path].shape for path in paths}
        if entry is None:  # of a class that is not Keras's, whose parts the config does not tell
            looks_like_one = re.fullmatch(r"(sync_)?batch_norm(alization)?(_\d+)?", parts[-1]) is not None
            four_alike = len(paths) == 4 and len(shapes) == 1 and len(next(iter(shapes))) == 1
            if not (looks_like_one or four_alike) or parts[0] == "optimizer":
                continue
            config: dict[str, Any] = {}
        elif str(entry["class_name"]).endswith("BatchNormalization"):
            config = entry["config"]
        else:
            continue
        kept = _names_in(config)
        problems = []
        if not config and len(paths) == 2:
            kept = kept[2:]
        if len(kept) != len(paths):
            problems.append(f"the file does not tell which {len(paths)} arrays it has: pass the model itself")
            kept = []
        yield "/".join(names or parts), Place(dict(zip(kept, paths, strict=False)), config, problems)


def _name_of(file: Any, group: str) -> str:
    """Of the layer whose arrays are in a group, which Keras writes beside them."""
    name = file[f"{group}/vars"].attrs.get("name", "") if f"{group}/vars" in file else ""
    return name if isinstance(name, str) else ""


def _named(datasets: Mapping[str, Any], configs: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[str, Place]]:
    """Of the layout of Keras 2: each of the model's layers is a group, in which weights have their whole names."""
    layers: dict[str, dict[str, str]] = {}
    for path in datasets:
        if (parsed := _RULES.parse(path.removeprefix("model_weights/"))) is not None:
            layer, name = parsed
            first, _, rest = layer.partition("/")
            layer = rest if rest.split("/")[0] == first else layer  # Keras writes bn/bn/gamma
            layers.setdefault(layer, {})[name] = path
    for layer, found in layers.items():
        if found.keys() & {"moving_mean", "moving_variance"}:
            entry = configs.get(tuple(layer.split("/")), {})
            yield layer, Place(found, entry.get("config", {}), [])


def _names_in(config: Mapping[str, Any]) -> list[str]:
    """The arrays of a layer with this config, in the order of Keras's ``build``."""
    left_out = {"gamma"} if config.get("scale") is False else set()
    left_out |= {"beta"} if config.get("center") is False else set()
    names = _ORDER if config.get("renorm") is True else _ORDER[:4]
    return [name for name in names if name not in left_out]


def _layer(file: Any, place: Place, budget: Budget) -> Layer:
    arrays = {name: _array(file[path], path, budget) for name, path in place.datasets.items() if name in _RULES.names}
    settings = {name: place.config[name] for name, _ in (_RULES.eps, _RULES.momentum) if name in place.config}
    return Layer(_RULES, arrays, settings, place.problems, one_axis(place.config.get("axis")))


def _array(dataset: Any, path: str, budget: Budget) -> np.ndarray:
    if dataset.dtype.kind not in "fiuV" or dataset.dtype.hasobject:
        raise CheckpointError(f"nothing was loaded: {path} has dtype {dataset.dtype}, no numbers")
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"nothing was loaded: {path} lies outside of the file")
    budget.take(path, dataset.nbytes)
    array = dataset[()]
    return array.view(numpy_dtype("bfloat16")) if dataset.attrs.get("dtype") == "bfloat16" else array
