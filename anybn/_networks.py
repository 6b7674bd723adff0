"""load_batch_norms: the batch norms of a trained model, from its file or its arrays, without its framework."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anybn.checkpoints.conventions import CONVENTIONS, Convention, ConventionName, Layer, convention_called, flattened
from anybn.errors import CheckpointError
from anybn.interop import state_of
from anybn.state.state import BatchNormState


def load_batch_norms(
    source: str | os.PathLike[str] | Mapping[str, Any], *, convention: ConventionName | None = None, **settings: float
) -> dict[str, BatchNormState]:
    """The batch norms of a trained model as ``{name: BatchNormState}``, in NumPy, to evaluate them with any library.

    Args:
        source: a file, or names to arrays of any library, flat or nested as the framework has them (torch's state_dict,
            Flax's variables, ``{"params": params, "state": state}`` of Haiku, ``{w.path: w for w in model.weights}`` of
            Keras, ``mx.nd.load``'s arrays as NumPy). Files, told by their suffix:

            - ``.safetensors``: of any framework, or from `BatchNormState.save`; the arrays of other layers stay unread;
            - ``.npz``: likewise, of MLX or Chainer for example; nothing in it is unpickled;
            - ``.pt``, ``.pth``, ``.bin``, ``.ckpt``: through torch, with ``weights_only=True``;
            - ``.onnx``: through onnx; the nodes of the main graph, with their eps and momentum, which no other of
              these files tells.
        convention: one of `anybn.interop.CONVENTIONS`; by default each layer's is told by its names, which they do, but
            for ``"mxnet-fix-gamma"``. An ONNX file needs none.
        settings: eps and momentum of all layers by the framework's names and in its meaning, as in
            `anybn.interop.from_state_dict`; the default is the framework's. Look into the model's code: evaluation
            depends on eps.

    Returns:
        States by the names of their layers, ``"layer1.0.bn1"``; ``""`` for arrays without a layer's name. A layer is a
        batch norm if it has a running mean or variance: other entries are ignored, and so are batch norms without
        running statistics, which no name tells from a layer norm. torch's ``InstanceNorm`` that tracks statistics looks
        the same as a batch norm.

    A file need not be trusted. Nothing in it is executed, no module is imported because it says so, and other layers'
    arrays are not taken. Those that are must come to less than 16 MiB and 8 times the file's size; the states, which
    are float64, and copies on the way need a few times that. One thing is left to torch: its restricted unpickler reads
    the pickle of a .pt file. It runs nothing, but may build objects of any size.

    Raises CheckpointError for a damaged or forged file, and for layers that lack an array or have impossible ones, all
    of them named; BackendNotInstalled if the file needs a library that is missing; OSError if it cannot be opened;
    ValueError for another suffix, convention or value of a setting; TypeError for another source or setting.

    >>> import numpy as np, anybn
    >>> weights = {"conv.weight": np.ones((4, 3, 3, 3)), "bn.weight": np.ones(4), "bn.bias": np.zeros(4),
    ...            "bn.running_mean": np.zeros(4), "bn.running_var": np.ones(4)}
    >>> anybn.load_batch_norms(weights, eps=1e-3)
    {'bn': BatchNormState(4, eps=0.001, momentum=0.1, dtype='float64') on numpy, 0 batches tracked}
    """
    rows = list(CONVENTIONS.values()) if convention is None else [convention_called(convention)]
    if isinstance(source, Mapping):
        return _states(_layers(dict(flattened(source)), rows), settings)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source is a {type(source).__name__}; it must be a path or a mapping of names to arrays")
    from anybn.checkpoints import files, readers  # late: json, hashlib and zipfile take time to import

    path = Path(source)
    suffix = path.suffix.lower()
    if (read := readers.READERS.get(suffix)) is None:
        raise ValueError(
            f"{path} is none of {', '.join(readers.READERS)}: read it with its framework and pass names to arrays, "
            "e.g. {w.path: w for w in model.weights} from Keras"
        )
    path.open("rb").close()  # the OSError of a file that is not there tells more than what a library makes of it
    with files.checkpoint_errors(f"nothing was loaded: {path} is truncated, damaged or no {path.suffix} file"):
        if suffix == ".onnx":
            layers = read(path)
        elif suffix == ".safetensors" and readers.is_a_state(path):
            layers = None
        else:
            layers = _layers(read(path, lambda keys: _keys_of(_batch_norms_among(keys, rows))), rows)
    if layers is not None:
        return _states(layers, settings)
    if settings:
        raise TypeError(f"{', '.join(settings)} given, but {path} is a file of BatchNormState.save, which tells them")
    return {"": BatchNormState.load(path)}


Found = dict[str, tuple[Convention, dict[str, list[str]]]]
"""{layer: (convention, {name: keys})}; a name with more than one key is an error, told later."""


def _batch_norms_among(keys: Iterable[str], rows: list[Convention]) -> Found:
    """Everything that has running statistics, in the order of keys.

    Where conventions share names, that of the largest group counts; of several, the first in the table.
    """
    position = {key: i for i, key in enumerate(keys)}
    groups: list[tuple[str, Convention, dict[str, list[str]]]] = []
    for rules in rows:
        layers: dict[str, dict[str, list[str]]] = {}
        for key in position:
            if (parsed := rules.parse(key)) is not None:
                layer, name = parsed
                layers.setdefault(layer, {}).setdefault(name, []).append(key)
        groups += [(layer, rules, names) for layer, names in layers.items() if _has_statistics(rules, names)]
    chosen: Found = {}
    taken: set[str] = set()
    for layer, rules, names in sorted(groups, key=lambda group: -len(group[2])):
        its_keys = {key for keys_of_name in names.values() for key in keys_of_name}
        if taken.isdisjoint(its_keys):
            chosen[layer] = rules, names
            taken |= its_keys
    return dict(sorted(chosen.items(), key=lambda item: min(position[key] for key in _keys_of(dict([item])))))


def _keys_of(found: Found) -> list[str]:
    return [key for _, names in found.values() for keys in names.values() for key in keys]


def _has_statistics(rules: Convention, names: Mapping[str, list[str]]) -> bool:
    if list(names) in (["mean"], ["var"]):  # words that anybody uses
        return any(key.startswith("batch_stats") for keys in names.values() for key in keys)
    return any(rules.names[name].endswith(("_mean", "_var")) for name in names)


def _layers(arrays: Mapping[str, Any], rows: list[Convention]) -> dict[str, Layer]:
    """The batch norms among a model's arrays, by name."""
    layers = {}
    for layer, (rules, names) in _batch_norms_among(arrays, rows).items():
        first = {name: arrays[keys[0]] for name, keys in names.items()}
        twice = [
            f"{' and '.join(map(repr, keys))} are both its {name}" for name, keys in names.items() if len(keys) > 1
        ]
        layers[layer] = Layer(rules, first, {}, twice)
    return layers


def _states(layers: Mapping[str, Layer], settings: Mapping[str, float]) -> dict[str, BatchNormState]:
    """All of them, or one error for all of them. These settings come before those that a layer tells."""
    states, problems = {}, []
    for name, layer in layers.items():
        layer.convention.state_settings(
            settings
        )  # raises for what the caller gave; what is wrong below, the layer told
        try:
            states[name] = state_of(layer._replace(settings={**layer.settings, **settings}))
        except ValueError as error:
            problems.append(f"layer {name!r}: {str(error).removeprefix('nothing was loaded: ')}")
    if problems:
        raise CheckpointError(f"nothing was loaded: {'; '.join(problems)}")
    return states
