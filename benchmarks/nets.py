"""Whole nets, as they are and converted: a training step and an evaluation, interleaved in one process.

    python benchmarks/nets.py                        # all of it, an hour, into benchmarks/results/nets.jsonl
    python benchmarks/nets.py --docs                 # and puts tables into docs/speed.md and README.md
    python benchmarks/nets.py --net resnet18 --rounds 5
    python benchmarks/nets.py --compile --docs       # under torch.compile, into nets_compiled.jsonl, another hour

The contestants are a net of torch's (``torch``), the same one after `anybn.torch.convert` (``converted``), and after it
with ``fuse=`` (``fused``); and the net without its batch norms (``identity``). With ``--compile``, they are the first
as it is, and the first three under ``torch.compile``. timm has the nets but the last two, which are written here: an
MLP over ``(N, C)`` and a net of 3-D convolutions.

What the batch norms take of all that is timed by itself, as `layers.py` does it; what a fused net's take, beside
torch's operations for the same, batch norm, addition and relu. A compiled net's cannot be told apart.

Before anything is timed, the converted nets' outputs and the gradients of all parameters are compared with those of the
original in float64. They may be off by ten times what torch's own net is in float32: the convolutions' rounding decides
both, and this is to find what is wrong, not what is a bit less exact.

A training step is forward, cross entropy, backward and a step of SGD. Nothing rests: each turn is one warm-up step and
one that is timed. Numbers are medians over rounds in which each contestant has one turn, in random order.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import random
import re
import statistics
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy import fill
from layers import Pass, medians, milliseconds, separated, timed
from torch import Tensor, nn

import anybn
import anybn.torch
from anybn.cli.timing import Run, interleaved, seconds_of_others

RESULTS = Path(__file__).parent / "results"
CLASSES = 10


class Net(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """of the input"""


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm  # type: ignore[import-not-found,unused-ignore]

        return timm.create_model(name, num_classes=CLASSES)

    return make


def _mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(1024, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, CLASSES))


class _Block3d(nn.Module):
    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm3d(out)
        self.conv2, self.bn2 = nn.Conv3d(out, out, 3, 1, 1, bias=False), nn.BatchNorm3d(out)
        self.shortcut = nn.Sequential(nn.Conv3d(inside, out, 1, stride, bias=False), nn.BatchNorm3d(out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _net_3d() -> nn.Module:
    blocks = [_Block3d(1, 16, 1), _Block3d(16, 32, 2), _Block3d(32, 64, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, CLASSES))


NETS = {
    "resnet18": Net(_timm("resnet18"), (8, 3, 128, 128)),
    "resnet50": Net(_timm("resnet50"), (8, 3, 112, 112)),
    "mobilenetv3_large_100": Net(_timm("mobilenetv3_large_100"), (8, 3, 128, 128)),
    "efficientnet_b0": Net(_timm("efficientnet_b0"), (8, 3, 128, 128)),
    "densenet121": Net(_timm("densenet121"), (8, 3, 112, 112)),
    "mlp": Net(_mlp, (256, 1024)),
    "net_3d": Net(_net_3d, (4, 1, 24, 24, 24)),
}
FORMATS = {
    "first": torch.contiguous_format,
    "last": torch.channels_last,
}


def formats_of(net: Net) -> list[str]:
    return ["first", "last"] if len(net.shape) == 4 else ["first"]


# -- contestants -----------------------------------------------------------------------------------------------


def contestants(net: Net, memory_format: torch.memory_format) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    original = net.make().to(memory_format=memory_format)
    example = (inputs(net, memory_format)[0],)
    found = {"torch": original, "converted": anybn.torch.convert(copy.deepcopy(original))}
    try:
        found["fused"] = anybn.torch.convert(copy.deepcopy(original), fuse=example)
    except ValueError as error:
        print(f"  not fused: {error}")
    return found


def beside(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What is timed beside these, not under torch.compile."""
    found = {"identity": without_batch_norms(copy.deepcopy(models["torch"]))}
    if "fused" in models and (separate := separated(models["fused"])) is not None:
        found["separate"] = separate
    return found


