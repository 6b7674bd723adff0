"""The README's Python runs as it stands there, and prints what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    for library in ("torch", "jax", "safetensors"):
        pytest.importorskip(library, reason=f"the tour shows {library}")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 8
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
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
    assert scope["state"].num_batches_tracked == 4
    fused, x = scope["fused"], scope["torch"].from_numpy(scope["h"])
    assert [str(node.target) for node in fused.graph.nodes] == ["input", "0", "1", "output"]
    assert scope["torch"].allclose(fused(x), scope["model"](x), atol=1e-6)
