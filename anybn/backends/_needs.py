"""The library that a backend's file is for, and how to get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anybn.errors import required

_pip_names: dict[str, str] = {}


@contextmanager
def needs(library: str, *, pip: str) -> Iterator[None]:
    """Around the imports of a backend's file that fail without its library.

    ``pip`` is what pip calls the library; it is noted even where they fail. Raises BackendNotInstalled for ImportError.

    >>> with needs("json", pip="never-asked"):
    ...     import json
    """
    _pip_names[library] = pip
    with required(f"the {library} backend was asked for but {library} cannot be imported", pip):
        yield


def pip_line(library: str) -> str:
    return f"pip install {_pip_names.get(library, library)}"
