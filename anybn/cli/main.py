"""``python -m anybn info | demo | check | bench``: what is installed, a training to look at, tests of this machine."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anybn
from anybn.backends.registry import backend_named, installation_of, installed_backends, known_backends, resolve_target
from anybn.errors import BackendNotInstalled

# What argparse needs of a set of subcommands; its own name for the type is private.
Commands = Any


# -- info ------------------------------------------------------------------------------------------------------


def add_info(commands: Commands) -> None:
    command = commands.add_parser("info", help="which backends are installed and usable")
    command.set_defaults(run=info)


def info(_: argparse.Namespace) -> int:
    installed = installed_backends()
    print(f"anybn {anybn.__version__}, Python {platform.python_version()}\n")
    header = ("backend", "version", "takes arrays of", "how", "devices")
    print(table([header, *map(backend_row, installed.values())]))
    print("\nAn array of any other library with __array_namespace__ goes through the Array API core.")
    if missing := [name for name in known_backends() if name not in installed]:
        print("\nNot installed:")
        print(table([(name, installation_of(name)) for name in missing]))
    return 0


def backend_row(backend: anybn.BackendInfo) -> tuple[str, ...]:
    if backend.problem:
        return backend.name, backend.version, "", "", f"not usable: {backend.problem}"
    libraries = ", ".join(backend_named(backend.name).libraries)
    return backend.name, backend.version, libraries, backend.how, ", ".join(backend.devices)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


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
        "--picture",
        "--png",
        type=picture,
        default="anybn-demo.png",
        metavar="PATH",
        help="for the curves, in any format that matplotlib writes; default: %(default)s",
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
    try:
        from anybn.cli.demo import run
    except ImportError as error:
        raise BackendNotInstalled(
            f'the demo needs scikit-learn, matplotlib, tqdm and safetensors ({error}): pip install "anybn[demo]"'
        ) from error
    passed = run(
        epochs=options.epochs,
        seed=options.seed,
        layers=options.layers,
        picture=options.picture,
        switch_to=options.switch_to,
    )
    return 0 if passed else 1


def epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"{text} is not a number of epochs, 3 or more: the middle third is switched")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a seed: a whole number, 0 or more")
    return int(text)


def picture(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name the file in it")
    if problem := format_problem(path):
        raise argparse.ArgumentTypeError(problem)
    return path


def format_problem(path: Path) -> str:
    """Why matplotlib cannot write such a file, before hours of work; "" also where there is no matplotlib yet."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() in formats:
        return ""
    return f"{path} has no ending that matplotlib writes: use one of {', '.join(formats)}"


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
        print(f"anybn: --backend: {error}", file=sys.stderr)
        return 2
    names = options.backend or [name for name, backend in installed_backends().items() if backend.usable]
    print(f"checking {', '.join(names)}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *pytest_arguments(names)], check=False).returncode


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
        "--picture",
        "--png",
        type=picture,
        default="anybn-bench.png",
        metavar="PATH",
        help="for the bars, in any format that matplotlib writes; default: %(default)s",
    )
    command.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> int:
    try:
        from anybn.cli.bench import run
        from anybn.cli.comparison import WrongResult
        from anybn.cli.timing import QUIET
    except ImportError as error:
        raise BackendNotInstalled(
            f'the benchmark needs matplotlib and tqdm ({error}): pip install "anybn[demo]"'
        ) from error
    try:
        rows, busy = run(options.picture)
    except WrongResult as error:
        print(f"anybn: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    print(
        f"\nmedians of training forward passes on float32, {anybn.get_num_threads()} threads; every result was checked"
    )
    if busy > QUIET:
        print(f"other processes used up to {busy:.1f} CPUs meanwhile: try again when the machine is quiet")
    print(f"bars: {options.picture}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m anybn", description=anybn.__doc__)
    parser.add_argument("--version", action="version", version=f"anybn {anybn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_info, add_demo, add_check, add_bench):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except BackendNotInstalled as error:
        print(f"anybn: {error}", file=sys.stderr)
        return 1
