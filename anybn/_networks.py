"""load_batch_norms: the batch norms of a trained model, from its file or its arrays, without its framework."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anybn import _checks, interop
from anybn.checkpoints.conventions import CONVENTIONS, Convention
from anybn.errors import BackendNotInstalled, CheckpointError
from anybn.state.state import BatchNormState


def load_batch_norms(
    source: str | os.PathLike[str] | Mapping[str, Any], *, convention: str | None = None, **settings: float
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

    Raises CheckpointError for a damaged file, and for layers that lack an array or have impossible ones, all of them
    named; BackendNotInstalled if the file needs a library that is missing; OSError if it cannot be opened; ValueError
    for another suffix or convention; TypeError for another source or setting.

    >>> import numpy as np, anybn
    >>> weights = {"conv.weight": np.ones((4, 3, 3, 3)), "bn.weight": np.ones(4), "bn.bias": np.zeros(4),
    ...            "bn.running_mean": np.zeros(4), "bn.running_var": np.ones(4)}
    >>> anybn.load_batch_norms(weights, eps=1e-3)
    {'bn': BatchNormState(4, eps=0.001, momentum=0.1, dtype='float64') on numpy, 0 batches tracked}
    """
    names = tuple(CONVENTIONS)
    rows = [
        CONVENTIONS[n] for n in (names if convention is None else [_checks.choice("convention", convention, names)])
    ]
    if isinstance(source, Mapping):
        return _states(dict(interop.flat(source)), rows, settings)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source is a {type(source).__name__}; it must be a path or a mapping of names to arrays")
    from anybn.checkpoints import (
        files as _checkpoint,  # as late as in `BatchNormState`: json and hashlib take time to import
    )

    path = Path(source)
    if (read := _READERS.get(path.suffix.lower())) is None:
        raise ValueError(
            f"{path} is none of {', '.join(_READERS)}: read it with its framework and pass names to arrays, "
            "e.g. {w.path: w for w in model.weights} from Keras"
        )
    path.open("rb").close()  # the OSError of a file that is not there tells more than what a library makes of it
    if read is _onnx_layers:
        return _all_of(_undamaged(path, read, settings))
    if read is _safetensors_arrays and _undamaged(path, _checkpoint.is_own):
        if settings:
            raise TypeError(
                f"{', '.join(settings)} given, but {path} is a file of BatchNormState.save, which tells them"
            )
        return {"": BatchNormState.load(path)}
    return _states(_undamaged(path, read, lambda keys: _keys_of(_layers(keys, rows))), rows, settings)


def _undamaged(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """read(path, ...), or a CheckpointError where the file is not what its suffix says."""
    try:
        return read(path, *arguments)
    except (BackendNotInstalled, CheckpointError):
        raise
    except Exception as error:  # each library has its own kinds
        raise CheckpointError(
            f"nothing was loaded: {path} is truncated, damaged or no {path.suffix} file ({error})"
        ) from error


# -- names to states -------------------------------------------------------------------------------------------


def _states(
    arrays: Mapping[str, Any], rows: list[Convention], settings: Mapping[str, float]
) -> dict[str, BatchNormState]:
    layers = {}
    for layer, (rules, names) in _layers(arrays, rows).items():
        twice = [
            f"{' and '.join(map(repr, keys))} are both its {name}" for name, keys in names.items() if len(keys) > 1
        ]
        layers[layer] = rules, {name: arrays[keys[0]] for name, keys in names.items()}, settings, twice
    return _all_of(layers)


def _layers(keys: Iterable[str], rows: list[Convention]) -> dict[str, tuple[Convention, dict[str, list[str]]]]:
    """{layer: (convention, {name: keys})} of everything that has running statistics, in the order of keys.

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
    chosen: dict[str, tuple[Convention, dict[str, list[str]]]] = {}
    taken: set[str] = set()
    for layer, rules, names in sorted(groups, key=lambda group: -len(group[2])):
        keys_of = {key for own in names.values() for key in own}
        if taken.isdisjoint(keys_of):
            chosen[layer] = rules, names
            taken |= keys_of
    return dict(sorted(chosen.items(), key=lambda item: min(position[key] for key in _keys_of(dict([item])))))


def _keys_of(layers: Mapping[str, tuple[Convention, dict[str, list[str]]]]) -> list[str]:
    return [key for _, names in layers.values() for keys in names.values() for key in keys]


def _has_statistics(rules: Convention, names: Mapping[str, list[str]]) -> bool:
    if list(names) in (["mean"], ["var"]):  # words that anybody uses
        return any(key.startswith("batch_stats") for keys in names.values() for key in keys)
    return any(rules.names[name].endswith(("_mean", "_var")) for name in names)


Layer = tuple[Convention, Mapping[str, Any], Mapping[str, float], list[str]]


def _all_of(layers: Mapping[str, Layer]) -> dict[str, BatchNormState]:
    """{layer: state} from {layer: (convention, {name: array}, settings, problems)}, or one error for all of them."""
    states, problems = {}, []
    for layer, (rules, found, settings, own_problems) in layers.items():
        try:
            states[layer] = interop.new_state(found, rules, settings, own_problems)
        except CheckpointError as error:
            problems.append(f"layer {layer!r}: {str(error).removeprefix('nothing was loaded: ')}")
    if problems:
        raise CheckpointError(f"nothing was loaded: {'; '.join(problems)}")
    return states


# -- files -----------------------------------------------------------------------------------------------------

Needed = Callable[[Iterable[str]], list[str]]  # all names -> those to read


def _safetensors_arrays(path: Path, needed: Needed) -> dict[str, Any]:
    from anybn.checkpoints import files as _checkpoint

    with _checkpoint.safetensors().safe_open(path, framework="numpy") as file:
        return _checkpoint.arrays_of(file, needed(file.keys()))


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
    arrays = dict(interop.flat(content, "."))
    return {name: arrays[name] for name in needed(arrays)}


def _onnx_layers(path: Path, settings: Mapping[str, float]) -> dict[str, Layer]:
    """The BatchNormalization nodes of the main graph, whose inputs must be constants. A setting beats an attribute."""
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
        layers[layer] = rules, found, {**own, **settings}, problems
    return layers


def _onnx_name(node: Any) -> str:
    """What the statistics' names share, as "layer1.0.bn1" in torch's; or the node's name; or that of its output."""
    layers = {name.rpartition(".")[0] for name in node.input[3:5]}
    return layers.pop() if len(layers) == 1 and "" not in layers else node.name or node.output[0]


_READERS: dict[str, Callable[..., Any]] = {
    ".safetensors": _safetensors_arrays,
    ".npz": _npz_arrays,
    ".onnx": _onnx_layers,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _torch_arrays),
}
