"""The frameworks' own tests of their batch norms, with anybn's layers in their place; see `swap`.

Keras and Haiku bring theirs. Flax has them in its source distribution: ANYBN_FLAX_TESTS names the folder ``tests`` of
it, as `.ci/run` fetches it. Equinox publishes none: `test_layers` holds what its tests hold.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]


def run(package, framework, *arguments, **environment):
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package}: not installed, pip install {package}")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-c", os.devnull, "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-p", "frameworks_own.swap", *arguments]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **environment, "ANYBN_SWAP": framework, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"])
def test_keras(backend):
    # Keras has no fit on NumPy, which these tests of masks use.
    chosen = ["-k", "not ignore_masked_values"] if backend == "numpy" else []
    tests = "keras.src.layers.normalization.batch_normalization_test"
    run("keras", "keras", "--pyargs", tests, *chosen, KERAS_BACKEND=backend)


def test_haiku():
    run("dm-haiku", "haiku", "--pyargs", "haiku._src.batch_norm_test")


@pytest.mark.parametrize("file", ["nnx/nn/normalization_test.py", "linen/linen_test.py"])
def test_flax(file):
    folder = os.environ.get("ANYBN_FLAX_TESTS")
    if not folder:
        pytest.skip("ANYBN_FLAX_TESTS does not name the folder tests of Flax's source distribution")
    run("flax", "flax", str(Path(folder, file)), "-k", "batchnorm or batch_norm")
