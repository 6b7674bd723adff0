"""What each batch norm takes inside a net: its forward and its backward pass, where a convolution has just run.

   python benchmarks/layers.py resnet50 --format last              # a training step, a line for each layer
   python benchmarks/layers.py resnet50 --fuse                     # with what ``fuse=`` makes part of a batch norm
   python benchmarks/layers.py densenet121 --evaluation

A benchmark of one layer has warm caches; in a net, the operation before has filled them with something else. That is
why both are measured. Whole steps differ by more from turn to turn than batch norm takes of them; here a convolution's
noise does not count. Of timm's batch norms, a relu inside counts, which anybn makes part of them; another activation
does not.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor, nn

import anybn.torch


class Pass(NamedTuple):
    """Where a batch norm ran and how long it took."""

    layer: int
    shape: tuple[int, ...]
    backward: bool
    seconds: float


@contextmanager
def timed(model: nn.Module) -> Iterator[list[Pass]]:
    """Times the batch norms of a model inside this block."""
    passes: list[Pass] = []
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for number, module in enumerate(found):
        module.forward = _timed_forward(number, module, passes)  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        for module in found:
            del module.forward


def _timed_forward(layer: int, module: nn.Module, passes: list[Pass]) -> Any:
    forward, act = module.forward, getattr(module, "act", None)
    counts_all = act is None or isinstance(act, (nn.Identity, nn.ReLU))

    def run(x: Tensor, *others: Any, **named: Any) -> Tensor:
        ends: list[tuple[float, Tensor]] = []
        hook = None if counts_all else act.register_forward_pre_hook(lambda _, y: ends.append((perf_counter(), y[0])))
        begin = perf_counter()
        y = forward(x, *others, **named)
        ends.append((perf_counter(), y))
        if hook is not None:
            hook.remove()
        end, normalized = ends[0]
        passes.append(Pass(layer, tuple(x.shape), False, end - begin))
        if normalized.grad_fn is not None:
            _time_backward(
                normalized.grad_fn, x.grad_fn, lambda seconds: passes.append(Pass(layer, tuple(x.shape), True, seconds))
            )
        return y

    return run


def _time_backward(first: Any, beyond: Any, done: Any) -> None:
    """Times the nodes of the graph from ``first`` to the one before ``beyond``."""
    begin = seconds = 0.0

    def start(_: Any) -> None:
        nonlocal begin
        begin = perf_counter()

    def stop(*_: Any) -> None:
        nonlocal seconds
        seconds += perf_counter() - begin

    node = first
    while True:
        node.register_prehook(start)
        node.register_hook(stop)
        if any(following is beyond for following, _ in node.next_functions):
            break
        node = node.next_functions[0][0]
    node.register_hook(lambda *_: done(seconds))


class Separate(nn.modules.batchnorm._BatchNorm):
    """A batch norm of a fused net in torch's operations, one after the other."""

    def __init__(self, module: nn.modules.batchnorm._BatchNorm):
        super().__init__(module.num_features, module.eps, module.momentum)
        self.load_state_dict(module.state_dict())

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return nn.functional.relu(y, inplace=True) if activation else y

    def _check_input_dim(self, _: Tensor) -> None:
        pass


def separated(fused: nn.Module) -> nn.Module | None:
    """A fused net with torch's operations in place of anybn's calls; None if it has other classes of batch norms than
    torch has, such as timm's."""
    model, own = copy.deepcopy(fused), (anybn.torch.BatchNorm1d, anybn.torch.BatchNorm2d, anybn.torch.BatchNorm3d)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in own:
                return None
            model.set_submodule(name, Separate(module))
    return model


def medians(runs: list[list[Pass]]) -> list[Pass]:
    """Of the same step run several times: each pass with its median time."""
    return [same[0]._replace(seconds=statistics.median(p.seconds for p in same)) for same in zip(*runs, strict=True)]


def milliseconds(passes: list[Pass], backward: bool) -> float:
    return sum(p.seconds for p in passes if p.backward == backward) * 1e3


def main() -> None:
    import nets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=nets.NETS)
    parser.add_argument("--format", choices=nets.FORMATS, default="first")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    net, memory_format = nets.NETS[options.net], nets.FORMATS[options.format]
    models, (x, target) = nets.contestants(net, memory_format), nets.inputs(net, memory_format)
    theirs, ours = ("separate", "fused") if options.fuse else ("torch", "converted")
    if theirs not in models:
        raise SystemExit(f"{options.net} has batch norms of other classes than torch's: leave --fuse away")
    runs = {
        name: nets.evaluation(models[name], x) if options.evaluation else nets.step(models[name], x, target)
        for name in (theirs, ours)
    }
    found = nets.layers_of(models, runs, options.rounds)
    print(f"{'layer':>5}  {'shape':24}{'':10}{'torch, us':>10}{'anybn, us':>11}{'ratio':>7}")
    for a, b in zip(*found.values(), strict=True):
        what = "backward" if a.backward else "forward"
        us = [p.seconds * 1e6 for p in (a, b)]
        print(f"{a.layer:>5}  {a.shape!s:24}{what:10}{us[0]:10.0f}{us[1]:11.0f}{us[0] / us[1]:7.2f}")
    for what in (False, True):
        times = [milliseconds(found[name], what) for name in (theirs, ours)]
        if times[0]:
            print(
                f"{'backward' if what else 'forward'}: {times[0]:.2f} ms, {times[1]:.2f} ms, {times[0] / times[1]:.2f}"
            )


if __name__ == "__main__":
    main()
