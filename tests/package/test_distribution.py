"""What is published: an sdist and, made of it, a wheel, which installs and works in an environment of its own."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from pages import ROOT

import anybn

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build", reason="build: not installed, pip install build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", folder, ROOT]  # an sdist, and of it a wheel
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def package_files():
    files = [path for path in (ROOT / "anybn").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.slow
def test_the_files(built):
    sdist, wheel = built
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == package_files() | {"anybn_pytest.py"}
    with tarfile.open(sdist) as file:
        in_sdist = {Path(*Path(name).parts[1:]).as_posix() for name in file.getnames()}
    assert in_sdist >= package_files()
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml", "docs/index.md"}
    assert in_sdist >= wanted | {"docs/images/story.png", "tests/conftest.py", "benchmarks/speed.py"}


@pytest.mark.slow
def test_it_works_where_nothing_else_is(built, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", built[1]], check=True)

    def run(*command):
        environment = {"PATH": str(python.parent)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert f"anybn {anybn.__version__}" in run("anybn", "info")
    assert run(python, "-m", "anybn", "--version") == f"anybn {anybn.__version__}\n"
    code = "import anybn, numpy; print(anybn.BatchNorm(2)(numpy.array([[1.0, 5.0], [3.0, 9.0]])).round(3).tolist())"
    assert run(python, "-c", code) == "[[-1.0, -1.0], [1.0, 1.0]]\n"


def test_metadata_says_one_thing():
    cff = (ROOT / "CITATION.cff").read_text()
    assert f"version: {anybn.__version__}\n" in cff
    assert f"license: {PROJECT['license']}\n" in cff
    assert f"## {anybn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "urls" not in PROJECT or not any("example" in url for url in PROJECT["urls"].values())
