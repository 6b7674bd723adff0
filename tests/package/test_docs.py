"""The Python of docs/ runs as it stands there, and prints what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anybn

DOCS = Path(__file__).parents[2] / "docs"


def python_of(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def run(capsys, page, blocks):
    """The variables of blocks of a page, which print what they promise."""
    scope: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), re.M)
    assert printed == promised
    return scope


# -- jax.md -------------------------------------------------------------------------------------------------------


def run_jax(capsys, library=None):
    """The variables of the page's blocks, with those about one more library."""
    pytest.importorskip("jax", reason="jax: not installed, pip install jax")
    blocks = python_of("jax.md")
    blocks = [blocks[0], *(block for block in blocks[1:] if library and library in block)]
    assert len(blocks) == (2 if library else 1)
    return run(capsys, "jax.md", blocks)


def trained(*inputs):
    """What NumPy makes of the running statistics."""
    state = anybn.BatchNormState(inputs[0].shape[1])
    for x in inputs:
        anybn.batch_norm(np.asarray(x), state, training=True)
    return state


def test_a_training_step(capsys):
    scope = run_jax(capsys)
    assert np.allclose(scope["state"].running_var, trained(scope["x"]).running_var, rtol=1e-5)
    assert not np.allclose(scope["params"], np.eye(8))


def test_flax(capsys):
    pytest.importorskip("flax", reason="flax: not installed, pip install flax")
    scope = run_jax(capsys, "flax")
    assert scope["losses"][-1] < scope["losses"][0]
    model, x = scope["model"], np.asarray(scope["x"])
    assert not np.allclose(model.norm.scale.get_value(), 1)
    h = np.asarray(model.first(x))
    y = (h - model.norm.mean[...]) / np.sqrt(model.norm.var[...] + 1e-5) * model.norm.scale.get_value()
    expected = model.last(np.maximum(y + model.norm.bias.get_value(), 0))
    assert np.allclose(scope["prediction"], expected, atol=1e-4)  # float32


def test_equinox(capsys):
    pytest.importorskip("equinox", reason="equinox: not installed, pip install equinox")
    scope = run_jax(capsys, "equinox")
    x = np.asarray(scope["x"])
    state = anybn.load_batch_norms((scope["norm"], scope["norm_state"]))[""]  # its averages, debiased: all saw x
    assert np.allclose(state.running_mean, x.mean(0), atol=1e-5)
    assert not np.allclose(scope["norm"].weight, 1)


# -- statistics.md ------------------------------------------------------------------------------------------------


def test_statistics(torch, capsys):
    scope = run(capsys, "statistics.md", python_of("statistics.md"))
    everything = np.concatenate(scope["batches"])
    assert np.allclose(scope["whole"].mean, everything[:160].mean(0), rtol=1e-14)
    known = np.where(np.isnan(scope["table"]), np.nan, scope["table"])
    assert np.allclose(scope["scaler"].running_var, np.nanvar(known, 0), rtol=1e-14)


# -- testing.md ---------------------------------------------------------------------------------------------------


def files_of_testing(folder):
    """The files that the page shows, in a folder, as those of an installed package; and the environment to find it."""
    for block in python_of("testing.md"):
        name = re.match(r"# (\w+\.py)\n", block)[1]
        (folder / name).write_text(block)
    (toml,) = re.findall(r"```toml\n(.*?)```", (DOCS / "testing.md").read_text(), re.S)
    group, line = re.match(r'\[project\.entry-points\."([\w.]+)"\]\n(.*)\n', toml).groups()
    installed = folder / "mylib-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mylib\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path(anybn.__file__).parents[1])])}


def pytest_in(folder, environment, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    return run.stdout


def test_the_backend_that_logs_passes_the_suite(tmp_path):
    environment = files_of_testing(tmp_path)
    suite = ("--pyargs", "anybn.conformance", "--anybn-backend=logging")
    assert re.search(r"^[^f]*\d{3} passed", pytest_in(tmp_path, environment, *suite, "-m", "not slow"), re.M)
    logged = pytest_in(
        tmp_path, environment, *suite, "-k", "test_worked_example", "-o", "log_cli=1", "--log-level=INFO"
    )
    assert "training on (3, 4)" in logged


def test_the_tests_of_a_library_on_anybn(tmp_path):
    environment = files_of_testing(tmp_path)
    done = pytest_in(tmp_path, environment, "test_mylayers.py", "--anybn-backend=numpy,array_api_strict,logging")
    assert "15 passed" in done


def test_the_names_of_testing_exist():
    import importlib

    names = re.findall(r"`(anybn\.conformance\.[\w.]+)`", (DOCS / "testing.md").read_text())
    assert len(names) > 15
    for name in names:
        _, _, module, *attributes = name.split(".")
        found = importlib.import_module(f"anybn.conformance.{module}")
        for attribute in attributes:
            found = getattr(found, attribute)
        assert found.__doc__ or isinstance(found, dict), f"{name} has no words of its own"


def test_the_page_of_checkpoints(capsys):
    scope = run(capsys, "checkpoints.md", python_of("checkpoints.md"))
    assert np.allclose(scope["y"], 1 / np.sqrt(np.float32(0.01) + 1e-3), rtol=1e-6)
    assert sorted(scope["weights"]) == [f"stem.{name}" for name in ("bias", "running_mean", "running_var", "weight")]
