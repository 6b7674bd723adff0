"""What importing anybn costs, in a fresh interpreter."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import anybn


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_brings_in_no_framework():
    loaded = run(
        "import sys, anybn\nanybn.BatchNorm(3)\nprint(*sorted({m.partition('.')[0] for m in sys.modules}))"
    ).split()
    assert "numpy" in loaded
    for framework in (
        "torch",
        "jax",
        "dask",
        "cupy",
        "numba",
        "array_api_strict",
        "safetensors",
        "pytest",
        "matplotlib",
    ):
        assert framework not in loaded


def test_import_leaves_numpys_lazy_parts_alone():
    """array_api_compat.numpy reads all of NumPy, f2py too, which takes longer than all of anybn."""
    assert run("import sys, anybn; anybn.BatchNorm(3); print('numpy.f2py' in sys.modules)") == "False\n"


def test_import_adds_little_to_numpys():
    """Nothing of others but array_api_compat, none of Python's slow modules, and of our own what every program needs.

    It took 0.06 to 0.09 s beside NumPy's 0.07 to 0.10, in November 2026 on two cores; a test has no times.
    """
    code = "import numpy, sys; before = set(sys.modules); import anybn; print(*sorted(set(sys.modules) - before))"
    loaded = set(run(code).split())
    packages = {name.partition(".")[0] for name in loaded}
    assert packages - sys.stdlib_module_names == {"anybn", "array_api_compat"}
    assert not packages & {"asyncio", "concurrent", "email", "http", "logging", "multiprocessing", "unittest", "xml"}
    later = ("_networks", "checkpoints.files", "checkpoints.live", "cli", "conformance", "diagnosis", "variants")
    assert not loaded & {f"anybn.{name}" for name in later}


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_framework_that_is_missing_is_an_attribute_that_is_missing(name):
    code = f"import sys; sys.modules['{name}'] = None; import anybn; print(hasattr(anybn, '{name}'))"
    assert run(code + f"\ntry: anybn.{name}\nexcept AttributeError as e: print('pip install {name}' in str(e))") == (
        "False\nTrue\n"
    )


def test_the_package_runs_from_a_zip(tmp_path):
    package, archive = Path(anybn.__file__).parent, tmp_path / "anybn.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in package.rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh"):
                file.write(path, path.relative_to(package.parent))
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); import anybn\n"
        "from anybn.kernels.cuda.launch import source\n"
        "print(anybn.__file__.startswith(sys.path[0]), '__global__' in source(), '.cuh' in source())"
    )
    assert run(code) == "True True False\n"


def test_pytest_runs_of_other_projects_load_no_numpy(tmp_path):
    """pytest loads the plugin in every run in the environment: it imports nothing, and brings no marker of its own."""
    tmp_path.joinpath("test_nothing.py").write_text("import sys\ndef test(): assert 'numpy' not in sys.modules\n")
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-p", "no:anybn"]
    command += ["-p", project["entry-points"]["pytest11"]["anybn"], "-c", os.devnull, "--rootdir", tmp_path]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*command, "--markers"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "pytest.mark.parametrize" in done.stdout
    assert "quick" not in done.stdout
    done = subprocess.run([*command, "--anybn-backend=nosuch"], capture_output=True, text=True, env=environment)
    assert "nosuch" in done.stderr
    assert len(done.stdout.splitlines() + done.stderr.splitlines()) < 8


def test_backends_is_a_function_and_a_package():
    assert (
        run("import anybn, anybn.backends.numpy as m; print('numpy' in anybn.backends(), m.NumPyBackend.name)")
        == "True numpy\n"
    )
