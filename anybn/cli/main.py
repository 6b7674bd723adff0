"""``anybn``: what is installed, what is in a model's file, a training to look at, tests of this machine."""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anybn
from anybn.backends.registry import backend_named, installation_of, installed_backends, known_backends, resolve_target
from anybn.cli.model_files import add_convert, add_inspect
from anybn.cli.output import complain, plain_table, print_json, print_table
from anybn.errors import BackendNotInstalled, required

PICTURES = ".png", ".svg", ".pdf", ".eps", ".jpg", ".webp", ".tif"

# What argparse needs of a set of subcommands; its own name for the type is private.
Commands = Any


# -- info ------------------------------------------------------------------------------------------------------


def add_info(commands: Commands) -> None:
    command = commands.add_parser("info", help="which backends are installed and usable")
    command.set_defaults(run=info)


def info(options: argparse.Namespace) -> int:
    installed = installed_backends()
    missing = {name: installation_of(name) for name in known_backends() if name not in installed}
    if options.json:
        found = {name: asdict(backend) | {"usable": backend.usable} for name, backend in installed.items()}
        python = platform.python_version()
        print_json({"anybn": anybn.__version__, "python": python, "backends": found, "missing": missing})
        return 0
    print(f"anybn {anybn.__version__}, Python {platform.python_version()}\n")
    header = ("backend", "version", "takes arrays of", "how", "devices")
    print_table([header, *map(backend_row, installed.values())])
    print("\nAn array of any other library with __array_namespace__ goes through the Array API core.")
    if missing:
        print("\nNot installed:")
        print(plain_table([*missing.items()]))
    return 0


def backend_row(backend: anybn.BackendInfo) -> tuple[str, ...]:
    if backend.problem:
        return backend.name, backend.version, "", "", f"not usable: {backend.problem}"
    libraries = ", ".join(backend_named(backend.name).libraries)
    return backend.name, backend.version, libraries, backend.how, ", ".join(backend.devices)


# -- demo ------------------------------------------------------------------------------------------------------


def add_demo(commands: Commands) -> None:
    command = commands.add_parser(
        "demo",
        help="train a net on handwritten digits with and without batch norm, switching libraries midway",
    )
    command.add_argument("--epochs", type=epochs, default=15, help="per run, at least 3; default: %(default)s")
    command.add_argument("--seed", type=seed, default=0, help="of the weights and the order of the images; default: 0")
    command.add_argument("--layers", choices=("conv", "dense"), default="conv", help="default: conv")
    command.add_argument(
        "--png", type=png, default="anybn-demo.png", metavar="PATH", help="for the curves; default: %(default)s"
    )
    command.add_argument(
        "--switch-to",
        type=target,
        metavar="NAME",
        help="library, and device if you like (torch:cuda), of the middle third of the epochs; default: the first of "
        "torch, jax and array_api_strict that is installed",
    )
    command.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> int:
    with required("the demo needs others' libraries", "scikit-learn matplotlib tqdm safetensors"):
        from anybn.cli.demo import run
    with redirect_stdout(io.StringIO()) if options.json else nullcontext():
        result = run(
            epochs=options.epochs,
            seed=options.seed,
            layers=options.layers,
            png=options.png,
            switch_to=options.switch_to,
        )
    if options.json:
        print_json(result)
    return 0 if result["passed"] else 1


def epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"{text} is not a number of epochs, 3 or more: the middle third is switched")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a seed: a whole number, 0 or more")
    return int(text)


def png(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name the file in it")
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path} does not end in one of {', '.join(PICTURES)}, which say what to draw")
    return path


def target(text: str) -> str:
    if text.partition(":")[0] == "dask":
        raise argparse.ArgumentTypeError("dask computes nothing until asked, and training asks at every step")
    try:
        resolve_target(text)
    except Exception as error:  # each library has its own for a device that is not there
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


# -- check -----------------------------------------------------------------------------------------------------


def add_check(commands: Commands) -> None:
    command = commands.add_parser("check", help="run the quick part of the conformance suite on this machine")
    command.add_argument(
        "--backend", action="append", metavar="NAME", help="such as torch or torch:cuda; repeat it; default: all usable"
    )
    command.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    if find_spec("pytest") is None:
        raise BackendNotInstalled("check needs pytest: pip install pytest")
    try:
        for name in options.backend or ():
            resolve_target(name)
    except Exception as error:  # each library has its own for a device that is not there
        complain(f"--backend: {error}")
        return 2
    names = options.backend or [name for name, backend in installed_backends().items() if backend.usable]
    command = [sys.executable, "-m", "pytest", *pytest_arguments(names)]
    if not options.json:
        print(f"checking {', '.join(names)}", flush=True)
        return subprocess.run(command, check=False).returncode
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-300:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    print_json({"backends": names, "status": done.returncode, "counts": counts, "failed": failed})
    return done.returncode


def pytest_arguments(names: Sequence[str]) -> list[str]:
    # A pytest configuration in the current folder belongs to another project: its addopts do not count here, and no
    # cache is left behind.
    surroundings = ["-o", "addopts=", "-p", "no:cacheprovider"]
    chosen = [f"--anybn-backend={name}" for name in names]
    return ["--pyargs", "anybn.conformance", "-q", "-m", "quick", *surroundings, *chosen]


# -- bench -----------------------------------------------------------------------------------------------------


def add_bench(commands: Commands) -> None:
    command = commands.add_parser("bench", help="measure training forward beside torch, if installed, and a plain copy")
    command.add_argument(
        "--png", type=png, default="anybn-bench.png", metavar="PATH", help="for the bars; default: %(default)s"
    )
    command.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> int:
    with required("the benchmark needs others' libraries", "matplotlib tqdm"):
        from anybn.cli.bench import run, table_of
        from anybn.cli.comparison import WrongResult
        from anybn.cli.timing import QUIET
    try:
        timings, busy = run(options.png)
    except WrongResult as error:
        complain(error)
        return 1
    if options.json:
        rows = [
            {"shape": case.shape, "seconds": {name: timing.median for name, timing in of.items()}}
            for case, of in timings.items()
        ]
        print_json({"threads": anybn.get_num_threads(), "rows": rows, "busy": busy, "picture": str(options.png)})
        return 0
    print_table(table_of(timings))
    print(
        f"\nmedians of training forward passes on float32, {anybn.get_num_threads()} threads; every result was checked"
    )
    if busy > QUIET:
        print(f"other processes used up to {busy:.1f} CPUs meanwhile: try again when the machine is quiet")
    print(f"bars: {options.png}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="anybn", description=anybn.__doc__)
    parser.add_argument("--version", action="version", version=f"anybn {anybn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_info, add_inspect, add_convert, add_demo, add_check, add_bench):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `anybn ... | head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python will flush to when it ends
        return 128 + 13  # SIGPIPE, as shells count it
    except KeyboardInterrupt:
        return 128 + 2  # SIGINT
    except (BackendNotInstalled, OSError, TypeError, ValueError) as error:  # CheckpointError is one
        complain(error)
        return 1
