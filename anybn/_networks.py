"""The batch norms of a trained model: out of its file, its arrays or itself, and back into them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from anybn._layer import BatchNorm
from anybn.backends.registry import backend_for
from anybn.checkpoints import finding, live
from anybn.checkpoints.conventions import CONVENTIONS, Convention, ConventionName, Layer, convention_called, flattened
from anybn.errors import CheckpointError
from anybn.interop import state_of
from anybn.state.state import BatchNormState


class BatchNorms(dict[str, BatchNormState]):
    """``{layer: state}``, a dict, and how the layers are called.

    Attributes:
        axes: ``{layer: axis}`` of x's channels, by what the source tells or else as the framework's layers have it.
    """

    def __init__(self, states: Mapping[str, BatchNormState], axes: dict[str, int]):
        super().__init__(states)
        self.axes = axes

    def layers(self) -> dict[str, BatchNorm]:
        """The same as layers in evaluation mode, each over its state and with its axis.

        >>> import numpy as np, anybn
        >>> found = anybn.load_batch_norms({"bn/moving_mean": np.zeros(2), "bn/moving_variance": np.ones(2)}, epsilon=1)
        >>> found.layers()["bn"](np.ones((4, 3, 2), "float32")).shape
        (4, 3, 2)
        """
        return {
            name: BatchNorm(state.num_features, axis=self.axes[name], state=state).eval()
            for name, state in self.items()
        }


Setting = float | Mapping[str, float]
"""One for all layers, or by pattern."""


def load_batch_norms(source: Any, *, convention: ConventionName | None = None, **settings: Setting) -> BatchNorms:
    """The batch norms of a trained model as ``{name: BatchNormState}``, in NumPy, to evaluate them with any library.

    Args:
        source: a model, a file, or names to arrays.

            A model of torch, Keras or Flax NNX, or ``(model, state)`` of Equinox: every layer with its own settings.

            A file, told by its suffix:

            - ``.keras``, and ``.h5`` of a whole Keras model: through h5py, with the settings of each layer;
            - ``.onnx``: through onnx, with the settings of each node; of the graph, the graphs in it, and functions;
            - ``.safetensors``: of any framework, or from `BatchNormState.save`; the arrays of other layers stay unread;
            - ``.npz``: likewise, of MLX or Chainer for example; nothing in it is unpickled;
            - ``.pt``, ``.pth``, ``.bin``, ``.ckpt``: through torch, with ``weights_only=True``;
            - ``.weights.h5`` of Keras.

            Arrays of any library by name, flat or nested as the framework has them: torch's state_dict, Flax's
            variables, ``nnx.to_flat_state``, ``{"params": params, "state": state}`` of Haiku, ``mx.nd.load``'s arrays
            as NumPy.
        convention: one of `anybn.interop.CONVENTIONS`; by default each layer's is told by its names, which they do, but
            for ``"mxnet-fix-gamma"``. Models, ONNX and Keras's files need none.
        settings: eps and momentum by the framework's names and in its meaning, as in
            `anybn.interop.from_state_dict`: a number for all layers, or ``{pattern: number}``, of which the first
            pattern counts that a layer's name matches (`fnmatch`), ``eps={"blocks.*": 1e-3, "*": 1e-5}``. They come
            before what the source tells.

    Returns:
        A dict (`BatchNorms`) of states by the names of their layers, ``"layer1.0.bn1"``; ``""`` for arrays without a
        layer's name, and for a model that is one layer. Among names and arrays, a layer is a batch norm if it has a
        running mean or variance: other entries are ignored, and so are batch norms without running statistics, which no
        name tells from a layer norm. There torch's ``InstanceNorm`` that tracks statistics looks the same as a batch
        norm.

    Evaluation depends on eps, and arrays do not tell it: where neither the source nor settings do, the framework's
    default is assumed, with a UserWarning that names it and the layers. Look into the model's code.

    A file need not be trusted. Nothing in it is executed, no module is imported because it says so, and other layers'
    arrays are not taken. Those that are must come to less than 16 MiB and 8 times the file's size; the states, which
    are float64, and copies on the way need a few times that. Two things are left to others: torch's restricted
    unpickler reads the pickle of a .pt file, runs nothing, but may build objects of any size; HDF5 reads Keras's files,
    and does not promise to end, or not to crash, on bytes that it did not write: take those only from whom you trust.

    Raises CheckpointError for a damaged or forged file, for a source without any batch norm, which says what was found
    there, and for layers that lack an array or have impossible ones, all of them named; BackendNotInstalled if the file
    needs a library that is missing; OSError if it cannot be opened; ValueError for another suffix, convention, value
    of a setting or a pattern that no layer matches; TypeError for another source or setting.

    >>> import numpy as np, anybn
    >>> weights = {"conv.weight": np.ones((4, 3, 3, 3)), "bn.weight": np.ones(4), "bn.bias": np.zeros(4),
    ...            "bn.running_mean": np.zeros(4), "bn.running_var": np.ones(4)}
    >>> anybn.load_batch_norms(weights, eps=1e-3)
    {'bn': BatchNormState(4, eps=0.001, momentum=0.1, dtype='float64') on numpy, 0 batches tracked}
    """
    found = found_in(source, convention)
    if found.state is not None:
        if settings:
            raise TypeError(
                f"{', '.join(settings)} given, but {found.origin} is a file of BatchNormState.save, which tells them"
            )
        return BatchNorms({"": found.state}, {"": 1})
    return states_of(found, settings)


class Found(NamedTuple):
    """What a source has."""

    origin: str
    """what to call it in messages"""
    layers: dict[str, Layer]
    instead: str
    """what it has where it has no batch norm"""
    by_name: finding.Found = {}  # noqa: RUF012 never written to
    """the keys of the layers' arrays, where they have keys"""
    remark: str = ""
    """what else its owner is to know"""
    state: BatchNormState | None = None
    """of a file of our own"""