def under_compile(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The original as it is, and all of them compiled."""
    torch.compiler.reset()
    compiled: dict[str, Any] = {f"{name} compiled": torch.compile(copy.deepcopy(m)) for name, m in models.items()}
    return {"torch": models["torch"], **compiled}


def inputs(net: Net, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, target = torch.randn(net.shape), torch.randint(0, CLASSES, net.shape[:1])
    return x.contiguous(memory_format=memory_format), target


def without_batch_norms(model: nn.Module) -> nn.Module:
    """What follows inside a batch norm, as in timm's, stays."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                rest = [getattr(child, inside, None) for inside in ("drop", "act")]
                kept = [layer for layer in rest if layer is not None and not isinstance(layer, nn.Identity)]
                setattr(module, name, nn.Sequential(*kept) if kept else nn.Identity())
    return model


def step(model: nn.Module, x: Tensor, target: Tensor) -> Run:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=True)  # every round does the same

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def evaluation(model: nn.Module, x: Tensor) -> Run:
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def layers_of(models: dict[str, nn.Module], runs: dict[str, Run], rounds: int) -> dict[str, list[Pass]]:
    """The passes of the batch norms of each contestant that runs, with median times; in turns, each twice."""
    found: dict[str, list[list[Pass]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            runs[name]()
            with timed(models[name]) as passes:
                runs[name]()
            found[name].append(passes)
    return {name: medians(passes) for name, passes in found.items()}


# -- results first ---------------------------------------------------------------------------------------------


def check(name: str, model: nn.Module, torchs: nn.Module, x: Tensor, target: Tensor) -> None:
    """Outputs and gradients against the original's in float64."""
    exact = outcome(copy.deepcopy(torchs).double(), x.double(), target)
    scale = [float(a.abs().max()) + 1e-30 for a in exact]

    def errors(found: list[Tensor]) -> list[float]:
        pairs = zip(found, exact, scale, strict=True)
        return [float((a.detach().double() - b).abs().max()) / s for a, b, s in pairs]

    ours, theirs = (errors(outcome(copy.deepcopy(m), x, target)) for m in (model, torchs))
    worst = max(ours)
    if not worst <= max(1e-6, 10 * max(theirs)):
        raise SystemExit(f"{name}: off by {worst:.1e} of the largest value, where torch is off by {max(theirs):.1e}")


def outcome(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """The output in evaluation, then in training, and the gradients of a training step."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        y = model.eval()(x)
    trained = model.train()(x)
    nn.functional.cross_entropy(trained, target).backward()
    return [y, trained.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# -- rows ------------------------------------------------------------------------------------------------------


def measured(names: list[str], rounds: int, compiled: bool) -> Iterator[dict[str, Any]]:
    for name in names:
        net = NETS[name]
        for layout in formats_of(net):
            memory_format = FORMATS[layout]
            print(f"{name}, channels {layout}, {net.shape}")
            models, (x, target) = contestants(net, memory_format), inputs(net, memory_format)
            models = under_compile(models) if compiled else models
            for other, model in models.items():
                if other.startswith(("converted", "fused")):
                    check(f"{name}, {other}", model, models["torch"], x, target)
            if not compiled:
                models |= beside(models)
            for what in ("step", "evaluation"):
                runs = {
                    contestant: step(model, x, target) if what == "step" else evaluation(model, x)
                    for contestant, model in models.items()
                }
                separate = runs.pop("separate", None)
                before = seconds_of_others()
                timings = interleaved(runs, rounds, 0)
                row = {
                    "net": name,
                    "layout": f"channels {layout}",
                    "what": what,
                    "shape": net.shape,
                    "ms": {k: round(t.median * 1e3, 3) for k, t in timings.items()},
                    "spread": {k: round(t.spread, 3) for k, t in timings.items()},
                }
                if not compiled:
                    layers = layers_of(models, {name: runs[name] for name in ("torch", "converted")}, rounds)
                    if separate is not None:
                        layers |= layers_of(models, {"separate": separate, "fused": runs["fused"]}, rounds)
                    row["layers_ms"] = {
                        contestant: {
                            "forward": round(milliseconds(passes, False), 3),
                            "backward": round(milliseconds(passes, True), 3),
                        }
                        for contestant, passes in layers.items()
                    }
                yield {
                    **row,
                    "seconds_of_others": round(seconds_of_others() - before, 1),
                    **here(),
                }


def here() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("anybn", "torch", "numpy", "numba")},
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor()


def table(rows: list[dict[str, Any]]) -> str:
    """Of steps and evaluations: torch's ms, and ratios to torch's, above 1 where the others take less time."""
    head = "| net | layout | | torch, ms | converted | `fuse=` | batch norms: forward, backward | with add and relu |\n"
    lines = [head, "|---|---|---|---|---|---|---|---|\n"]
    for row in rows:
        ms, layers = row["ms"], row["layers_ms"]
        ratios = [f"{ms['torch'] / ms[k]:.2f}" if k in ms else "-" for k in ("converted", "fused")]
        of_layers = [
            ", ".join(f"{layers[a][k] / layers[b][k]:.2f}" for k in layers[a] if layers[a][k]) if b in layers else "-"
            for a, b in (("torch", "converted"), ("separate", "fused"))
        ]
        cells = (row["net"], row["layout"], row["what"], f"{ms['torch']:.0f}", *ratios, *of_layers)
        lines.append("| " + " | ".join(cells) + " |\n")
    of_converted = [row["ms"]["torch"] / row["ms"]["converted"] for row in rows]
    lines.append(f"\nGeometric mean, converted: {statistics.geometric_mean(of_converted):.2f}; ")
    lines.append(f"worst: {min(of_converted):.2f}.\n")
    return "".join(lines)


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """torch's ms, as it is and compiled, and how much less than the latter the others take, compiled."""
    names, ratios = ["converted compiled", "fused compiled"], []
    lines = ["| net | layout | | torch, ms | compiled, ms | converted | `fuse=` |\n|---|---|---|---|---|---|---|\n"]
    for row in rows:
        ms = row["ms"]
        ratios.append({k: ms["torch compiled"] / ms[k] for k in names if k in ms})
        of_ours = [f"{ratios[-1][k]:.2f}" if k in ms else "-" for k in names]
        of_torch = [f"{ms[k]:.0f}" for k in ("torch", "torch compiled")]
        lines.append("| " + " | ".join((row["net"], row["layout"], row["what"], *of_torch, *of_ours)) + " |\n")
    of_converted = [found["converted compiled"] for found in ratios]
    lines.append(f"\nGeometric mean, converted: {statistics.geometric_mean(of_converted):.2f}; ")
    lines.append(f"worst: {min(of_converted):.2f}.\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=NETS, help="only these")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="as many as there are CPUs unless given")
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--out", type=Path, help="nets.jsonl or nets_compiled.jsonl in benchmarks/results unless given")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/speed.md, steps into README.md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        anybn.set_num_threads(options.threads)
    rows = []
    with (options.out or RESULTS / ("nets_compiled.jsonl" if options.compile else "nets.jsonl")).open("w") as file:
        for row in measured(options.net or list(NETS), options.rounds, options.compile):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print("  ", row["what"], row["ms"])
    print(compiled_table(rows) if options.compile else table(rows))
    if options.docs:
        import readme  # late: it reads what was written

        if options.compile:
            fill("compiled nets table", compiled_table(rows).rstrip())
            fill("compiled nets", readme.compiled_nets())
        else:
            fill("nets table", table(rows).rstrip())
            fill("nets", readme.nets())


if __name__ == "__main__":
    main()
