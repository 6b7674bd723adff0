"""The Python of README.md and of the pages in docs/ runs as it stands there, and prints what it says."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import anybn
from anybn.interop import CONVENTIONS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages whose code has tests of its own.
OWN = {"jax.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in OWN and "```python\n" in path.read_text())
LIBRARIES = ("torch", "jax", "dask", "keras", "flax", "equinox", "mlx", "cupy", "matplotlib", "safetensors")
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.M)


def blocks_of(page, *, without=()):
    """The Python blocks of a page, but for those that import a library of these."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PAGES, "README.md"])
def test_a_page_runs(name, tmp_path, monkeypatch):
    page = ROOT / name if name == "README.md" else DOCS / name
    without = [lib for lib in ("keras", "flax") if importlib.util.find_spec(lib) is None]  # pages go on without these
    scope = run(page, tmp_path, monkeypatch, without=without)
    if (check := CHECKS.get(name)) is not None:
        check(scope)


# -- what the pages define is right --------------------------------------------------------------------------------


def numpy_page(scope):
    h, bn = scope["h"].astype(np.float64), scope["bn"]
    bn.eval()
    x = np.random.default_rng(0).normal(size=(9, 32))
    expected = anybn.batch_norm(x @ scope["weight"].T, bn.state)
    assert np.allclose(x @ scope["folded_weight"].T + scope["folded_bias"], expected)
    assert scope["whole"].count == 16
    assert np.allclose(scope["whole"].var(), h[:16].var(0))
    assert scope["state"].num_batches_tracked == 3


def keras_page(scope):
    assert scope["served"].shape == (2, 8, 5, 5)
    state, back = scope["norms"]["1"], scope.get("back")
    if back is not None:
        assert np.allclose(back.running_var, state.running_var, rtol=1e-6)
        assert (back.eps, back.momentum, back.ddof) == (state.eps, state.momentum, 0)


def recalibrate_page(scope):
    assert scope["model"][0].num_batches_tracked == 4


def processes_page(scope):
    state = anybn.BatchNormState(64)
    anybn.batch_norm(scope["h"], state, training=True)
    assert np.allclose(scope["state"].running_var, state.running_var, rtol=1e-5)
    assert scope["state"].num_batches_tracked == 1


def dask_page(scope):
    y = scope["y"]
    assert type(y).__module__.startswith("dask")
    means, variances = y.mean((0, 2, 3)).compute(), y.var((0, 2, 3)).compute()
    assert abs(means).max() < 1e-5
    assert abs(variances - 1).max() < 1e-4


CHECKS = {
    "numpy.md": numpy_page,
    "keras.md": keras_page,
    "recalibrate.md": recalibrate_page,
    "processes.md": processes_page,
    "dask.md": dask_page,
}


def test_the_table_of_conventions_is_theirs():
    rows = [line for line in (DOCS / "migrating.md").read_text().splitlines() if line.startswith("| `")]
    table = {cells[1].strip(" `"): [cell.strip() for cell in cells[2:-1]] for cells in (row.split("|") for row in rows)}
    for name, rules in CONVENTIONS.items():
        of = {quantity.replace("hidden", "running"): key for key, quantity in reversed(rules.names.items())}
        arrays = [f"`{of[q]}`" if q in of else "-" for q in ("weight", "bias", "running_mean", "running_var")]
        (eps, default_eps), (momentum, default) = rules.eps, rules.momentum
        wanted = [*arrays, f"`{eps}`, {default_eps:g}", f"`{momentum}`, {'-' if default is None else f'{default:g}'}"]
        assert table[name][:6] == wanted
        assert table[name][6:] == ["the old" if rules.decay else "the new", str(rules.ddof)]


def test_links_of_the_readme_lead_somewhere():
    """Links are relative: the project has no public address yet."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_missing_libraries_are_told(tmp_path, monkeypatch):
    """The runner itself: a page whose print differs fails."""
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)  # 3\n```\n")
    with pytest.raises(AssertionError):
        run(page, tmp_path, monkeypatch)
    assert "page" not in sys.modules
