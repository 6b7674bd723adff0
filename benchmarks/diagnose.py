"""What anybn.diagnose costs: the batches' way through a net in evaluation, and through the same with diagnose.

    python benchmarks/diagnose.py          # prints, and writes benchmarks/results/diagnose.json
    python benchmarks/diagnose.py --docs   # and puts it into docs/diagnose.md

The net has eight convolutions with batch norms, in torch on the CPU. Times are medians of seven, in turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from accuracy import HERE, fill
from speed import context

import anybn

WIDTHS = (3, 32, 32, 64, 64, 128, 128, 256, 256)
BATCHES, SHAPE = 8, (32, 3, 32, 32)


def net() -> torch.nn.Sequential:
    blocks = []
    for i, (inputs, outputs) in enumerate(pairwise(WIDTHS)):
        conv = torch.nn.Conv2d(inputs, outputs, 3, stride=1 + i % 2, padding=1, bias=False)
        blocks += [conv, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="put the sentence into docs/diagnose.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(anybn.get_num_threads())
    model = net()
    batches = [torch.randn(SHAPE) for _ in range(BATCHES)]

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            for x in batches:
                model(x)

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    runs: dict[str, Callable[[], object]] = {"evaluate": evaluate, "diagnose": lambda: anybn.diagnose(model, batches)}
    for run in runs.values():  # kernels are compiled
        run()
    times = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    surroundings = context(anybn.get_num_threads(), jax=False) | {"date": str(datetime.date.today())}
    record = {"seconds": medians, "batches": BATCHES, "shape": SHAPE, "context": surroundings}
    (HERE / "results" / "diagnose.json").write_text(json.dumps(record, indent=1) + "\n")
    text = sentence(record)
    print(text)
    if options.docs:
        fill("diagnose cost", text)


def sentence(record: dict) -> str:
    seconds, where, shape = record["seconds"], record["context"], "x".join(map(str, record["shape"]))
    lines = (
        "A diagnosis of a net of eight convolutions with batch norm takes",
        f"{seconds['diagnose'] / seconds['evaluate']:.1f} times as long as its evaluation on the same",
        f"{record['batches']} batches of {shape}. `benchmarks/diagnose.py` measured it on {where['cpu']},",
        f"{where['threads']} threads, {where['date']}, while others used the machine.",
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
