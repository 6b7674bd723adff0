"""The Python of the pages in docs/ runs as it stands there, and prints what it says."""

import importlib.util

import numpy as np
import pytest
from pages import DOCS, blocks_of, run

import anybn
from anybn.interop import CONVENTIONS

#: Pages whose code has tests of its own.
OWN = {"jax.md", "testing.md", "torch.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if blocks_of(path) and path.name not in OWN)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(name, tmp_path, monkeypatch):
    without = [lib for lib in ("keras", "flax") if importlib.util.find_spec(lib) is None]  # pages go on without these
    scope = run(DOCS / name, tmp_path, monkeypatch, without=without)
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


def migrating_page(scope):
    fused, model, x = scope["fused"], scope["model"], scope["torch"].from_numpy(scope["h"])
    assert [str(node.target) for node in fused.graph.nodes] == ["input", "0", "1", "output"]
    fused.eval(), model.eval()
    assert scope["torch"].allclose(fused(x), model(x), atol=1e-6)
    assert scope["live"].num_batches_tracked == 2


def accumulation_page(scope):
    assert scope["model"][1].num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "other"), [("keras", "flax"), ("flax", "keras")])
def test_weights_go_there_and_back(library, other, tmp_path, monkeypatch):
    pytest.importorskip(library, reason=f"{library}: not installed")
    scope = run(DOCS / "keras.md", tmp_path, monkeypatch, without=[other])
    state, back = scope["norms"]["1"], scope["back"]
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
    "recalibrate.md": recalibrate_page,
    "processes.md": processes_page,
    "dask.md": dask_page,
    "migrating.md": migrating_page,
    "accumulation.md": accumulation_page,
}


def test_the_table_of_conventions_is_theirs():
    rows = [line for line in (DOCS / "migrating.md").read_text().splitlines() if line.startswith("| `")]
    table = {cells[1].strip(" `"): [cell.strip() for cell in cells[2:-1]] for cells in (row.split("|") for row in rows)}
    for name, rules in CONVENTIONS.items():
        of = {quantity.replace("hidden", "running"): key for key, quantity in reversed(rules.names.items())}
        arrays = [f"`{of[q]}`" if q in of else "-" for q in ("weight", "bias", "running_mean", "running_var")]
        (eps, default_eps), (momentum, default) = rules.eps, rules.momentum
        settings = [f"`{eps}={default_eps:g}`", f"`{momentum}`" if default is None else f"`{momentum}={default:g}`"]
        assert table[name][:6] == [*arrays, *settings]
        assert table[name][6:] == ["the old" if rules.decay else "the new", str(rules.ddof)]


def test_a_print_that_says_something_else_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)  # 3\n```\n")
    with pytest.raises(AssertionError):
        run(page, tmp_path, monkeypatch)
