"""What Numba is worth: the same calls on NumPy arrays with it, without it, and as NumPy alone has them.

    python benchmarks/without_numba.py    # a minute, into benchmarks/results/without_numba.json and docs/install.md

Each line is one process, and its times are medians: torch, with its threads, is in none of them. Results are checked
first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from accuracy import fill
from speed import RESULTS, context, write

from anybn.cli.comparison import FIRST, ROWS, TINY, Case, Data, anybn_on_numpy, check, obvious, operations_before
from anybn.cli.timing import duration, watched

CASES = [
    Case(op, ROWS if len(shape) == 2 else FIRST, shape)
    for op in ("forward", "evaluation")
    for shape in (TINY, (64, 512), (256, 1024), (8192, 256), (32, 64, 28, 28), (32, 512, 7, 7))
]


def times() -> list[dict[str, float]]:
    rows = []
    for case in CASES:
        data = Data.of(case)
        runs = {"numpy": anybn_on_numpy(case, data)}
        check(case, data, runs)
        runs |= obvious(case, data)
        measured = watched(runs, rounds=15, seconds=1, before=operations_before(data.x, runs))
        rows.append({name: round(timing.median * 1e6, 2) for name, timing in measured.timings.items()})
    return rows


def in_process(numba: bool) -> list[dict[str, float]]:
    blocked = ["torch"] if numba else ["torch", "numba"]
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"
    code = f"{block}; import json, without_numba; print(json.dumps(without_numba.times()))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=sys.path[0])
    return json.loads(done.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| float32 | NumPy alone | anybn | anybn with Numba |", "|---|---|---|---|"]
    for row in rows:
        cells = (duration(row[name] * 1e-6) for name in ("alone_us", "without_us", "with_us"))
        what = "training" if row["op"] == "forward" else "evaluation"
        lines.append(f"| {what}, {tuple(row['shape'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    without, with_numba = in_process(False), in_process(True)
    rows = [
        {
            "op": case.op,
            "shape": case.shape,
            "alone_us": a["numpy alone"],
            "without_us": a["numpy"],
            "with_us": b["numpy"],
        }
        for case, a, b in zip(CASES, without, with_numba, strict=True)
    ]
    here = context(2, False)
    write(RESULTS / "without_numba.json", json.dumps({"context": here, "rows": rows}, indent=1))
    print(table(rows))
    fill(
        "without numba",
        f"{table(rows)}\n\nMeasured on {here['cpu']}, numpy {here['versions']['numpy']}, {here['date']}.",
    )


if __name__ == "__main__":
    main()
