"""Looking at the inputs of a torch model's batch norms, by hooks, while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from anybn._population import check_batches

Layer = torch.nn.modules.batchnorm._BatchNorm

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def check(layers: list[Any], batches: Any, one_pass: bool) -> None:
    for layer in layers:
        if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
            raise ValueError("a batch norm of the model is lazy and has no channels yet: run a batch through it first")
    if not layers:
        raise ValueError("the model has no batch norm with running statistics")
    check_batches(batches)
    if not one_pass and len(layers) > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, which can be read once, and {len(layers)} batch norms take as many passes: pass "
            "a list or a DataLoader, or one_pass=True, which is approximate"
        )


def run_model(model: torch.nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def observed(layers: list[Any], observe: Callable[[Any, torch.Tensor], None]) -> Iterator[None]:
    def hook(layer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        observe(layer, args[0] if args else options["input"])

    try:
        for layer in layers:
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        yield
    finally:  # not by handles: an interrupt can come before one is kept
        for layer in layers:
            for key in [key for key, found in layer._forward_pre_hooks.items() if found is hook]:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; and without torch.compile, whose graphs call no hooks."""
    modes = {module: module.training for module in model.modules()}
    set_stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if set_stance is not None and "torch._dynamo" in sys.modules:  # else nothing has been compiled
            stack.enter_context(set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def normalizing_with_batches(layers: list[Any]) -> Iterator[None]:
    """Without running statistics, layers normalize with the batch's and learn nothing; without a group, with no other
    member's."""
    held = [(layer, {name: layer._buffers[name] for name in BUFFERS[:2]}, vars(layer).get("group")) for layer in layers]
    try:
        for layer, statistics, group in held:
            layer._buffers.update(dict.fromkeys(statistics))
            if group is not None:
                layer.group = None
        yield
    finally:
        for layer, statistics, group in held:
            layer._buffers.update(statistics)
            if group is not None:
                layer.group = group
