"""The compiled kernels: the same bits whatever the threads, the tasks or their absence; errors and forks in between."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import anybn
from anybn.backends.numpy import NumPyBackend
from anybn.conformance import inputs, oracle
from anybn.core.call import Call, Spec
from anybn.kernels.cpu import chunked
from anybn.kernels.cpu.threads import run
from anybn.kernels.layout import layout_of

pytest.importorskip("numba", reason="numba: not installed, pip install 'anybn[fast]'")
from anybn.kernels.cpu import cached, columns, operations, rows, runs, sharing, step
from anybn.kernels.cpu import values as value_kernels

#: Shapes and axes on either side of every decision: whole channels, pieces of one, joined rows, tails, single calls.
CASES = [
    ((3, 5, 7, 7), 1),
    ((40, 5, 14, 14), 1),
    ((2, 1, 9), 1),
    ((4, 300, 600), 1),
    ((3, 2, 70_000), 1),
    ((1, 2, 300_001), 1),
    ((5, 4, 130, 130), -1),
    ((1001, 3), 1),
    ((4001, 70), 1),
    ((300, 1023), 1),
    ((2, 70_000), 1),
    ((7, 3, 11, 13), 2),
    ((6, 40_000), 0),
]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = anybn.get_num_threads()
    yield
    anybn.set_num_threads(before)


def everything(values, axis, relu, with_residual):
    """All results of a training step and an evaluation."""
    axis %= values.ndim
    channels = values.shape[axis]
    state = anybn.BatchNormState(channels)
    state.weight, state.bias = inputs.normal((2, channels), 5).astype(np.float32)
    options = {
        "axis": axis,
        "activation": "relu" if relu else None,
        "residual": values[::-1].copy() if with_residual else None,
    }
    y, pullback = anybn.batch_norm_vjp(values, state, training=True, **options)
    grads = pullback(inputs.normal(values.shape, 6).astype(values.dtype))
    results = [y, grads.x, grads.weight, grads.bias, state.running_mean, state.running_var]
    results.append(anybn.batch_norm(values, state, **options))
    if with_residual:
        results.append(grads.residual)
    return results


@pytest.mark.parametrize("kernels", [operations, chunked], ids=["compiled", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_number_of_threads_changes_no_bit(case, dtype, kernels, monkeypatch):
    monkeypatch.setattr("anybn.backends.numpy.kernels", lambda: kernels)
    shape, axis = case
    values = (inputs.normal(shape) * 2 + 3).astype(dtype)
    for relu, with_residual in itertools.product([True, False], repeat=2):
        seen = set()
        for threads in (1, 2, 7):
            anybn.set_num_threads(threads)
            seen.add(b"".join(a.tobytes() for a in everything(values, axis, relu, with_residual)))
        assert len(seen) == 1


@pytest.mark.parametrize("kernels", [operations, chunked], ids=["compiled", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_against_the_core(case, dtype, kernels, monkeypatch):
    """On exact data bit for bit; on other data as far as two ways to add may differ."""
    monkeypatch.setattr("anybn.backends.numpy.kernels", lambda: kernels)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    shape, axis = case
    for values, exact in ((inputs.exact(shape, axis), True), (inputs.normal(shape) * 2 + 3, False)):
        values = inputs.cast(values, dtype)
        for relu in (True, False):
            by_kernels = everything(values, axis, relu, True)
            with monkeypatch.context() as patch:
                patch.setattr(NumPyBackend, "_kernels_for", lambda *_: None)
                by_core = everything(values, axis, relu, True)
            for name, a, b in zip(
                ("y", "dx", "dw", "db", "mean", "var", "eval", "dr"), by_kernels, by_core, strict=True
            ):
                assert a.dtype == b.dtype
                if exact and name in ("y", "mean", "var", "eval", "dr"):
                    assert np.array_equal(a, b), name
                unit = a.dtype.name if name not in ("mean", "var") else dtype
                size = np.maximum(1, np.abs(b.astype(np.float64)).max())
                assert oracle.error(a, b.astype(np.float64), unit, size) <= (
                    8 if unit in ("float32", "float64") else 1
                ), name


class Core(NumPyBackend):
    def _kernels_for(self, call):
        return None


def results(backend, call):
    """All results of a training step and an evaluation."""
    y, statistics, _ = backend.train(call)
    dy = inputs.cast(inputs.normal(y.shape, 6), y.dtype.name)
    grads = backend.gradients(call, statistics, dy, y > 0, True)
    mean, var, m2 = statistics.mean, statistics.var, statistics.m2
    constants = statistics._replace(count=None)
    return [
        y, *grads, mean, var, m2, np.asarray(statistics.count),
        backend.evaluate(call, constants), backend.gradients(call, constants, dy, y > 0, True).x,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("of_channels", [False, True], ids=["positions", "positions of channels"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_against_the_core(case, of_channels, dtype):
    """NaN where the mask is False; and of the last channel nothing, where channels have masks of their own."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    shape, axis = case[0], case[1] % len(case[0])
    mask = inputs.normal(shape, 7) > -1
    if of_channels:
        mask[(slice(None),) * axis + (-1,)] = False
    else:
        mask = np.delete(mask, np.s_[1:], axis)
    x = inputs.cast(np.where(mask, inputs.normal(shape) * 2 + 3, np.nan), dtype)
    call = Call(x, Spec(axis, 1e-5, True), *inputs.normal((2, shape[axis]), 5).astype(np.float32), x, mask)
    seen = []
    for number in (1, 3):
        anybn.set_num_threads(number)
        seen.append(results(NumPyBackend(), call))
    assert b"".join(a.tobytes() for a in seen[0]) == b"".join(a.tobytes() for a in seen[1])
    for a, b in zip(seen[0], results(Core(), call), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        unit, b = a.dtype.name if a.dtype != np.float64 and a.dtype.kind != "i" else dtype, b.astype(np.float64)
        size = np.maximum(1, np.abs(b).max())
        assert oracle.error(a, b, unit, size) <= (8 if unit in ("float32", "float64") else 1)


def test_layouts():
    x = np.empty((2, 3, 4, 5), np.float32)
    assert layout_of(x, 1) == ((0, 1, 2, 3), 2, 3, 20)
    assert layout_of(x, 3) == ((0, 1, 2, 3), 24, 5, 1)
    assert layout_of(x.transpose(0, 3, 1, 2), 1) == ((0, 2, 3, 1), 24, 5, 1)
    assert layout_of(x.T, 0) == ((3, 2, 1, 0), 24, 5, 1)
    assert layout_of(x[:, :1], 1) is None
    assert layout_of(x[::-1], 1) is None
    assert layout_of(np.broadcast_to(x[:1], x.shape), 1) is None
    assert layout_of(np.empty((6, 1, 7)), 1) == ((0, 1, 2), 1, 1, 42)


@pytest.mark.parametrize("layout", ["out in another order", "out is residual", "x is strided"])
def test_where_results_are_written(layout):
    x, residual = inputs.normal((6, 4, 9)), inputs.normal((6, 4, 9), 1)
    expected = anybn.batch_norm(x, anybn.BatchNormState(4), training=True, residual=residual)
    out = None
    if layout == "out in another order":
        out = np.full(x.shape[::-1], np.nan).T
    elif layout == "out is residual":
        out = residual
    else:
        x = np.repeat(x, 2, axis=2)[:, :, ::2]
    y = anybn.batch_norm(x, anybn.BatchNormState(4), training=True, residual=residual, out=out)
    assert np.array_equal(y, expected)
    assert out is None or y is out


def test_threads_inside_threads_and_forks():
    x = inputs.normal((8, 64, 5000)).astype(np.float32)  # several tasks
    expected = anybn.batch_norm(x, anybn.BatchNormState(64), training=True)
    anybn.set_num_threads(3)

    def work(_):
        return np.array_equal(anybn.batch_norm(x, anybn.BatchNormState(64), training=True), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))
    if hasattr(os, "fork"):
        code = (
            "import os, numpy as np, anybn, warnings; warnings.simplefilter('ignore'); anybn.set_num_threads(3)\n"
            "x = np.random.default_rng(0).normal(size=(8, 64, 5000))\n"
            "y = anybn.batch_norm(x, anybn.BatchNormState(64), training=True)\n"
            "pid = os.fork()\n"
            "same = np.array_equal(y, anybn.batch_norm(x, anybn.BatchNormState(64), training=True))\n"
            "os._exit(0 if same else 1) if pid == 0 else exit(os.waitpid(pid, 0)[1] or (not same))\n"
        )
        assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_an_error_in_a_task_ends_the_others_first():
    anybn.set_num_threads(3)
    ended = []

    def task(i):
        if i == 3:
            raise MemoryError
        ended.append(i)

    with pytest.raises(MemoryError):
        run(task, 1000)
    count = len(ended)
    assert count < 1000
    run(lambda i: None, 10)
    assert len(ended) == count


