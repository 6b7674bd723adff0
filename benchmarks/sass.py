"""The machine code of the kernels that matter, counted: what can be seen of their speed without a GPU.

    python benchmarks/sass.py             # into benchmarks/results/sass.json
    python benchmarks/sass.py --readable  # prints the committed table

It needs NVRTC or nvcc, as registers.py does, and cuobjdump with nvdisasm, which the CUDA toolkit and the triton wheel
have.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import registers

RESULT = Path(__file__).parent / "results" / "sass.json"
ARCHITECTURES = ("80", "90", "100", "120")
KERNELS = (
    "train<bfloat16, 8, false, 1>",
    "train<bfloat16, 4, true, 1>",
    "train<float, 4, false, 1>",
    "train<float, 4, true, 1>",
    "backward<bfloat16, 8, false, 1>",
    "backward<float, 4, false, 1>",
    "train_group<bfloat16, 4, true>",
    "train_group<float, 4, true>",
    "backward_group<bfloat16, 4, true>",
    "sums<bfloat16, 4, true>",
    "evaluate<bfloat16, 8, false>",
    "evaluate<float, 4, true>",
    "gradients<bfloat16, 4, true>",
)


class Counts(NamedTuple):
    loads: int
    """from global memory that are issued before the first of them is used, at most"""
    copies: int
    """instructions that copy from global to shared memory without passing through registers"""
    instructions: int
    fences: int
    """that wait for all of a thread's stores"""
    local: int
    """loads and stores of spilled registers"""

    def worse_than(self, other: Counts) -> bool:
        """But for a few instructions, which differ with the compiler's mood."""
        fewer = self.loads < other.loads or self.copies < other.copies
        return fewer or self[3:] > other[3:] or self.instructions > 1.1 * other.instructions


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm, or None."""
    if found := shutil.which("cuobjdump"):
        return Path(found).parent
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    return folder if (folder / "cuobjdump").exists() else None


def counts(names: Sequence[str], architecture: str) -> dict[str, Counts]:
    mangled, code = registers.cubin(names, architecture)
    folder = tools()
    assert folder is not None, "no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        command = [str(folder / "cuobjdump"), "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | path).stdout
    functions: dict[str, list[str]] = {}
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            body = functions.setdefault(found[1], [])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line):
            body.append(re.sub(r"^@!?U?P\d+ ", "", found[1]))
    return {name: _counted(functions[mangled[name]]) for name in names}


def _counted(body: Sequence[str]) -> Counts:
    kinds = [text.partition(" ")[0].partition(".")[0] for text in body]
    return Counts(
        max(_in_flight(body), default=0),
        kinds.count("LDGSTS"),
        len(body),
        kinds.count("MEMBAR"),
        kinds.count("LDL") + kinds.count("STL"),
    )


def _in_flight(body: Sequence[str]) -> Iterator[int]:
    """For each load, how many there are from it to the first use of what it loads."""
    for i, text in enumerate(body):
        found = re.match(r"LDG\S* R(\d+)", text)
        if not found:
            continue
        width = 4 if ".128" in text else 2 if ".64" in text.partition(" ")[0] else 1
        mine, loads = set(range(int(found[1]), int(found[1]) + width)), 1
        for later in body[i + 1 :]:
            name, _, operands = later.partition(" ")
            if name.startswith(("BRA", "EXIT", "BAR")):
                break
            given = operands if name.startswith(("ST", "RED")) else operands.partition(", ")[2]
            if mine & {int(register) for register in re.findall(r"\bR(\d+)\b", given)}:
                break
            loads += name.startswith("LDG")
        yield loads


def readable(table: dict[str, dict[str, list[int]]]) -> str:
    lines = ["loads in flight + copies past registers, instructions, fences, spills", ""]
    lines.append(f"| kernel | {' | '.join(f'sm_{a}' for a in table)} |")
    lines.append(f"|---|{'---|' * len(table)}")
    for name in next(iter(table.values())):
        cells = [Counts(*of[name]) for of in table.values()]
        shown = (f"{c.loads} + {c.copies}, {c.instructions}, {c.fences}, {c.local}" for c in cells)
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readable", action="store_true")
    if parser.parse_args().readable:
        print(readable(json.loads(RESULT.read_text())["counts"]))
        return
    if registers.compiler() is None or tools() is None:
        sys.exit("it needs NVRTC or nvcc, and cuobjdump: pip install cupy-cuda13x[ctk] triton")
    table = {architecture: counts(KERNELS, architecture) for architecture in ARCHITECTURES}
    result = {"compiler": registers.compiler(), "counts": table}
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(result, indent=1))
    RESULT.write_text(text + "\n")
    print(readable(table))


if __name__ == "__main__":
    main()