def found_in(source: Any, convention: ConventionName | None, argument: str = "source") -> Found:
    """The batch norms of a source as they are written there. Raises as `load_batch_norms` does."""
    rows = list(CONVENTIONS.values()) if convention is None else [convention_called(convention)]
    if (model := live.model_of(source)) is not None:
        return Found("the model", model.layers(), model.contents())
    if isinstance(source, (str, os.PathLike)):
        return _found_in_file(Path(source), rows)
    arrays = dict(flattened(_mapping(source, argument)))
    by_name = finding.batch_norms_among(arrays, rows)
    return Found("the mapping", finding.layers_of(by_name, arrays), finding.what_there_is(arrays), by_name)


def _mapping(source: Any, argument: str) -> Mapping[Any, Any]:
    """names to arrays, as a mapping or, from Flax and MLX, as pairs."""
    if isinstance(source, Sequence) and source:
        named = (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], (str, tuple)) for item in source)
        if all(named):
            return dict(source)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{argument} is a {type(source).__name__}; it must be a model of torch, Keras or Flax NNX, (model, state) "
            "of Equinox, a path or a mapping of names to arrays"
        )
    return source


def _found_in_file(path: Path, rows: list[Convention]) -> Found:
    from anybn.checkpoints import files, keras_files, onnx_graphs, readers  # late: json and zipfile take time to import

    suffix = path.suffix.lower()
    if suffix not in (known := (".keras", ".h5", ".onnx", *readers.READERS)):
        raise ValueError(
            f"{path} is none of {', '.join(known)}: read it with its framework, and pass the model, or names to arrays"
        )
    path.open("rb").close()  # the OSError of a file that is not there tells more than what a library makes of it
    with files.checkpoint_errors(f"nothing was loaded: {path} is truncated, damaged or no {path.suffix} file"):
        if suffix == ".onnx":
            contents = onnx_graphs.contents_of(path)
            return Found(str(path), contents.layers, contents.instead(), remark=contents.remark(path))
        if suffix in (".keras", ".h5"):
            return Found(str(path), keras_files.layers_of(path), "none of its layers is a BatchNormalization")
        if suffix == ".safetensors" and readers.is_a_state(path):
            return Found(str(path), {}, "", state=BatchNormState.load(path))
        names: list[str] = []
        by_name: finding.Found = {}

        def needed(keys: Iterable[str]) -> list[str]:
            names.extend(keys)
            by_name.update(finding.batch_norms_among(names, rows))
            return finding.keys_of(by_name)

        arrays = readers.READERS[suffix](path, needed)
        return Found(str(path), finding.layers_of(by_name, arrays), finding.what_there_is(names), by_name)