def test_every_task_runs_once():
    for number, count in ((1, 5), (2, 1), (4, 100)):
        anybn.set_num_threads(number)
        ran = []
        run(ran.append, count)
        assert sorted(ran) == list(range(count))


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (0, ValueError, "count is 0; it must be 1 or more"),
        (1.5, TypeError, "count is 1.5, a float"),
        ("2", TypeError, "a str"),
    ],
)
def test_impossible_numbers_of_threads(count, error, message):
    with pytest.raises(error, match=message):
        anybn.set_num_threads(count)


def test_threads_follow_the_environment():
    code = "import anybn; print(anybn.get_num_threads())"
    wanted = "it must be 1 or more, in digits: set that, or unset it"
    bad = ((value, f"ValueError: ANYBN_NUM_THREADS is {value!r}; {wanted}") for value in ("two", "0", "-1"))
    for value, expected in (("5", "5"), ("", str(len(os.sched_getaffinity(0)))), *bad):
        environment = {**os.environ, "ANYBN_NUM_THREADS": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.stdout + done.stderr).splitlines()[-1] == expected


@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_without_numba_conformance_passes_too(tmp_path, selection):
    (tmp_path / "no_numba.py").write_text(
        "import sys\nsys.modules['numba'] = None\nfrom anybn.backends.numpy import kernels\n"
        "assert kernels().__name__ == 'anybn.kernels.cpu.chunked'\n"
    )
    pytest.importorskip("torch", reason="torch: not installed, pip install torch")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "anybn.conformance", "--anybn-backend=numpy,torch", "-q", "-x",
         "-p", "no_numba", "-m", selection, "-k", "not ten_million"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_cached_kernel_has_a_file_per_signature():
    for module in (columns, rows, runs, sharing, step, value_kernels):
        for function in vars(module).values():
            if getattr(getattr(function, "_cache", None), "_cache_file", None):
                assert type(function._cache) is cached._Files, function


