"""``python -m anybn``, and ``anybn``: info, demo and check."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import anybn
from anybn import BackendInfo
from anybn.cli import main as cli
from anybn.cli.net import CLASSES, LEARNING_RATE, SGD_MOMENTUM, Net, windows

demo = pytest.importorskip("anybn.cli.demo", exc_type=ImportError)


# -- info ------------------------------------------------------------------------------------------------------


def test_info_lists_what_is_installed_and_how_to_install_the_rest(capsys, monkeypatch):
    found = {
        "numpy": BackendInfo("numpy", "2.9", ("cpu",), "blocks"),
        "cupy": BackendInfo("cupy", "14.0", (), "kernels", "it finds no device to run on"),
        "jax": BackendInfo("jax", "unknown", (), "", "RuntimeError: no plugin"),
    }
    monkeypatch.setattr(cli, "installed_backends", lambda: found)
    monkeypatch.setattr(cli, "backend_named", lambda name: SimpleNamespace(libraries=(name,)))
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"anybn {anybn.__version__}, Python 3.")
    (row,) = (line.split() for line in lines if line.startswith("numpy "))
    assert row[:3] == ["numpy", "2.9", "numpy"]
    assert row[-1] == "cpu"
    assert any(line.startswith("cupy") and line.endswith("not usable: it finds no device to run on") for line in lines)
    assert any(line.startswith("jax") and line.endswith("not usable: RuntimeError: no plugin") for line in lines)
    missing = lines[lines.index("Not installed:") + 1 :]
    assert {line.split()[0] for line in missing} == {"torch", "dask", "array_api_strict", "mlx", "ndonnx"}
    assert all("pip install" in line for line in missing)


# -- demo: the net ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_gradients_are_the_slopes_of_the_loss(kind, batch_norm, monkeypatch):
    net, rng = Net(kind, 0, batch_norm=batch_norm), np.random.default_rng(0)
    labels = np.eye(CLASSES)[rng.integers(0, CLASSES, 6)]
    x = rng.standard_normal((6, 8, 8, 1) if kind == "conv" else (6, 64))
    parameters = [
        (i, name)
        for i, layer in enumerate(net.layers)
        for name in ("weight", "bias")
        if getattr(layer.state, name) is not None
    ]
    assert len(parameters) == (3 * 3 + 2 if batch_norm else 3 * 2 + 2)
    for i, name in parameters:  # away from biases of 0, where a unit that sees nothing sits on the corner of its relu
        value = getattr(net.layers[i].state, name)
        setattr(net.layers[i].state, name, value + 0.1 * rng.standard_normal(value.shape))
    found = {}
    monkeypatch.setattr(net, "descend", lambda i, gradients: found.update({i: gradients}))
    net.step(x, labels)
    gradients = dict(found)

    for i, name in parameters:
        state, gradient = net.layers[i].state, getattr(gradients[i], name)
        value, direction, h = getattr(state, name), rng.standard_normal(gradient.shape), 1e-6
        losses = []
        for sign in (1, -1):
            setattr(state, name, value + sign * h * direction)
            losses.append(net.step(x, labels))
        setattr(state, name, value)
        slope = (losses[0] - losses[1]) / (2 * h)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-5, atol=1e-8)


def test_convolution_equals_its_definition():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((3, 3, 3, 2))
    y = windows(x)[0] @ weight.reshape(27, 2)
    expected = np.zeros((2, 5, 4, 2))
    for h, w, i, j in np.ndindex(5, 4, 3, 3):
        if 0 <= h + i - 1 < 5 and 0 <= w + j - 1 < 4:
            expected[:, h, w] += x[:, h + i - 1, w + j - 1] @ weight[i, j]
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)


def test_descent_has_momentum():
    net = Net("dense", 0, batch_norm=True)
    last = len(net.layers) - 1
    before, gradient = net.layers[last].state.bias, np.arange(10.0)
    for _ in range(2):
        net.descend(last, anybn.Gradients(None, None, gradient, None))
    expected = before - LEARNING_RATE * (2 + SGD_MOMENTUM) * gradient
    np.testing.assert_allclose(net.layers[last].state.bias, expected, rtol=1e-15)


def test_state_difference_sees_one_value_one_batch_and_nan():
    a, b = (Net("dense", 0, batch_norm=True) for _ in range(2))
    assert demo.state_difference(a, b) == 0
    state = a.norms[1].state
    state.running_var = np.where(np.arange(64) == 7, 1 + 1e-9, 1)
    assert demo.state_difference(a, b) == pytest.approx(1e-9, rel=1e-3)
    state.running_var = np.ones(64)
    state.weight = np.full(64, np.nan)
    assert not demo.state_difference(a, b) <= demo.TOLERANCE
    state.weight = np.ones(64)
    state.num_batches_tracked = 1
    assert demo.state_difference(a, b) == float("inf")


def test_spans():
    assert demo.spans(["numpy", "torch", "torch", "numpy"]) == [("numpy", 1, 1), ("torch", 2, 3), ("numpy", 4, 4)]


@pytest.mark.parametrize("ending", cli.PICTURES)
def test_curves_in_every_format(ending, tmp_path):
    runs = [demo.Run(name, None, [1.0, 0.5, 0.2], [0.8, 0.9, 0.95], ["numpy", "torch", "numpy"]) for name in "abc"]
    path = tmp_path / f"curves{ending.upper()}"
    demo.draw(path, "conv", *runs)
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".eps": b"%!PS", ".jpg": b"\xff\xd8"}
    starts |= {".webp": b"RIFF", ".tif": (b"II*", b"MM\x00*")}
    assert path.read_bytes().startswith(starts[ending])


# -- demo: the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["conv", "dense"])
def test_demo_switches_and_learns(layers, tmp_path, capsys):
    path = tmp_path / "curves.png"
    arguments = ["demo", "--epochs=3", f"--layers={layers}", f"--png={path}", "--seed=1"]
    status = cli.main([*arguments, "--switch-to=array_api_strict"])
    out = capsys.readouterr().out
    assert status == 0, out
    (row,) = (line for line in out.splitlines() if line.startswith("with batch norm, switched"))
    assert "1-1 on numpy, 2-2 on array_api_strict" in row
    assert row.endswith("3-3 on numpy")
    accuracy = float(row.split("%")[2])
    assert accuracy > 90
    assert out.count(": ok\n") == 2
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(("check", "result"), [("state_difference", 1e-3), ("survives_checkpoint", False)])
def test_demo_fails_with_its_checks(check, result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, check, lambda *_: result)
    arguments = ["demo", "--epochs=3", "--layers=dense", f"--png={tmp_path / 'a.png'}", "--switch-to=array_api_strict"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.parametrize("guest", ["torch", "jax"])
def test_demo_switches_to(guest, tmp_path):
    pytest.importorskip(guest)
    # In a process of its own, because JAX takes its precision for the whole process.
    command = [sys.executable, "-W", "error", "-m", "anybn", "demo", "--epochs=3", "--layers=dense"]
    command += [f"--switch-to={guest}", f"--png={tmp_path / 'a.png'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"2-2 on {guest}" in done.stdout


def test_the_demo_s_extra_brings_a_library_to_switch_to():
    extras = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    names = {re.split("[^a-z-]", need)[0].replace("-", "_") for need in extras["optional-dependencies"]["demo"]}
    assert names & set(demo.GUESTS)


def test_demo_takes_the_next_library_if_torch_is_missing(capsys, monkeypatch):
    def backend_named(name):
        if name in missing:
            raise anybn.BackendNotInstalled(name)

    monkeypatch.setattr(demo, "backend_named", backend_named)
    missing = ()
    assert demo.available_guest() == "torch"
    assert capsys.readouterr().out == ""
    missing = ("torch", "jax")
    assert demo.available_guest() == "array_api_strict"
    assert "torch is not installed" in capsys.readouterr().out
    missing = demo.GUESTS
    with pytest.raises(anybn.BackendNotInstalled, match="pip install torch"):
        demo.available_guest()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epochs=2", "3 or more"),
        ("--epochs=some", "3 or more"),
        ("--png=no/such/folder/a.png", "no folder"),
        ("--png=.", "is a folder"),
        ("--png=a.txt", "does not end in one of .png, .svg, .pdf"),
        ("--png=picture", "does not end in one of .png, .svg, .pdf"),
        ("--seed=-1", "0 or more"),
        ("--seed=some", "0 or more"),
        ("--switch-to=abacus", "abacus"),
        ("--switch-to=dask", "dask"),
        ("--layers=recurrent", "recurrent"),
    ],
)
def test_demo_refuses(option, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo", option])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


# -- check -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pytest_command(monkeypatch):
    """The command that check runs, with pytest replaced by something that ends with status 5."""
    ran = []

    def run(command, **_):
        ran[:] = command
        return SimpleNamespace(returncode=5)

    monkeypatch.setattr(cli.subprocess, "run", run)
    return ran


def test_check_runs_the_quick_conformance_tests(pytest_command, monkeypatch):
    monkeypatch.setattr(cli, "resolve_target", lambda name: None)  # there is no such device in most places
    assert cli.main(["check", "--backend", "numpy", "--backend", "torch:cuda"]) == 5
    assert pytest_command[:3] == [sys.executable, "-m", "pytest"]
    arguments = pytest_command[3:]
    assert arguments[:2] == ["--pyargs", "anybn.conformance"]
    assert arguments[arguments.index("-m") + 1] == "quick"
    assert arguments[-2:] == ["--anybn-backend=numpy", "--anybn-backend=torch:cuda"]


def test_check_takes_every_usable_backend(pytest_command, monkeypatch):
    found = {
        "numpy": BackendInfo("numpy", "2", ("cpu",), ""),
        "cupy": BackendInfo("cupy", "14", (), ""),
        "jax": BackendInfo("jax", "unknown", ("cpu",), "", "broken"),
        "dask": BackendInfo("dask", "2026", ("cpu",), ""),
    }
    monkeypatch.setattr(cli, "installed_backends", lambda: found)
    cli.main(["check"])
    assert [a for a in pytest_command if "backend" in a] == ["--anybn-backend=numpy", "--anybn-backend=dask"]


def test_check_of_a_backend_that_there_is_not(pytest_command, capsys):
    assert cli.main(["check", "--backend", "numpy", "--backend", "nosuch"]) == 2
    assert not pytest_command
    printed = capsys.readouterr()
    assert not printed.out
    assert re.fullmatch(r"anybn: --backend: .*nosuch.*\n", printed.err)


def test_check_without_pytest(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    assert cli.main(["check"]) == 1
    assert capsys.readouterr().err == "anybn: check needs pytest: pip install pytest\n"


# -- the command line ------------------------------------------------------------------------------------------


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([])
    assert exit.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "anybn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"anybn {anybn.__version__}\n"


def test_the_console_script_is_the_same_command():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    assert EntryPoint("anybn", project["scripts"]["anybn"], "console_scripts").load() is cli.main
