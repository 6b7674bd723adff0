"""``anybn inspect`` and ``anybn convert``, ``--json`` of every command, and what is said when one fails."""

import builtins
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import anybn
from anybn.cli import main as cli
from anybn.cli import output


@pytest.fixture
def model(tmp_path):
    """Six batch norms, of which each but the first has something that is seldom meant."""
    arrays = {}

    def layer(name, **changed):
        one = {"weight": [1.0, 2, 3], "bias": [0.5, 0, -1], "running_mean": [0.25, -1, 2], "running_var": [0.5, 1, 4]}
        arrays.update({f"{name}.{field}": np.array(a, np.float32) for field, a in (one | changed).items()})

    layer("fine")
    layer("nan", bias=[0, np.nan, np.inf])
    layer("negative", running_var=[-1, 1, 1e9])
    layer("dead", running_var=[0, 1e-13, 1], weight=[1, 1e-5, 1])
    layer("new", running_mean=[0, 0, 0], running_var=[1, 1, 1])
    layer("short", bias=[1, 2])
    path = tmp_path / "model.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def without(monkeypatch):
    """Make the imports of a package fail."""
    real = builtins.__import__

    def hide(missing):
        def importing(name, *args, **kwargs):
            if name.partition(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", importing)

    return hide


def run(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


# -- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_suspicious(model, capsys):
    status, out, err = run(capsys, "inspect", model, "--json", "--eps", "1e-3", "--eps", "dead=0.5")
    assert (status, err) == (0, "")
    layers = {layer["layer"]: layer for layer in json.loads(out)["layers"]}
    assert list(layers) == ["fine", "nan", "negative", "dead", "new", "short"]
    fine = layers["fine"]
    assert fine == {
        "layer": "fine",
        "channels": 3,
        "framework": "torch",
        "eps": 1e-3,
        "eps_is_told": True,
        "momentum": 0.1,
        "axis": 1,
        "ranges": {"weight": [1, 3], "bias": [-1, 0.5], "running_mean": [-1, 2], "running_var": [0.5, 4]},
        "suspicious": [],
    }
    assert layers["nan"]["suspicious"] == ["bias is NaN or infinite in 2 channels"]
    assert layers["negative"]["suspicious"][:2] == [
        "negative variance in 1 channel",
        "variance above 1e+06 in 1 channel",
    ]
    assert layers["negative"]["suspicious"][2].startswith("cannot be loaded: running_var is -1.0 in channel 0")
    assert layers["dead"]["suspicious"] == [
        "dead, variance up to 1e-12 in 2 channels",
        "|weight| up to 0.0001 in 1 channel",
    ]
    assert layers["dead"]["eps"] == 0.5
    assert layers["new"]["suspicious"] == ["never updated: every mean is 0, every variance 1"]
    assert "bias has shape (2,)" in layers["short"]["suspicious"][0]


def test_inspect_prints_a_table(model, capsys):
    status, out, err = run(capsys, "inspect", model)
    assert (status, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split()[:5] == ["layer", "channels", "framework", "eps", "momentum"]
    assert rows[0].split()[:5] == ["fine", "3", "torch", "1e-05?", "0.1"]
    assert "0.5 .. 4" in rows[0]
    assert rows[-1].startswith("? the file does not tell it")
    _, out, _ = run(capsys, "inspect", model, "--eps=1e-3")
    assert "?" not in out


def test_inspect_of_our_own_file(tmp_path, capsys):
    anybn.BatchNormState(3, eps=0.5, momentum=None).save(tmp_path / "own.safetensors")
    _, out, _ = run(capsys, "inspect", tmp_path / "own.safetensors", "--json")
    (layer,) = json.loads(out)["layers"]
    assert (layer["eps"], layer["eps_is_told"], layer["momentum"]) == (0.5, True, None)
    for command in ("inspect",), ("convert", "--to=torch"):
        target = [tmp_path / "out.npz"] if command[0] == "convert" else []
        status, _, err = run(capsys, command[0], tmp_path / "own.safetensors", *target, *command[1:], "--eps=1e-3")
        assert status != 0
        assert "is a state's own file, which has it: leave --eps away" in err


def test_tables_fit_the_terminal(model, capsys, monkeypatch, without):
    pytest.importorskip("rich", reason="rich: not installed, pip install rich")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["inspect", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 60
    without("rich")
    assert cli.main(["inspect", str(model)]) == 0
    assert capsys.readouterr().out.startswith("layer     channels")


def test_a_large_file_is_said_to_be_read(model, monkeypatch, capsys):
    pytest.importorskip("rich", reason="rich: not installed, pip install rich")
    monkeypatch.setattr(output, "LARGE", 10)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["inspect", str(model), "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert "reading model.npz, 0 MiB" in err


# -- convert ---------------------------------------------------------------------------------------------------


def test_convert(tmp_path, capsys):
    arrays = {"gamma": [1.0, 2], "beta": [0.0, 1], "moving_mean": [3.0, 4], "moving_variance": [5.0, 6]}
    path = tmp_path / "keras.npz"
    np.savez(path, **{f"net/{layer}/{n}": np.array(a, "f4") for layer in ("a", "b") for n, a in arrays.items()})
    out = tmp_path / "torch.npz"
    status, text, err = run(capsys, "convert", path, out, "--from=keras", "--to=torch", "--eps=*b=0.5", "--eps=0.25")
    assert (status, err) == (0, "")
    assert text.splitlines()[0] == f"2 batch norms in torch's names: {out}"
    assert [row.split() for row in text.splitlines()[-2:]] == [
        ["eps=0.25,", "momentum=0.01", "1", "net.a"],
        ["eps=0.5,", "momentum=0.01", "1", "net.b"],
    ]
    written = dict(np.load(out))
    assert np.array_equal(written["net.b.running_var"], [5, 6])
    status, text, err = run(capsys, "convert", path, out, "--to=torch")
    assert (status, text) == (1, "")
    assert err == f"anybn: {out} is there already: pass --force to replace it\n"
    status, text, err = run(capsys, "convert", path, out, "--to=flax", "--force", "--json")
    assert (status, err) == (0, "")
    document = json.loads(text)
    assert document["settings"]["net/a"] == {"epsilon": 1e-3, "momentum": 0.99}
    assert len(document["warnings"]) == 1
    assert "assumed epsilon=0.001" in document["warnings"][0]
    assert sorted(np.load(out)) == [f"net/{layer}/{n}" for layer in "ab" for n in ("bias", "mean", "scale", "var")]


def test_convert_says_what_is_assumed(model, tmp_path, capsys):
    status, out, err = run(capsys, "convert", model, tmp_path / "out.npz", "--to=keras")
    assert status == 1  # of the layers that cannot be loaded
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("anybn: nothing was loaded: layer 'negative': running_var is -1.0")
    np.savez(model, **{name: a for name, a in np.load(model).items() if name.startswith("fine")})
    status, out, err = run(capsys, "convert", model, tmp_path / "out.npz", "--to=keras")
    assert status == 0
    assert err.startswith("anybn: ")
    assert err.count("\n") == 1
    assert "assumed eps=1e-05" in err


# -- json ------------------------------------------------------------------------------------------------------


def test_info_as_json(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    document = json.loads(out)
    assert document["anybn"] == anybn.__version__
    assert document["backends"]["numpy"]["usable"] is True
    assert all("pip install" in line for line in document["missing"].values())


def test_check_as_json(capsys, monkeypatch):
    text = "..F\nFAILED a.py::test_b - x\n1 failed, 2 passed, 3 skipped in 0.1s\n"
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=1, stdout=text))
    status, out, _ = run(capsys, "check", "--backend=numpy", "--json")
    assert status == 1
    assert json.loads(out) == {
        "backends": ["numpy"],
        "status": 1,
        "counts": {"failed": 1, "passed": 2, "skipped": 3},
        "failed": ["a.py::test_b - x"],
    }


def test_demo_as_json(tmp_path, capsys):
    pytest.importorskip("anybn.cli.demo", exc_type=ImportError)
    picture = tmp_path / "curves.svg"
    arguments = ["demo", "--epochs=3", "--layers=dense", f"--png={picture}", "--switch-to=array_api_strict", "--json"]
    status, out, _ = run(capsys, *arguments)
    document = json.loads(out)
    assert status == 0
    assert document["passed"] is True
    assert [len(one["losses"]) for one in document["runs"]] == [3, 3, 3]
    assert picture.read_text().startswith("<?xml")


# -- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "absent.npz"], "No such file or directory: 'absent.npz'"),
        (["inspect", "model.pb"], "model.pb is none of .keras, .h5"),
        (["inspect", "damaged.npz"], "damaged.npz is truncated, damaged or no .npz file"),
        (["inspect", "none.npz"], "none.npz has no batch norm: none of its 1 names ('conv.weight')"),
        (["inspect", "good.npz", "--eps=small"], "--eps is 'small'; it must be a number, or PATTERN=NUMBER"),
        (["inspect", "good.npz", "--eps=x*=1"], "eps has the pattern 'x*', but no layer matches it"),
        (["convert", "good.npz", "out.onnx", "--to=keras"], "name it one of .safetensors, .npz, .pt, .pth"),
        (["convert", "good.npz", "no/out.npz", "--to=keras"], "No such file or directory"),
    ],
)
def test_a_failure_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", **{"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)})
    np.savez("none.npz", **{"conv.weight": np.zeros(2)})
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and\nno more")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    lines = err.splitlines()
    assert lines[-1].startswith("anybn: ")
    assert message in lines[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("command", "packages"), [("demo", "scikit-learn matplotlib tqdm safetensors"), ("bench", "matplotlib tqdm")]
)
def test_the_packages_are_named_if_one_is_missing(command, packages, capsys, monkeypatch, without):
    pytest.importorskip(f"anybn.cli.{command}", exc_type=ImportError)
    for missing in packages.replace("scikit-learn", "sklearn").split():
        monkeypatch.delitem(sys.modules, f"anybn.cli.{command}")
        without(missing)
        status, out, err = run(capsys, command)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"No module named '{missing}" in err
        assert err.endswith(f": pip install {packages}\n")
        monkeypatch.undo()


def test_a_reader_that_has_seen_enough(model):
    """`anybn inspect model | head -1`, of a pipe that is closed before anything is written."""
    code = "import sys; from anybn.cli.main import main; sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    read, write = os.pipe()
    command = [sys.executable, "-c", code, "inspect", str(model)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    _, err = process.communicate()
    assert err == b""
    assert process.returncode == 141