SMALL_CALL = """
import json
import numpy as np, anybn
x = np.arange(12, dtype="float32").reshape(6, 2)
print(json.dumps(anybn.batch_norm(x, anybn.BatchNormState(2)).tolist()))
print(anybn.backends()["numpy"].how)
"""


def small_call(folder, code=SMALL_CALL, **environment):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "changed": lambda content: content[:200] + bytes(200) + content[400:],
    "another file": lambda content: b"#!/bin/sh",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_compiled_code_are_as_good_as_missing(damage, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    expected = small_call(folder)
    files = list(folder.rglob("*.nbc"))
    assert files
    for file in files:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert small_call(folder) == expected


def test_without_a_folder_to_write_to_code_stays_in_memory(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    expected = small_call(folder)
    nowhere = "from numba.core import caching; caching.CacheImpl._locator_classes = []\n" + SMALL_CALL
    found = small_call(folder, nowhere)
    assert found[0] == expected[0]
    assert "compiled anew in every process" in found[1]
    assert "set NUMBA_CACHE_DIR" in found[1]
    assert expected[1] == "fused Numba kernels"


def test_a_full_disk_is_no_error(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    full = """
import errno
from numba.core.caching import IndexDataCacheFile
def full(self, path):
    raise OSError(errno.ENOSPC, "No space left on device")
IndexDataCacheFile._open_for_write = full
"""
    found = small_call(folder, full + SMALL_CALL)
    assert found[1] == "fused Numba kernels"
    assert not list(folder.rglob("*.nbc"))


def test_changed_sources_are_compiled_anew(tmp_path):
    """What a cached function calls is part of its code."""
    folder, package = tmp_path / "cache", tmp_path / "anybn"
    folder.mkdir()
    shutil.copytree(Path(anybn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    before = small_call(folder, PYTHONPATH=path)
    source = package / "kernels" / "cpu" / "values.py"
    text = source.read_text()
    changed = text.replace("shift) * scale + bias", "shift) * (2 * scale) + bias")
    assert changed != text
    source.write_text(changed)
    after = small_call(folder, PYTHONPATH=path)
    y, twice = (np.array(json.loads(lines[0])) for lines in (before, after))
    assert np.allclose(twice, 2 * y)
    assert not np.allclose(y, 0)
