"""`anybn.recalibrate` for torch models: what reaches their batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from anybn._population import Participants, Population, with_progress
from anybn.torch.watching import BUFFERS, Layer, check, evaluating, normalizing_with_batches, observed, run_model


class _StopForward(BaseException):
    """Ends a forward pass that has shown what it was run for. No Exception, which the model itself might catch."""


def recalibrate(
    model: torch.nn.Module,
    batches: Any,
    group: Any,
    one_pass: bool,
    forward: Callable[[Any, Any], Any] | None,
    progress: bool,
) -> torch.nn.Module:
    """See `anybn.recalibrate`."""
    names = {m: name for name, m in model.named_modules() if isinstance(m, Layer)}
    layers = [m for m in names if isinstance(m.running_mean, torch.Tensor)]
    what = f"{[(names[m], m.num_features) for m in layers]}, one pass: {one_pass}"
    participants = Participants(group, what, layers[0].running_mean if layers else torch.zeros(0))
    with participants.failing_together():
        check(layers, batches, one_pass)
    run = run_model if forward is None else forward

    def run_all(description: str) -> Iterator[None]:
        for batch in with_progress(batches, progress, description):
            with suppress(_StopForward):
                run(model, batch)
            yield

    with evaluating(model), _restored_on_error(layers):
        if one_pass:
            _in_one_pass(layers, run_all, participants)
        else:
            _one_by_one(layers, run_all, participants)
    return model


def _in_one_pass(layers: list[Any], run_all: Callable[[str], Iterator[None]], participants: Participants) -> None:
    seen = {layer: Population(layer.num_features) for layer in layers}

    def observe(layer: Any, x: torch.Tensor) -> None:
        seen[layer].add(x, 1)

    with participants.failing_together(), observed(layers, observe), normalizing_with_batches(layers):
        for _ in run_all("recalibrate"):
            pass
    participants.agree_on_layer(0)
    populations = {layer: participants.merged(population) for layer, population in seen.items()}
    reached = {layer: population for layer, population in populations.items() if np.any(population.moments.count)}
    if not reached:
        raise ValueError("no batch reached a batch norm of the model: give some, which nobody has read before")
    for layer, population in reached.items():
        _write(layer, population)


def _one_by_one(layers: list[Any], run_all: Callable[[str], Iterator[None]], participants: Participants) -> None:
    """Each pass is for the first layer that is called and not done, until there is none."""
    done: list[Any] = []
    while len(done) < len(layers):
        next_layer = _NextLayer(done)
        with participants.failing_together(), observed(layers, next_layer):
            for _ in run_all(f"batch norm {len(done) + 1} of {len(layers)}"):
                next_layer.end_batch()
        index = None if next_layer.layer is None else layers.index(next_layer.layer)
        found = participants.agree_on_layer(index)
        if found is None:
            break
        layer = layers[found]
        population = Population(layer.num_features) if index is None else next_layer.population
        _write(layer, participants.merged(population))
        done.append(layer)
    if not done:
        raise ValueError("no batch reached a batch norm of the model: give some, which nobody has read before")


class _NextLayer:
    """The first layer that is called and not done. It collects its input, and ends forward passes at its last call."""

    population: Population

    def __init__(self, done: list[Any]):
        self.done, self.layer = done, None
        self.calls = self.last_call = 0

    def __call__(self, layer: Any, x: torch.Tensor) -> None:
        if self.layer is None and layer not in self.done:
            self.layer, self.population = layer, Population(layer.num_features)
        if layer is self.layer:
            self.population.add(x, 1)
            self.calls += 1
            if self.calls == self.last_call:
                raise _StopForward

    def end_batch(self) -> None:
        self.last_call = self.last_call or self.calls  # the first batch ran to its end, which tells how often it calls
        self.calls = 0


def _write(layer: Any, population: Population) -> None:
    mean, var = population.statistics(ddof=1)
    with torch.no_grad():
        layer.running_mean.copy_(torch.from_numpy(mean))
        layer.running_var.copy_(torch.from_numpy(var))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(population.batches)


@contextmanager
def _restored_on_error(layers: list[Any]) -> Iterator[None]:
    before = [
        (layer._buffers[name], layer._buffers[name].clone())
        for layer in layers
        for name in BUFFERS
        if layer._buffers[name] is not None
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