def states_of(found: Found, settings: Mapping[str, Setting]) -> BatchNorms:
    """All of them, or one error for all of them. These settings come before those that a layer tells."""
    if not found.layers:
        raise CheckpointError(f"nothing was loaded: {found.origin} has no batch norm: {found.instead}")
    states, problems = {}, []
    layers = with_settings(found.layers, settings)
    for name, layer in layers.items():
        try:
            states[name] = state_of(layer)
        except ValueError as error:
            problems.append(f"layer {name!r}: {str(error).removeprefix('nothing was loaded: ')}")
    if problems:
        raise CheckpointError(f"nothing was loaded: {'; '.join(problems)}")
    for text in (*_assumptions(found.origin, layers), *([found.remark] if found.remark else [])):
        warnings.warn(text, UserWarning, stacklevel=3)
    axes = {name: layer.convention.axis if layer.axis is None else layer.axis for name, layer in layers.items()}
    return BatchNorms(states, axes)


def with_settings(layers: Mapping[str, Layer], settings: Mapping[str, Setting]) -> dict[str, Layer]:
    """The layers with the settings that are given for each. Raises TypeError or ValueError for what was given."""
    given = {key: value if isinstance(value, Mapping) else {"*": value} for key, value in settings.items()}
    for rules in {id(layer.convention): layer.convention for layer in layers.values()}.values():
        for setting, values in given.items():
            for value in values.values():
                rules.state_settings({setting: value})
    for setting, values in given.items():
        for pattern in values:
            if not any(fnmatchcase(name, pattern) for name in layers):
                some = ", ".join(map(repr, [*layers][:3]))
                raise ValueError(f"{setting} has the pattern {pattern!r}, but no layer matches it; there are {some}")
    result = {}
    for name, layer in layers.items():
        own = dict(layer.settings)
        for setting, values in given.items():
            own.update((setting, value) for pattern, value in [*values.items()][::-1] if fnmatchcase(name, pattern))
        result[name] = layer._replace(settings=own)
    return result


def _assumptions(origin: str, layers: Mapping[str, Layer]) -> list[str]:
    """What was assumed of layers whose eps nothing tells, in words."""
    assumed: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        eps, momentum = layer.convention.eps, layer.convention.momentum
        if eps[0] not in layer.settings:
            values = [f"{key}={value}" for key, value in (eps, momentum) if value and key not in layer.settings]
            assumed.setdefault((eps[0], ", ".join(values)), []).append(name)
    return [
        f"{origin} does not tell {setting}: assumed {values} for {len(names)} layers, from {names[0]!r} to "
        f"{names[-1]!r}. Evaluation depends on it: look into the model's code, and pass {setting}=, one number or "
        "{pattern of names: number}"
        for (setting, values), names in assumed.items()
    ]


# -- the way back ----------------------------------------------------------------------------------------------


def save_batch_norms(
    target: Any,
    states: Mapping[str, BatchNormState],
    convention: ConventionName | None = None,
    *,
    like: str | os.PathLike[str] | None = None,
) -> Any:
    """Put states into a trained model, by the names that `load_batch_norms` gives them. All of them or none.

    Args:
        target: what they go into.

            - A model of torch, Keras or Flax NNX: its own arrays get the values, and its layers eps and momentum.
            - ``(model, state)`` of Equinox, or names to arrays, which do not change: a copy is returned.
            - A path: the file gets a copy of the file ``like``, by default of itself, in which these arrays have new
              values and everything else is as it was, in its dtypes: .safetensors and .npz, where not even a byte of
              the rest changes; .pt, .pth, .bin, .ckpt, through torch's own loader with ``weights_only=True``; .keras
              and .h5 of Keras, whose settings follow. It replaces the old one whole. Where neither is there, a new
              file has these arrays alone: .safetensors, .npz, .pt or .pth.
        states: by name; layers that are not named stay as they are.
        convention: of a new file's names. Otherwise it is that of the layers found; naming another is an error.

    Returns the model, or its copy; None for a path.

    Not every target tells eps and momentum, see `load_batch_norms`: where it does not, they stay with you.

    Raises CheckpointError that lists every state without a layer, or that does not fit the one of its name, with
    everything as it was; and as `load_batch_norms` does.

    >>> import numpy as np, anybn
    >>> weights = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2),
    ...            "bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)}
    >>> states = anybn.load_batch_norms(weights, eps=1e-3)
    >>> y = anybn.batch_norm(np.array([[0.0, 0.0], [2.0, 4.0]]), states["bn"], training=True)
    >>> anybn.save_batch_norms(weights, states)["bn.running_mean"]
    array([0.1, 0.2])
    """
    if not isinstance(states, Mapping):
        raise TypeError(f"states is a {type(states).__name__}; it must be a mapping of names to BatchNormState")
    for name, state in states.items():
        if not isinstance(state, BatchNormState):
            raise TypeError(f"states[{name!r}] is a {type(state).__name__}; it must be a BatchNormState")
    if (model := live.model_of(target)) is not None:
        return model.written(_values(states, model.layers(), convention, "the model"))
    if isinstance(target, (str, os.PathLike)):
        return _save_file(Path(target), states, convention, None if like is None else Path(like))
    found = found_in(target, convention, "target")
    values = _values(states, found.layers, convention, found.origin)
    return _replaced(_mapping(target, "target"), _by_key(values, found.by_name), "")


