"""The Python of docs/ runs as it stands there, and prints what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

import anybn

jax = pytest.importorskip("jax", reason="jax: not installed, pip install jax")

PAGE = Path(__file__).parents[2] / "docs" / "jax.md"


def run(capsys, library=None):
    """The variables of the page's blocks, with those about one more library."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    blocks = [blocks[0], *(block for block in blocks[1:] if library and library in block)]
    assert len(blocks) == (2 if library else 1)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), re.M)
    assert printed == promised
    return scope


def trained(*inputs):
    """What NumPy makes of the running statistics."""
    state = anybn.BatchNormState(inputs[0].shape[1])
    for x in inputs:
        anybn.batch_norm(np.asarray(x), state, training=True)
    return state


def test_a_training_step(capsys):
    scope = run(capsys)
    assert np.allclose(scope["state"].running_var, trained(scope["x"]).running_var, rtol=1e-5)
    assert not np.allclose(scope["params"], np.eye(8))


def test_flax(capsys):
    pytest.importorskip("flax", reason="flax: not installed, pip install flax")
    scope = run(capsys, "flax")
    assert scope["losses"][-1] < scope["losses"][0]
    model, x = scope["model"], np.asarray(scope["x"])
    stats = model.norm.stats.get_value()
    assert np.array_equal(stats.weight, np.ones(16))
    assert not np.allclose(model.norm.scale.get_value(), 1)
    h = np.asarray(model.first(x))
    y = (h - stats.running_mean) / np.sqrt(stats.running_var + 1e-5) * model.norm.scale.get_value()
    expected = model.last(np.maximum(y + model.norm.bias.get_value(), 0))
    assert np.allclose(scope["prediction"], expected, atol=1e-4)  # float32


def test_equinox(capsys):
    pytest.importorskip("equinox", reason="equinox: not installed, pip install equinox")
    scope = run(capsys, "equinox")
    x = np.asarray(scope["x"])
    expected = trained(x, x, x)
    stats = scope["norm_state"].get(scope["norm"].stats)
    assert np.allclose(stats.running_mean, expected.running_mean, atol=1e-6)
    expected.weight, expected.bias = np.asarray(scope["norm"].weight), np.asarray(scope["norm"].bias)
    assert np.allclose(scope["y"], anybn.batch_norm(x, expected), atol=1e-5)
