"""`anybn.recalibrate` for torch models: the inputs of their batch norms, watched by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from anybn._recalibrate import Population, bar

Layer = torch.nn.modules.batchnorm._BatchNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _Seen(BaseException):
    """Ends a forward pass that has shown what it was run for. No Exception, which the model itself might catch."""


def recalibrate(
    model: torch.nn.Module,
    batches: Any,
    one_pass: bool,
    forward: Callable[[Any, Any], Any] | None,
    progress: bool,
) -> torch.nn.Module:
    """See `anybn.recalibrate`."""
    layers = [m for m in model.modules() if isinstance(m, Layer) and isinstance(m.running_mean, torch.Tensor)]
    for layer in layers:
        if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
            raise ValueError("a batch norm of the model is lazy and has no channels yet: run a batch through it first")
    if not layers:
        raise ValueError("the model has no batch norm with running statistics: there is nothing to set")
    if not one_pass and len(layers) > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, which can be read once, and {len(layers)} batch norms take as many passes: pass "
            "a list or a DataLoader, or one_pass=True, which is approximate"
        )
    run = _forward if forward is None else forward
    with _evaluating(model), _restored_on_error(layers):
        if one_pass:
            populations = _in_one_pass(model, layers, batches, run, progress)
            for layer, population in populations.items():
                _write(layer, population)
        else:
            _one_by_one(model, layers, batches, run, progress)
    return model


def _forward(model: torch.nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _in_one_pass(
    model: torch.nn.Module, layers: list[Any], batches: Any, run: Callable[[Any, Any], Any], progress: bool
) -> dict[Any, Population]:
    populations: dict[Any, Population] = {}

    def look(layer: Any, x: torch.Tensor) -> None:
        populations.setdefault(layer, Population(layer.num_features)).add(x, 1)

    with _watching(layers, look), _without_statistics(layers):
        for batch in bar(batches, progress):
            run(model, batch)
    if not populations:
        raise ValueError("no batch reached a batch norm of the model: give some, which nobody has read before")
    return populations


def _one_by_one(
    model: torch.nn.Module, layers: list[Any], batches: Any, run: Callable[[Any, Any], Any], progress: bool
) -> None:
    """A pass for the first layer called that is not done, until there is none."""
    done: list[Any] = []
    while len(done) < len(layers):
        watch = _Watch(done)
        with _watching(layers, watch):
            for batch in bar(batches, progress, f"batch norm {len(done) + 1} of {len(layers)}"):
                with suppress(_Seen):
                    run(model, batch)
                watch.next_batch()
        if watch.layer is None:
            break
        _write(watch.layer, watch.population)
        done.append(watch.layer)
    if not done:
        raise ValueError("no batch reached a batch norm of the model: give some, which nobody has read before")


class _Watch:
    """Looks at the input of the first layer that is called and not done, and ends forward passes at its last call."""

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
                raise _Seen

    def next_batch(self) -> None:
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
def _watching(layers: list[Any], look: Callable[[Any, torch.Tensor], None]) -> Iterator[None]:
    def hook(layer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        look(layer, args[0] if args else options["input"])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; and without torch.compile, whose graphs call no hooks."""
    modes = {module: module.training for module in model.modules()}
    set_stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if set_stance is not None:
            stack.enter_context(set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def _without_statistics(layers: list[Any]) -> Iterator[None]:
    """Batch norms that have none normalize with the batch's, and learn nothing."""
    held = [(layer._buffers, {name: layer._buffers[name] for name in _BUFFERS[:2]}) for layer in layers]
    try:
        for buffers, statistics in held:
            buffers.update(dict.fromkeys(statistics))
        yield
    finally:
        for buffers, statistics in held:
            buffers.update(statistics)


@contextmanager
def _restored_on_error(layers: list[Any]) -> Iterator[None]:
    before = [
        (layer._buffers[name], layer._buffers[name].clone())
        for layer in layers
        for name in _BUFFERS
        if layer._buffers[name] is not None
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
