"""What each batch norm takes inside a net: its forward and its backward pass, where a convolution has just run.

    python benchmarks/layers.py resnet50 --format last              # a training step, a line for each layer
    python benchmarks/layers.py densenet121 --evaluation

A benchmark of one layer has warm caches; in a net, the operation before has filled them with something else. That is
why both are measured. Whole steps differ by more from turn to turn than batch norm takes of them; here a convolution's
noise does not count. What belongs to a batch norm module counts, as the relu inside timm's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


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
        module.forward = _timed_forward(number, module.forward, passes)  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        for module in found:
            del module.forward


def _timed_forward(layer: int, forward: Any, passes: list[Pass]) -> Any:
    def run(x: Tensor, *others: Any, **named: Any) -> Tensor:
        begin = time.perf_counter()
        y = forward(x, *others, **named)
        passes.append(Pass(layer, tuple(x.shape), False, time.perf_counter() - begin))
        if y.grad_fn is not None:
            _time_backward(y.grad_fn, x.grad_fn, lambda s: passes.append(Pass(layer, tuple(x.shape), True, s)))
        return y

    return run


def _time_backward(first: Any, beyond: Any, done: Any) -> None:
    """Times the nodes of the graph from ``first`` to the one before ``beyond``, which run one after the other."""
    begin = 0.0

    def start(_: Any) -> None:
        nonlocal begin
        begin = time.perf_counter()

    last = first
    while all(node is not beyond for node, _ in last.next_functions):
        last = last.next_functions[0][0]
    first.register_prehook(start)
    last.register_hook(lambda *_: done(time.perf_counter() - begin))


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
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    net, memory_format = nets.NETS[options.net], nets.FORMATS[options.format]
    models, (x, target) = nets.contestants(net, memory_format, False), nets.inputs(net, memory_format)
    runs = {
        name: nets.evaluation(models[name], x) if options.evaluation else nets.step(models[name], x, target)
        for name in ("torch", "converted")
    }
    found = nets.layers_of(models, runs, options.rounds)
    print(f"{'layer':>5}  {'shape':24}{'':10}{'torch, us':>10}{'converted':>11}{'ratio':>7}")
    for a, b in zip(*found.values(), strict=True):
        what = "backward" if a.backward else "forward"
        us = [p.seconds * 1e6 for p in (a, b)]
        print(f"{a.layer:>5}  {a.shape!s:24}{what:10}{us[0]:10.0f}{us[1]:11.0f}{us[0] / us[1]:7.2f}")
    for what in (False, True):
        torchs, ours = (milliseconds(found[name], what) for name in ("torch", "converted"))
        if torchs:
            print(f"{'backward' if what else 'forward'}: {torchs:.2f} ms, {ours:.2f} ms, {torchs / ours:.2f}")


if __name__ == "__main__":
    main()
