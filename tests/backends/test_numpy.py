"""What only NumPy arrays can be: views, subclasses, foreign byte orders, read-only, overlapping."""

import tracemalloc

import numpy as np
import pytest

import anybn
from anybn.backends.numpy import kernels
from anybn.conformance import inputs, oracle

X = inputs.normal((6, 3, 4, 5)).astype(np.float32)
STATISTICS = oracle.statistics(X)
EXPECTED = oracle.normalize(X, STATISTICS.mean, STATISTICS.var())


def train(x, **options):
    return anybn.batch_norm(x, anybn.BatchNormState(3), training=True, **options)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3)])
def test_y_keeps_the_memory_order_of_x(axes):
    base = np.ascontiguousarray(X.transpose(axes))
    x = base.transpose(np.argsort(axes))
    y = train(x)
    assert oracle.error(y, EXPECTED, "float32") <= 0.51
    assert np.argsort(y.strides).tolist() == np.argsort(x.strides).tolist()


def test_y_keeps_the_memory_order_beside_a_residual_of_another_order():
    x = np.asfortranarray(X)
    for options in ({"residual": X}, {"mask": np.ones((6, 4, 5), bool)}):
        assert train(x, **options).flags.f_contiguous


def test_out_of_an_empty_batch():
    x = np.zeros((0, 3), np.float32)
    assert train(x, out=x) is x


def test_views_that_share_elements_or_are_read_only():
    x = np.broadcast_to(X[:1], X.shape)
    statistics = oracle.statistics(x)
    assert oracle.error(train(x), oracle.normalize(x, statistics.mean, statistics.var()), "float32") <= 0.51
    frozen = X.copy()
    frozen.flags.writeable = False
    assert oracle.error(train(frozen), EXPECTED, "float32") <= 0.51
    with pytest.raises(ValueError, match="out is read-only: pass an array that can be written to"):
        train(X.copy(), out=frozen)
    with pytest.raises(ValueError, match="out is a broadcast view, whose elements share memory"):
        train(X, out=np.lib.stride_tricks.as_strided(X.copy(), X.shape, (0, 0, 0, 4)))


def test_memmap(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    x[:] = X
    assert oracle.error(np.asarray(train(x)), EXPECTED, "float32") <= 0.51


def test_out_may_be_x_but_not_overlap_it():
    memory = np.zeros(X.size + 20, np.float32)
    x = memory[: X.size].reshape(X.shape)
    x[:] = X
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    with pytest.raises(ValueError, match="out shares part of x's memory: pass x itself, or an array of its own"):
        anybn.batch_norm(x, state, training=True, out=memory[20:].reshape(X.shape))
    with pytest.raises(ValueError, match="out shares part of x's memory"):
        anybn.batch_norm(x, state, training=True, out=x[::-1])
    with pytest.raises(ValueError, match="out shares part of residual's memory"):
        anybn.batch_norm(X, state, training=True, residual=x, out=memory[20:].reshape(X.shape))
    assert inputs.state_values(state) == before
    assert np.array_equal(x, X)
    assert train(x, out=x) is x
    assert oracle.error(x, EXPECTED, "float32") <= 0.51


def test_statistics_may_not_alias():
    state = anybn.BatchNormState(3)
    shared = np.ones(3)
    state.running_var = shared
    with pytest.raises(ValueError, match="running_mean shares memory with running_var: give it a copy"):
        state.running_mean = shared
    x = np.ones((4, 3))
    state = anybn.BatchNormState(3, dtype="float64")
    state.weight = x[0]
    with pytest.raises(ValueError, match="x shares memory with the state"):
        anybn.batch_norm(x, state, training=True)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            X.astype(">f4"),
            r"x has dtype >f4 in the other byte order: cast it with x.astype\(x.dtype.newbyteorder\('='\)\)",
        ),
        (X.astype(object), "x has dtype object: cast to one of float16, bfloat16, float32, float64"),
        (X.astype(str), "x has dtype str"),
        (X.astype(np.longdouble), "x has dtype (longdouble|float128): cast to one of"),
        (np.ma.masked_array(X), "x is a numpy.ma.MaskedArray, .* pass its .data, and as mask="),
        (X[:, :, 0, 0].view(np.matrix), "x is a numpy.matrix, .* wrap it with np.asarray"),
        (np.float32(1), "x is a numpy.float32, .* wrap it with np.asarray"),
        ("text", "x is a str, not an array that anybn knows: convert it first"),
        (None, "x is a NoneType"),
        (X.astype(">f4")[:, :, 0, 0], "x has dtype >f4"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_array(x, message):
    state = anybn.BatchNormState(3)
    before = state._arrays
    with pytest.raises(TypeError, match=message):
        anybn.batch_norm(x, state, training=True)
    assert state._arrays is before


def test_sparse_and_tables():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"make it dense: x.toarray\(\)"):
        anybn.batch_norm(scipy_sparse.eye_array(3).tocsr(), anybn.BatchNormState(3))


def test_unknown_library_names_the_installed_ones():
    class Tensor:
        pass

    with pytest.raises(TypeError, match=r"Backends installed: numpy, .* and any array with __array_namespace__"):
        anybn.batch_norm(Tensor(), anybn.BatchNormState(3))


def test_more_than_65535_samples_and_channels():
    for shape in ((70_000, 2), (3, 70_000)):
        x = inputs.normal(shape).astype(np.float32)
        statistics = oracle.statistics(x)
        y = anybn.batch_norm(x, anybn.BatchNormState(shape[1]), training=True)
        assert oracle.error(y, oracle.normalize(x, statistics.mean, statistics.var()), "float32") <= 0.51


def test_bfloat16_by_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = X.astype(ml_dtypes.bfloat16)
    y = train(x)
    assert y.dtype == ml_dtypes.bfloat16
    statistics = oracle.statistics(x)
    assert oracle.error(y, oracle.normalize(x, statistics.mean, statistics.var()), "bfloat16") <= 0.51


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_memory_mapped_files_are_worked_on_where_they_are(dtype, axis, tmp_path):
    """Training, evaluation and recalibration of a file into another: what is allocated does not grow with it."""
    if dtype == "float16" and not kernels().supports(np.dtype(np.int16)):
        pytest.skip("numba: not installed, pip install 'anybn[fast]'; without it the core takes float16")
    shape, channels = (128 if dtype == "float16" else 64, 32, 32, 64), 32 if axis == 1 else 64
    x = np.memmap(tmp_path / "x", dtype, "w+", shape=shape)
    x[:] = np.random.default_rng(0).standard_normal(shape, dtype="float32") + 100
    x = np.memmap(tmp_path / "x", dtype, "r", shape=shape)
    y = np.memmap(tmp_path / "y", dtype, "w+", shape=shape)
    bn = anybn.BatchNorm(channels, axis=axis)

    def everything(x, y):
        assert bn.train()(x, out=y) is y
        bn.eval()(x, out=y)
        anybn.recalibrate(bn, [x])

    everything(x, y)  # compiles, if there is a compiler
    tracemalloc.start()
    try:
        everything(x, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20 < x.nbytes  # 9 MiB are the blocks of NumPy without Numba, whatever the size of x
    assert oracle.error(bn.state.running_var, oracle.statistics(np.array(x), axis).var(1), "float64", 1) <= 8
    anybn.batch_norm(x, bn.state, axis=axis, out=y)
    assert np.array_equal(y, anybn.batch_norm(np.array(x), bn.state, axis=axis))
