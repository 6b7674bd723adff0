"""The README's Python runs as it stands there, and prints what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"


#: What the tour shows of frameworks that the tests do not require.
OTHERS = ("keras", "flax")


def run_the_tour(*, others=()):
    """The tour's blocks and what they define; of those that import one of OTHERS, only these others."""
    for library in ("torch", "jax", "dask", "safetensors", *others):
        pytest.importorskip(library, reason=f"the tour shows {library}")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    left_out = "|".join(name for name in OTHERS if name not in others)
    blocks = [block for block in blocks if not re.search(rf"^(import|from) ({left_out})\b", block, re.M)]
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    return blocks, scope


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_the_tour_runs_with(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    _, scope = run_the_tour(others=[name])
    state, back = scope["norms"]["1"], scope["back"]
    assert np.allclose(back.running_var, state.running_var, rtol=1e-6)
    assert (back.eps, back.momentum, back.ddof) == (state.eps, state.momentum, 0)


def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks, scope = run_the_tour()
    assert len(blocks) >= 8
    promised = re.findall(r"^print\(\w+\)  # (.*)$", "\n".join(blocks), re.M)
    assert len(promised) == 3
    printed = capsys.readouterr().out
    for line in promised:
        assert line in printed
    h, bn = scope["h"].astype(np.float64), scope["bn"]
    bn.eval()
    folded = h[:, :32] @ scope["folded_weight"].T + scope["folded_bias"]
    assert folded.shape == (256, 64)
    assert scope["whole"].count == 16
    assert np.allclose(scope["whole"].var(), h[:16].var(0))
    assert scope["state"].num_batches_tracked == 5
    assert scope["live"].num_batches_tracked == 3  # four micro-batches count as one
    assert scope["served"].shape == (2, 8, 5, 5)
    fused, x = scope["fused"], scope["torch"].from_numpy(scope["h"])
    assert [str(node.target) for node in fused.graph.nodes] == ["input", "0", "1", "output"]
    assert scope["torch"].allclose(fused(x), scope["model"](x), atol=1e-6)
