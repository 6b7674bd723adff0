"""README.md and the pages of docs/: their Python, run as it stands there."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

import anybn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LIBRARIES = ("torch", "jax", "dask", "keras", "flax", "equinox", "mlx", "cupy", "matplotlib", "safetensors")
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.M)


def has_cupy():
    """Whether there is CuPy, and a GPU for it."""
    return importlib.util.find_spec("cupy") is not None and anybn.backends()["cupy"].usable


def blocks_of(page, *, without=()):
    """The Python blocks of a page, but for examples with prompts, and what imports a library of these."""
    blocks = re.findall(r"```python\n(?!>>> )(.*?)```", page.read_text(), re.S)
    blocks += re.findall(r"```python cupy\n(.*?)```", page.read_text(), re.S) if has_cupy() else []
    left_out = re.compile(rf"^(import|from) ({'|'.join(without)})\b", re.M) if without else None
    return [block for block in blocks if left_out is None or not left_out.search(block)]


def run(page, tmp_path, monkeypatch, *, without=()):
    """What the page's blocks define; every ``print(...)  # text`` prints this text."""
    blocks = blocks_of(page, without=without)
    code = "\n".join(blocks)
    for library in LIBRARIES:
        if re.search(rf"^ *(import|from) {library}\b", code, re.M):
            pytest.importorskip(library, reason=f"{page.name} shows {library}, which is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    scope: dict = {"__name__": "page"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, str(page), "exec"), scope)
    lines = printed.getvalue().splitlines()
    for promised in PRINTED.findall(code):
        assert promised in lines
        lines = lines[lines.index(promised) + 1 :]
    return scope
