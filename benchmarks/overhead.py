"""What a call of a torch module costs on (8, 16), where computing costs nothing: anybn.torch beside torch.nn.

    python benchmarks/overhead.py            # a minute, into benchmarks/results/overhead.json and docs/speed.md

Medians over rounds in which each contestant has one turn, in random order; every result is checked first. "grad" is
with gradients recorded, as in training, "no grad" without. Each call follows upon a small operation, when its code and
its data are in the caches; and then, as in a net, upon a convolution that has filled them, and before it a call of the
same module.
"""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import torch
from accuracy import fill
from speed import RESULTS, context, write

import anybn
import anybn.torch
from anybn.cli.comparison import TINY, WrongResult, use_threads
from anybn.cli.timing import Run, watched
from anybn.conformance import inputs, oracle

SHAPE = TINY


def contestants(training: bool, recorded: bool) -> dict[str, Run]:
    """The modules, and the layer that takes any library's arrays."""
    x = torch.from_numpy(inputs.cast(inputs.normal(SHAPE), "float32"))
    layer = anybn.BatchNorm1d(SHAPE[1]).to("torch").train(training)
    layer.state.weight = torch.nn.Parameter(torch.ones(SHAPE[1]))
    callables = {
        "anybn.torch": anybn.torch.BatchNorm1d(SHAPE[1]).train(training),
        "torch.nn": torch.nn.BatchNorm1d(SHAPE[1]).train(training),
        "anybn.BatchNorm1d": layer,
    }

    def run(bn):
        def call():
            with torch.set_grad_enabled(recorded):
                return bn(x)

        return call

    runs = {name: run(bn) for name, bn in callables.items()}
    statistics = oracle.statistics(x.numpy())
    mean, var = (statistics.mean, statistics.var()) if training else np.stack([np.zeros(SHAPE[1]), np.ones(SHAPE[1])])
    for name, call in runs.items():
        y = call()
        error = oracle.error(y.detach().numpy(), oracle.normalize(x.numpy(), mean, var), "float32")
        if not error <= 4 or y.requires_grad is not recorded:
            raise WrongResult(f"{name} is {error:.3g} eps off")
    return {name: (lambda call=bn: call(x)) for name, bn in callables.items()}


def behind_convolutions(runs: dict[str, Run]) -> dict[str, Run]:
    """What comes before each call in a net."""
    convolution, images = torch.nn.Conv2d(256, 256, 3, padding=1), torch.randn(8, 256, 14, 14)

    def before(call: Run) -> None:
        call()
        with torch.no_grad():
            convolution(images)

    return {name: partial(before, call) for name, call in runs.items()}


def table(rows: list[dict]) -> str:
    """Microseconds, a line for each of the modules."""
    columns = [
        ("training" if r["training"] else "evaluation") + (", with gradients" if r["grad"] else "") for r in rows
    ]
    lines = [f"| one call on (8, 16) | {' | '.join(columns)} |", "|---" * (len(rows) + 1) + "|"]
    for key, where in (("us", ""), ("us_after_convolution", ", after a convolution")):
        for name in ("anybn.torch", "torch.nn"):
            lines.append(
                f"| `{name}.BatchNorm1d`{where} | " + " | ".join(f"{r[key][name]:.0f} us" for r in rows) + " |"
            )
    return "\n".join(lines)


def main() -> None:
    use_threads(min(2, anybn.get_num_threads()))
    rows = []
    for training in (True, False):
        for recorded in (True, False):
            runs = contestants(training, recorded)
            small: dict[str, Run] = dict.fromkeys(runs, partial(torch.mul, torch.ones(SHAPE), 1.0))
            row = {"training": training, "grad": recorded}
            cold = behind_convolutions(runs)
            for key, before, rounds in (("us", small, 100), ("us_after_convolution", cold, 25)):
                with torch.set_grad_enabled(recorded):
                    measured = watched(runs, rounds, seconds=5, before=before)
                row[key] = {name: round(timing.median * 1e6, 2) for name, timing in measured.timings.items()}
                row[f"busy_{key}"] = round(measured.busy, 2)
            rows.append(row)
            print(row)
    write(RESULTS / "overhead.json", json.dumps({"context": context(2, False), "shape": SHAPE, "rows": rows}, indent=1))
    fill("small arrays", table(rows))


if __name__ == "__main__":
    main()
