"""``anybn inspect`` and ``anybn convert``: the batch norms in a model's file, looked at and rewritten."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anybn import _networks, interop
from anybn.checkpoints.conventions import CONVENTIONS, Layer
from anybn.checkpoints.translation import state_arrays_in
from anybn.cli.output import complain, print_json, print_table, reading
from anybn.state.state import BatchNormState

HUGE_VARIANCE = 1e6
DEAD_VARIANCE = 1e-12
TINY_WEIGHT = 1e-4


def add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE", help=".safetensors, .npz, .pt, .onnx, .keras, .h5, ...")
    command.add_argument(
        "--from", dest="source", choices=[*CONVENTIONS], metavar="NAME", help="its framework; default: its names tell"
    )
    command.add_argument(
        "--eps", action="append", default=[], metavar="[PATTERN=]NUMBER", help="of the layers that match; repeat it"
    )


def settings(options: argparse.Namespace, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """``--eps 1e-3`` or ``--eps "blocks.*=1e-3"``, by the name that eps has in the file's framework."""
    patterns = {}
    for text in options.eps:
        pattern, _, number = text.rpartition("=")
        try:
            patterns[pattern or "*"] = float(number)
        except ValueError:
            raise ValueError(f"--eps is {text!r}; it must be a number, or PATTERN=NUMBER") from None
    patterns = dict(sorted(patterns.items(), key=lambda item: item[0] == "*"))  # what holds for all others comes last
    return {name: patterns for name in {layer.convention.eps[0] for layer in layers.values()} if patterns}


# -- inspect ---------------------------------------------------------------------------------------------------


def add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="the batch norms in a model's file, and what is suspicious of them")
    add_source(command)
    command.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> int:
    with reading(options.file):
        found = _networks.found_in(options.file, options.source)
    layers = found.layers if found.state is None else {"": _as_layer(found.state)}
    _require_settings_to_be_open(options, found.state)
    if not layers:
        complain(f"{found.origin} has no batch norm: {found.instead}")
        return 1
    seen = [seen_of(name, layer) for name, layer in _networks.with_settings(layers, settings(options, layers)).items()]
    if options.json:
        print_json({"file": str(options.file), "layers": seen, "remark": found.remark})
        return 0
    ranges = ("weight", "bias", "running_mean", "running_var")
    rows = [("layer", "channels", "framework", "eps", "momentum", *ranges, "suspicious")]
    for one in seen:
        eps = f"{one['eps']:g}" + ("" if one["eps_is_told"] else "?")
        momentum = "?" if one["momentum"] is None else f"{one['momentum']:g}"
        shown = (_shown(one["ranges"].get(name)) for name in ranges)
        suspicious = "; ".join(one["suspicious"])
        rows.append((one["layer"], str(one["channels"]), one["framework"], eps, momentum, *shown, suspicious))
    print_table(rows)
    if any(not one["eps_is_told"] for one in seen):
        print("\n? the file does not tell it, this is the framework's default: look into the model's code, pass --eps")
    if found.remark:
        complain(found.remark)
    return 0


def _require_settings_to_be_open(options: argparse.Namespace, state: BatchNormState | None) -> None:
    if state is not None and options.eps:
        raise ValueError(f"--eps was given, but {options.file} is a state's own file, which has it: leave --eps away")


def _as_layer(state: BatchNormState) -> Layer:
    rules = CONVENTIONS["torch"]
    return Layer(rules, state.state_dict("torch"), rules.own_settings(state.eps, state.momentum), [])


def _shown(pair: list[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3g} .. {pair[1]:.3g}"


def seen_of(name: str, layer: Layer) -> dict[str, Any]:
    """What there is to see of a layer, whether it can be loaded or not."""
    rules = layer.convention
    told = layer.settings
    arrays = state_arrays_in(layer)
    (eps, default_eps), (momentum, default_momentum) = rules.eps, rules.momentum
    return {
        "layer": name,
        "channels": max((a.size for a in arrays.values()), default=0),
        "framework": layer.framework,
        "eps": told.get(eps, default_eps),
        "eps_is_told": eps in told,
        "momentum": told.get(momentum, default_momentum),
        "axis": rules.axis if layer.axis is None else layer.axis,
        "ranges": {field: _range(a) for field, a in arrays.items()},
        "suspicious": list(suspicions(layer, arrays)),
    }


def _range(array: np.ndarray) -> list[float]:
    finite = array[np.isfinite(array)]
    return [float(finite.min()), float(finite.max())] if finite.size else [float("nan")] * 2


def suspicions(layer: Layer, arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What a layer of a trained model seldom has, in words."""
    for field, array in arrays.items():
        if (bad := int(np.sum(~np.isfinite(array)))) > 0:
            yield f"{field} is NaN or infinite in {_channels(bad)}"
    variance, mean, weight = (arrays.get(field, np.empty(0)) for field in ("running_var", "running_mean", "weight"))
    found = {
        "negative variance": variance < 0,
        f"variance above {HUGE_VARIANCE:g}": (variance > HUGE_VARIANCE) & np.isfinite(variance),
        f"dead, variance up to {DEAD_VARIANCE:g}": (variance >= 0) & (variance <= DEAD_VARIANCE),
        f"|weight| up to {TINY_WEIGHT:g}": np.abs(weight) <= TINY_WEIGHT,
    }
    for what, channels in found.items():
        if (n := int(np.sum(channels))) > 0:
            yield f"{what} in {_channels(n)}"
    if variance.size and mean.size and np.all(variance == 1) and np.all(mean == 0):
        yield "never updated: every mean is 0, every variance 1"
    try:
        interop.state_of(layer)
    except ValueError as error:
        yield f"cannot be loaded: {str(error).removeprefix('nothing was loaded: ')}"


def _channels(n: int) -> str:
    return "1 channel" if n == 1 else f"{n} channels"


# -- convert ---------------------------------------------------------------------------------------------------


def add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="a new file with a model's batch norms as another framework has them")
    add_source(command)
    command.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors, .npz, .pt or .pth")
    command.add_argument("--to", required=True, choices=[*CONVENTIONS], metavar="NAME", help=", ".join(CONVENTIONS))
    command.add_argument("--force", action="store_true", help="replace OUT where it is there")
    command.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> int:
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} is there already: pass --force to replace it")
    with reading(options.file):
        found = _networks.found_in(options.file, options.source)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            _require_settings_to_be_open(options, found.state)
            states: Mapping[str, BatchNormState] = (
                _networks.states_of(found, settings(options, found.layers))
                if found.state is None
                else {"": found.state}
            )
    renamed = {name.replace("/", ".") if options.to == "torch" else name: state for name, state in states.items()}
    if len(renamed) < len(states):
        raise ValueError(f"two layers of {options.file} have the same name in {options.to}")
    _networks.save_new(options.out, renamed, options.to)
    rules = CONVENTIONS[options.to]
    needed = {name: rules.own_settings(state.eps, state.momentum) for name, state in renamed.items()}
    notes = [str(w.message) for w in warned]
    if options.json:
        print_json({"file": str(options.file), "out": str(options.out), "settings": needed, "warnings": notes})
        return 0
    for note in notes:
        complain(note)
    print(f"{len(renamed)} batch norms in {options.to}'s names: {options.out}")
    groups: dict[str, list[str]] = {}
    for name, own in needed.items():
        groups.setdefault(", ".join(f"{key}={value:g}" for key, value in own.items() if value is not None), []).append(
            name
        )
    print("The file does not tell the settings with which the layers are to be made:\n")
    print_table([("settings", "layers", "such as"), *((text, str(len(n)), n[0]) for text, n in groups.items())])
    return 0
