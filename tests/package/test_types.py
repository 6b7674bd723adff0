"""What type checkers make of the Python in README.md and docs/, and of typed.py."""

import json
import os
import re
import subprocess
import sys

import pytest
from pages import DOCS, ROOT, blocks_of

README = ROOT / "README.md"
CASES = ROOT / "tests" / "typed.py"
#: Lines of them that a checker refuses, and why they stay.
REFUSED = {
    "print(whole.count, ": "of what Moments add up to, sum() says that it may be 0",
    "anybn.batch_norm(rng.normal(size=(256, 32)), live": "to torch, any attribute of a module is a tensor or a module",
    "lazy = da.random": "Dask declares chunks as a str",
}
PYRIGHT = {
    "extraPaths": [str(ROOT)],
    "reportPossiblyUnboundVariable": False,  # after a loop, as notebooks have it
    "reportUnnecessaryTypeIgnoreComment": True,
    "enableTypeIgnoreComments": False,  # those are for mypy
}


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The Python of README.md and of these pages in one file, without what needs Keras or Flax."""
    pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    pages = README, *(DOCS / f"{name}.md" for name in ("numpy", "padding", "freeze", "migrating", "dask", "processes"))
    blocks = [block for page in pages for block in blocks_of(page, without=("keras", "flax"))]
    file = tmp_path_factory.mktemp("types") / "tour.py"
    file.write_text("\n\n".join(blocks))
    return file


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def unexpected(found, tour):
    """Of (file, line, message), those that are not about a line in REFUSED."""
    lines = tour.read_text().splitlines()
    return [f for f in found if f[0] != str(tour) or not lines[f[1] - 1].startswith(tuple(REFUSED))]


def test_mypy(tour, tmp_path):
    """torch, JAX and Dask are Any here, as pyproject.toml says: reading their types takes mypy a minute."""
    pytest.importorskip("mypy", reason="mypy: not installed, pip install mypy")
    options = "--strict", "--allow-redefinition", "--allow-untyped-defs", "--allow-untyped-calls"
    result = run("mypy", *options, "--cache-dir", tmp_path, tour, CASES)
    found = re.findall(r"^(.+?):(\d+): error: (.*)$", result.stdout, re.M)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    assert not unexpected([(file, int(line), message) for file, line, message in found], tour)


def test_pyright(tour):
    pytest.importorskip("pyright", reason="pyright: not installed, pip install pyright, which downloads the rest")
    if run("pyright", "--version", PYRIGHT_PYTHON_IGNORE_WARNINGS="1").returncode:
        pytest.skip("pyright cannot download itself here")
    settings = tour.with_name("pyrightconfig.json")
    settings.write_text(json.dumps(PYRIGHT))
    tour.with_name(CASES.name).write_text(CASES.read_text())
    result = run("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", settings)
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, result.stdout
    found = [
        (found["file"], found["range"]["start"]["line"] + 1, found["message"])
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    assert not unexpected(found, tour)
