"""The README's Python runs as it stands there, and prints what it says; its tables are those of the results."""

import importlib.util
import re
import sys

import numpy as np
import pytest
from pages import PRINTED, ROOT, blocks_of, run

import anybn
from anybn.conformance import oracle

README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_the_tour_runs(tmp_path, monkeypatch):
    scope = run(README, tmp_path, monkeypatch)
    assert len(PRINTED.findall("\n".join(blocks_of(README)))) == 1
    loaded, x = anybn.BatchNormState.load("bn.safetensors"), scope["x"]
    expected = [0.9**3 * start + (1 - 0.9**3) * batch for start, batch in ((0, x.mean(0)), (1, x.var(0, ddof=1)))]
    assert loaded.num_batches_tracked == 3
    assert np.allclose(loaded.running_mean, expected[0], rtol=1e-6)
    assert np.allclose(loaded.running_var, expected[1], rtol=1e-6)
    assert [f.cause for f in scope["report"].findings] == ["no updates"]
    hidden = scope["model"][0](scope["torch"].from_numpy(x)).detach().numpy()
    assert oracle.error(scope["model"][1].running_mean.numpy(), oracle.statistics(hidden).mean, "float32") <= 4


def test_links_lead_somewhere():
    """They are relative: the project has no public address yet."""
    links = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tables_are_those_of_the_results(torch, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for part, make in module.TABLES.items():
        assert f"<!-- {part} -->\n{make()}\n<!-- end of {part} -->" in README.read_text()
    for name in ("accuracy", "speed"):
        sys.modules.pop(name, None)