def _values(
    states: Mapping[str, BatchNormState], layers: Mapping[str, Layer], convention: str | None, origin: str
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """{layer: (arrays, settings)} as the layers of these names take them."""
    from anybn.checkpoints.replacing import in_numpy, replacements

    problems, values = [], {}
    for name, state in states.items():
        if (layer := layers.get(name)) is None:
            problems.append(f"there is no layer {name!r}")
            continue
        own = layer.framework
        try:
            if convention is not None and layer.convention != convention_called(convention):
                raise CheckpointError(f"it is of {own}, not of {convention}")
            snapshot = state._store.snapshot()
            exact = {field: snapshot.values_of(field) for field in snapshot.held()}
            arrays = replacements(layer, state._settings(), in_numpy(snapshot.named()) | exact, own)
            settings = layer.convention.own_settings(state.eps, state.momentum)
            values[name] = arrays, {key: value for key, value in settings.items() if key in layer.settings}
        except ValueError as error:
            problems.append(f"layer {name!r}: {error}")
    if problems:
        known = f"{', '.join(map(repr, [*layers][:5])) or 'no batch norm'}{', ...' if len(layers) > 5 else ''}"
        raise CheckpointError(f"nothing was saved: {'; '.join(problems)}; {origin} has {known}")
    return values


def _by_key(values: Mapping[str, Any], found: finding.Found) -> dict[str, Any]:
    return {found[layer][1][name][0]: array for layer, (arrays, _) in values.items() for name, array in arrays.items()}


def _replaced(tree: Any, arrays: Mapping[str, Any], prefix: str) -> Any:
    """A tree of mappings and tuples with other arrays at some of its paths, each in the library of the one before."""
    if isinstance(tree, Mapping):
        new = {}
        for key, value in tree.items():
            text = "/".join(map(str, key)) if isinstance(key, tuple) else key
            new[key] = _replaced(value, arrays, f"{prefix}{text}/")
        return new
    if isinstance(tree, tuple):
        return tuple(_replaced(value, arrays, f"{prefix}{i}/") for i, value in enumerate(tree))
    if (array := arrays.get(prefix[:-1])) is None:
        return tree
    backend = backend_for(tree)
    return backend.from_numpy(array, backend.device_of(tree))


def _save_file(
    path: Path, states: Mapping[str, BatchNormState], convention: ConventionName | None, like: Path | None
) -> None:
    from anybn.checkpoints import files, writers

    suffix = path.suffix.lower()
    source = like or (path if path.exists() else None)
    if source is None:
        if convention is None:
            raise ValueError(f"{path} is not there: a new file needs convention=")
        save_new(path, states, convention)
        return
    if source.suffix.lower() != suffix:
        raise ValueError(f"{path} is to be a copy of {source}, which is of another kind: name it {source.suffix}")
    if suffix not in (known := (*writers.COPIES, ".keras", ".h5")):
        raise ValueError(f"{path} is none of {', '.join(known)}: put the states into the model, and save that")
    found = found_in(source, convention)
    if found.state is not None:
        raise ValueError(f"{source} is a file of BatchNormState.save: use state.save")
    values = _values(states, found.layers, convention, str(source))
    with files.replacing(path.resolve()) as temporary:
        if suffix in (".keras", ".h5"):
            writers.copy_keras(source, temporary, values)
        else:
            writers.COPIES[suffix](source, temporary, _by_key(values, found.by_name))


def save_new(path: Path, states: Mapping[str, BatchNormState], convention: ConventionName) -> None:
    """A file of these arrays alone. Raises ValueError for a suffix that it cannot have."""
    from anybn.checkpoints import files, writers
    from anybn.checkpoints.replacing import in_numpy

    if (write := writers.NEW.get(path.suffix.lower())) is None:
        raise ValueError(f"{path} is to be a new file: name it one of {', '.join(writers.NEW)}")
    separator = convention_called(convention).separators[0]
    arrays = {
        f"{name}{separator}{key}" if name else key: array
        for name, state in states.items()
        for key, array in in_numpy(state.state_dict(convention)).items()
    }
    with files.replacing(path.resolve()) as temporary:
        write(temporary, arrays)
