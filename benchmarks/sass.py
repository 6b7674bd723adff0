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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import registers

from anybn.kernels.cuda.plan import TYPES

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
    "gradient_sums<float, 4, true>",
    "evaluate<bfloat16, 8, false>",
    "evaluate<float, 4, true>",
    "gradients<bfloat16, 4, true>",
    "sums<bfloat16, 8, false, true>",
    "sums<float, 4, true, true>",
    "gradient_sums<bfloat16, 8, false, true>",
    "evaluate<bfloat16, 8, false, true>",
    "evaluate<float, 4, true, true>",
    "gradients<bfloat16, 8, false, true>",
)
SUM_ONLY, APPLY_ONLY = {"sums", "gradient_sums"}, {"evaluate", "gradients"}


class Counts(NamedTuple):
    loads: int
    """from global memory that are issued before the first of them is used, at most"""
    copies: int
    """instructions that copy from global to shared memory without passing through registers"""
    flight: int
    """bytes that a thread has under way at once: of its loads, or of the copies that it starts before it waits"""
    sum: float
    """instructions per value of the loop that sums, on its common path; 0 without one"""
    apply: float
    """of the loop that computes y or dx, without residual and relu"""
    instructions: int
    """in all"""
    fences: int
    """that wait for all of a thread's stores"""
    local: int
    """loads and stores of spilled registers"""

    def worse_than(self, other: Counts) -> bool:
        """But for a few instructions, which differ with the compiler's mood."""
        fewer = self.loads < other.loads or self.copies < other.copies or self.flight < other.flight
        more = any(getattr(self, n) > 1.05 * getattr(other, n) for n in ("sum", "apply"))
        return fewer or more or self[-2:] > other[-2:] or self.instructions > 1.1 * other.instructions


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
    functions: dict[str, Code] = {}
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            body = functions.setdefault(found[1], [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+) )?(.*?)\s*;", line):
            name, _, operands = found[3].partition(" ")
            body.append(Instruction(int(found[1], 16), found[2] or "", name, operands))
    return {name: _counted(name, functions[mangled[name]]) for name in names}


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Of a load or store."""
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in self.name.split(".") if part in sizes), 4)


Code = list[Instruction]


def _counted(name: str, code: Code) -> Counts:
    kinds = [one.kind for one in code]
    kernel, arguments = name.rstrip(">").split("<")
    dtype, _, _ = arguments.split(", ")[:3]
    itemsize = next(size for of, size, _ in TYPES.values() if of == dtype)
    arrays = 2 if kernel.startswith(("backward", "gradient")) else 1
    loops = [body for first, last in _innermost(code) if (body := _common_path(code[first : last + 1]))]
    copied = "LDGSTS" in kinds
    sums = [
        len(body) * arrays * itemsize / _moved(body, "LDS" if copied else "LDG")
        for body in loops
        if not _moved(body, "STG") and _moved(body, "LDGSTS" if copied else "LDG") and kernel not in APPLY_ONLY
    ]
    computes = {"FADD", "FFMA", "DADD", "DFMA"}  # unlike the loop that writes sums of a block
    applied = [
        len(body) * itemsize / _moved(body, "STG")
        for body in loops
        if _moved(body, "STG") and any(one.kind in computes for one in body)
    ]
    loads = [(len(found), sum(one.bytes for one in found)) for found in _in_flight(code)]
    waits = [i for i, one in enumerate(code) if one.name == "DEPBAR.LE" and not one.operands.endswith("0x0")]
    return Counts(
        max((count for count, _ in loads), default=0),
        kinds.count("LDGSTS"),
        _moved(code[: waits[0]], "LDGSTS") if copied else max((size for _, size in loads), default=0),
        round(min(sums, default=0.0), 1),
        0.0 if kernel in SUM_ONLY else round(min(applied, default=0.0), 1),
        len(code),
        kinds.count("MEMBAR"),
        kinds.count("LDL") + kinds.count("STL"),
    )


def _moved(code: Iterable[Instruction], kind: str) -> int:
    """Bytes of such instructions; without those that only some calls need, which hang on a condition."""
    return sum(one.bytes for one in code if one.kind == kind and not one.predicate)


def _target(one: Instruction) -> int | None:
    """Where a branch goes."""
    found = re.search(r"0x([0-9a-f]+)$", one.operands) if one.kind == "BRA" else None
    return int(found[1], 16) if found else None


def _innermost(code: Code) -> Iterator[tuple[int, int]]:
    """First and last instruction of each loop that has no other in it."""
    where = {one.address: i for i, one in enumerate(code)}
    loops = [
        (where[to], i)
        for i, one in enumerate(code)
        if (to := _target(one)) is not None and to < one.address and to in where
    ]
    for first, last in loops:
        if not any(first <= start and end <= last for start, end in loops if (start, end) != (first, last)):
            yield first, last


def _common_path(loop: Code) -> Code:
    """From the first to the last instruction: with as many copies as there can be, then the shortest."""
    where = {one.address: i for i, one in enumerate(loop)}
    best: dict[int, tuple[tuple[int, int], int | None]] = {0: ((0, 0), None)}
    for i, one in enumerate(loop):
        if i not in best:
            continue
        copies, length = best[i][0]
        cost = copies - (one.kind == "LDGSTS"), length + 1
        to = _target(one)
        conditional = one.predicate or "P" in one.operands.partition("0x")[0]
        following = [] if one.kind in ("BRA", "EXIT") and not conditional else [i + 1]
        following += [where[to]] if to in where else []
        for later in following:
            if i < later < len(loop) and (later not in best or cost < best[later][0]):
                best[later] = cost, i
    path, i = [], len(loop) - 1
    if i not in best:
        return []
    while i is not None:
        path.append(loop[i])
        i = best[i][1]
    return path[::-1]


def _in_flight(code: Code) -> Iterator[Code]:
    """For each load, those from it to the first use of what it loads."""
    for i, one in enumerate(code):
        found = re.match(r"R(\d+)", one.operands)
        if one.kind != "LDG" or not found:
            continue
        mine, loads = set(range(int(found[1]), int(found[1]) + max(1, one.bytes // 4))), [one]
        for later in code[i + 1 :]:
            if later.kind in ("BRA", "EXIT", "BAR"):
                break
            given = later.operands if later.kind in ("STG", "STS", "ST", "RED") else later.operands.partition(", ")[2]
            if mine & {int(register) for register in re.findall(r"\bR(\d+)\b", given)}:
                break
            if later.kind == "LDG":
                loads.append(later)
        yield loads


def readable(table: dict[str, dict[str, list[int]]]) -> str:
    lines = [
        "instructions a value to sum + to apply; bytes in flight a thread; instructions in all; fences, spills",
        "",
    ]
    lines.append(f"| kernel | {' | '.join(f'sm_{a}' for a in table)} |")
    lines.append(f"|---|{'---|' * len(table)}")
    for name in next(iter(table.values())):
        cells = [Counts(*of[name]) for of in table.values()]
        shown = (f"{c.sum} + {c.apply}; {c.flight}; {c.instructions}; {c.fences}, {c.local}" for c in cells)
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
    text = re.sub(r"\[\s+([\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(result, indent=1))
    RESULT.write_text(text + "\n")
    print(readable(table))


if __name__ == "__main__":
    main()
