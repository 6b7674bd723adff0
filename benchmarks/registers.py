"""Compiles every kernel of batchnorm.cu for several GPUs, none of which is needed: registers, spills, code size.

    python benchmarks/registers.py             # all, into benchmarks/results/registers.json
    python benchmarks/registers.py --readable  # prints the committed table

By NVRTC through CuPy, with the options that CuPy uses at run time, or by nvcc where CuPy or NVRTC is missing.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from anybn.kernels.cuda.launch import OPTIONS, source
from anybn.kernels.cuda.plan import TYPES, kernels

RESULT = Path(__file__).parent / "results" / "registers.json"
ARCHITECTURES = ("75", "80", "90", "100", "120")
#: What CuPy adds to the options.
CUPY_OPTIONS = ("-ftz=true",)

#: kernel -> (registers, bytes of spill stores and loads)
Usage = dict[str, tuple[int, int]]


def compiler() -> str | None:
    """ "nvrtc" or "nvcc" with its version; None where there is neither."""
    if nvrtc := _nvrtc_version():
        return nvrtc
    if nvcc := shutil.which("nvcc"):
        found = re.search(
            r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        )
        return f"nvcc {found[1]}" if found else None
    return None


def _nvrtc_version() -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy has something to say about machines without CUDA
            from cupy.cuda import nvrtc

            return "nvrtc {}.{}".format(*nvrtc.getVersion())
    except Exception:  # nothing that a missing or broken installation may not raise
        return None


def compiled(names: Sequence[str], architecture: str) -> Usage:
    """Registers and spills of these kernels. Raises RuntimeError with the compiler's words."""
    by = compiler()
    assert by is not None, "no compiler"
    mangled, log, _ = (_nvrtc if by.startswith("nvrtc") else _nvcc)(names, architecture)
    found = {function: usage for function, *usage in _read(log)}
    return {name: tuple(found[mangled[name]]) for name in names}  # type: ignore[misc]


def _read(log: str) -> Iterator[tuple[str, int, int]]:
    """(function, registers, spilled bytes) from what ptxas -v says."""
    function, spilled = "", 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            function = entry[1]
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spill[1]) + int(spill[2])
        elif used := re.search(r"Used (\d+) registers", line):
            yield function, int(used[1]), spilled


def cubin(names: Sequence[str], architecture: str) -> tuple[dict[str, str], bytes]:
    """The names of these kernels in a cubin, and it."""
    by = compiler()
    assert by is not None, "no compiler"
    mangled, _, code = (_nvrtc if by.startswith("nvrtc") else _nvcc)(names, architecture)
    return mangled, code


def _nvrtc(names: Sequence[str], architecture: str) -> tuple[dict[str, str], str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import compiler as cupy_compiler

    log = io.StringIO()
    program = cupy_compiler._NVRTCProgram(source(), "batchnorm.cu", name_expressions=tuple(names), method="cubin")
    options = (*OPTIONS, *CUPY_OPTIONS, "--ptxas-options=-v", f"-arch=sm_{architecture}")
    try:
        code, mangled = program.compile((*options, "--device-as-default-execution-space"), log)
    except cupy_compiler.CompileException as error:
        raise RuntimeError(str(error)) from error
    return mangled, log.getvalue(), code


def _nvcc(names: Sequence[str], architecture: str) -> tuple[dict[str, str], str, bytes]:
    """By explicit instantiation, and told apart by demangling."""
    table = "\n".join(f"template __global__ void {name}(const Call);" for name in names if "<" in name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(f"{source()}\n{table}\n")
        command = ["nvcc", *OPTIONS, *CUPY_OPTIONS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-o", f"{folder}/out", str(file)], capture_output=True, text=True)
        code = Path(f"{folder}/out").read_bytes() if not done.returncode else b""
    if done.returncode:
        raise RuntimeError(done.stderr)
    functions = [function for function, *_ in _read(done.stderr)]
    plain = subprocess.run(["c++filt", *functions], capture_output=True, text=True, check=True).stdout.splitlines()
    readable = (re.sub(r"^void |\(Call\)$|\(bool\)|\(int\)", "", name) for name in plain)
    readable = (name if name in names else name.replace(", false>", ">") for name in readable)  # that is the default
    return dict(zip(readable, functions, strict=True)), done.stderr, code


def table(architectures: Sequence[str]) -> dict[str, dict[str, tuple[int, int]]]:
    names = list(dict.fromkeys(name for dtype in TYPES for name in kernels(dtype)))
    usage = {architecture: {} for architecture in architectures}
    for architecture in architectures:
        chosen = names if int(architecture) >= 90 else [n for n in names if not re.search(r"(true|false), [248]>", n)]
        usage[architecture] = compiled(chosen, architecture)
        print(f"sm_{architecture}: {len(chosen)} kernels", file=sys.stderr)
    return usage


def readable(result: dict) -> str:
    lines = [f"{result['compiler']}, {' '.join(result['options'])}; registers, + bytes of spills", ""]
    architectures = list(result["usage"])
    lines.append(f"| kernel | {' | '.join(f'sm_{a}' for a in architectures)} |")
    lines.append(f"|---|{'---|' * len(architectures)}")
    for name in result["usage"][architectures[-1]]:
        cells = []
        for architecture in architectures:
            registers, spilled = result["usage"][architecture].get(name, ("", 0))
            cells.append(f"{registers}{f' + {spilled}' if spilled else ''}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--readable", action="store_true")
    options = parser.parse_args()
    if options.readable:
        print(readable(json.loads(RESULT.read_text())))
        return
    if (by := compiler()) is None:
        sys.exit("no compiler: pip install cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime, or put nvcc on the PATH")
    result = {"compiler": by, "options": [*OPTIONS, *CUPY_OPTIONS], "usage": table(options.architectures)}
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(result, indent=1))  # a kernel, a line
    RESULT.write_text(text + "\n")
    print(readable(result))


if __name__ == "__main__":
    main()
