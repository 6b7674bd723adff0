"""The README's Python runs as it stands there, and prints what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

import anybn

README = Path(__file__).parent.parent / "README.md"


#: What the tour shows of frameworks that the tests do not require.
OTHERS = ("keras", "flax")


def is_of_another(block):
    return any(re.search(rf"^(import|from) {name}\b", block, re.M) for name in OTHERS)


def blocks_of_the_readme():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def run(blocks, scope):
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_what_it_shows_of(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip(name, reason=f"{name}: not installed, pip install {name}")
    state = anybn.BatchNormState(8, momentum=0.1)
    anybn.batch_norm(np.random.default_rng(0).normal(size=(9, 8)), state, training=True)
    scope = {"anybn": anybn, "norms": {"1": state}}
    run([block for block in blocks_of_the_readme() if re.search(rf"^(import|from) {name}\b", block, re.M)], scope)
    assert np.allclose(scope["back"].running_var, state.running_var, rtol=1e-6)
    assert (scope["back"].eps, scope["back"].momentum) == (state.eps, state.momentum)


def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    for library in ("torch", "jax", "safetensors"):
        pytest.importorskip(library, reason=f"the tour shows {library}")
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in blocks_of_the_readme() if not is_of_another(block)]
    assert len(blocks) >= 8
    scope: dict = {}
    run(blocks, scope)
    promised = re.findall(r"^print\(\w+\)  # (.*)$", "\n".join(blocks), re.M)
    assert len(promised) == 2
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
    assert scope["served"].shape == (2, 8, 5, 5)
