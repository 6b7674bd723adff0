"""What commands print: tables in the width of a terminal, or JSON; what goes wrong, in a line of its own."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = Sequence[str]
LARGE = 64 * 2**20
"""bytes of a file from which reading it takes long enough to say so"""


def print_table(rows: Sequence[Row]) -> None:
    """The first row is the header. Into a pipe or a file go whole lines; to a terminal, columns that fit it."""
    if sys.stdout.isatty() and (console := _console()) is not None:
        from rich import box
        from rich.table import Table

        table = Table(*rows[0], box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    else:
        print(plain_table(rows))


def plain_table(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _console(**options: Any) -> Any:
    """rich's, without what it would do to text of ours; None where rich is missing."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(markup=False, highlight=False, emoji=False, **options)


def print_json(value: Mapping[str, Any]) -> None:
    """One document; numbers that JSON does not have are null."""
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def complain(text: object) -> None:
    """A line on stderr, whatever a message has in it."""
    print(f"anybn: {' '.join(str(text).split())}", file=sys.stderr)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say on a terminal that a large file is being read, while it is."""
    large = path.is_file() and path.stat().st_size >= LARGE
    console = _console(stderr=True) if large and sys.stderr.isatty() else None
    if console is None:
        yield
        return
    with console.status(f"reading {path.name}, {path.stat().st_size / 2**20:.0f} MiB"):
        yield
