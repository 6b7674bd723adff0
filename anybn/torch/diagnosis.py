"""`anybn.diagnose` for torch models: the inputs of their batch norms in a forward pass that normalizes with batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from anybn._population import with_progress
from anybn.diagnosis.diagnose import Seen
from anybn.diagnosis.layer import Kept
from anybn.diagnosis.observed import Observed, Pair
from anybn.torch.state import state_of
from anybn.torch.watching import BUFFERS, Layer, check, evaluating, normalizing_with_batches, observed, run_model


def observe(model: torch.nn.Module, batches: Any, forward: Callable[[Any, Any], Any] | None, progress: bool) -> Seen:
    """What the model's batch norms keep, and are shown."""
    layers = _layers(model)
    check(list(layers.values()), batches, True)
    seen = {
        name: (Kept.by(state_of(layer), getattr(layer, "activation", None) == "relu"), Observed(layer.num_features))
        for name, layer in layers.items()
    }
    shown = {layer: seen[name][1] for name, layer in layers.items()}
    run = run_model if forward is None else forward
    with (
        evaluating(model),
        observed(list(shown), lambda layer, x: shown[layer].add(x, 1)),
        normalizing_with_batches(list(shown)),
    ):
        for batch in with_progress(batches, progress, "diagnose"):
            run(model, batch)
    return seen


def scores(model: torch.nn.Module, batches: Any, score: Callable[[Any, Any], float], seen: Seen) -> dict[str, float]:
    """The average score with the running statistics, with those of what was seen, and with those of each batch."""
    if iter(batches) is batches:
        raise ValueError(
            "batches is an iterator, which can be read once, and score reads it three times more: pass a list or a "
            "DataLoader"
        )
    layers = {name: layer for name, layer in _layers(model).items() if len(seen[name][1])}

    def average() -> float:
        found = [float(score(model, batch)) for batch in batches]
        return sum(found) / len(found)

    with evaluating(model):
        running = average()
        with _normalizing_with({layer: seen[name][1].population(ddof=1) for name, layer in layers.items()}):
            recalibrated = average()
        with normalizing_with_batches(list(layers.values())):
            return {"running": running, "recalibrated": recalibrated, "batch": average()}


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer) and isinstance(module.running_mean, torch.Tensor)
    }


@contextmanager
def _normalizing_with(statistics: Mapping[Any, Pair]) -> Iterator[None]:
    """Layers with other running statistics, in buffers of their own."""
    held = [(layer, layer.running_mean, layer.running_var) for layer in statistics]
    try:
        for layer, mean, var in held:
            for name, old, new in zip(BUFFERS, (mean, var), statistics[layer], strict=False):
                layer._buffers[name] = torch.as_tensor(new, dtype=old.dtype, device=old.device)
        yield
    finally:
        for layer, mean, var in held:
            layer._buffers.update(running_mean=mean, running_var=var)
