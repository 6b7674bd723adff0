"""Batch norms among a model's arrays, told by the names that frameworks give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anybn.checkpoints.conventions import Convention, Layer

Found = dict[str, tuple[Convention, dict[str, list[str]]]]
"""{layer: (convention, {name: keys})}; a name with more than one key is an error, told later."""


def batch_norms_among(keys: Iterable[str], rows: list[Convention]) -> Found:
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
    return dict(sorted(chosen.items(), key=lambda item: min(position[key] for key in keys_of(dict([item])))))


def keys_of(found: Found) -> list[str]:
    return [key for _, names in found.values() for keys in names.values() for key in keys]


def _has_statistics(rules: Convention, names: Mapping[str, list[str]]) -> bool:
    if list(names) in (["mean"], ["var"]):  # words that anybody uses
        return any(key.startswith("batch_stats") for keys in names.values() for key in keys)
    return any(rules.names.get(name, "").endswith(("_mean", "_var")) for name in names)


def layers_of(found: Found, arrays: Mapping[str, Any]) -> dict[str, Layer]:
    """The batch norms that were found among a model's arrays."""
    layers = {}
    for layer, (rules, names) in found.items():
        first = {name: arrays[keys[0]] for name, keys in names.items()}
        twice = [
            f"{' and '.join(map(repr, keys))} are both its {name}" for name, keys in names.items() if len(keys) > 1
        ]
        layers[layer] = Layer(rules, first, {}, twice)
    return layers


def what_there_is(keys: Iterable[str]) -> str:
    """What names without any batch norm hold in place of one."""
    keys = list(keys)
    if not keys:
        return "it holds no arrays"
    some = ", ".join(f"{key!r:.80}" for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
    stems: dict[str, set[str]] = {}
    for key in keys:
        stem, _, last = key.replace("/", ".").rpartition(".")
        stems.setdefault(stem, set()).add(last)
    biased = [stem for stem, names in stems.items() if "bias" in names and names & {"weight", "kernel"}]
    folded = f"; {len(biased)} layers have a weight and a bias, into which exporters fold batch norms" if biased else ""
    return f"none of its {len(keys)} names ({some}) is that of a running mean or variance{folded}"
