"""What only NumPy arrays can be: views, subclasses, foreign byte orders, read-only, overlapping."""

import tracemalloc

import numpy as np
import pytest

import anybn
from anybn.backends.numpy import NumPyBackend, kernels
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


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    moved = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


class Labelled(np.ndarray):
    """A subclass."""


KINDS = {
    "plain": np.array,
    "order F": np.asfortranarray,
    "view": lambda x: x[:],
    "gaps": lambda x: np.repeat(x, 2, 0)[::2],
    "read-only": read_only,
    "unaligned": unaligned,
    "subclass": lambda x: x.view(Labelled),
    "metadata": lambda x: x.astype(np.dtype(x.dtype, metadata={"unit": 1})),
}


@pytest.mark.parametrize(
    ("kind", "held", "dtype"),
    [(kind, "float32", "float32") for kind in KINDS.values()]
    + [(np.array, *dtypes) for dtypes in (("float64", "float32"), ("float32", "float64"), ("float32", "float16"))],
    ids=[*KINDS, "float64 held", "float64", "float16"],
)
def test_evaluation_at_once_gives_the_bits_of_all_calls(kind, held, dtype):
    """Where it does not take a call, that goes the way on which everything is checked."""
    state = anybn.BatchNormState(3, dtype=held)
    state.weight, state.bias = inputs.normal((2, 3), 1).astype(held)[:, ::-1]
    state.running_mean, state.running_var = inputs.normal((2, 3), 2) ** 2
    x = X.astype(dtype)
    for activation in (None, "relu"):
        expected = anybn.batch_norm(x, state, activation=activation, out=np.empty_like(x))
        for _ in range(2):
            y = anybn.batch_norm(kind(x), state, activation=activation)
            assert y.dtype == x.dtype
            assert np.array_equal(y, expected)


def test_evaluation_at_once_follows_what_the_state_holds():
    state, x = anybn.BatchNormState(3), X[:4, :, 0, 0].copy()
    before = anybn.batch_norm(x, state)
    state.weight *= 2  # in place
    state.bias = np.ones(3, np.float32)
    assert np.allclose(anybn.batch_norm(x, state), 2 * before + 1)
    state.running_mean = np.full(3, 0.5)
    state.running_mean += 0.5
    assert np.allclose(anybn.batch_norm(x, state), 2 * (before - 1) + 1, atol=1e-4)
    memory = np.ones(3 * 4 + 3, np.float32)
    state.running_mean, state.weight = np.zeros(3), memory[:3]
    with pytest.raises(ValueError, match="x shares memory with the state"):
        anybn.batch_norm(memory[:12].reshape(4, 3), state)
    assert np.allclose(anybn.batch_norm(memory[3:].reshape(4, 3), state), np.full((4, 3), 2), atol=1e-4)
    state.weight = np.ones(3, np.float32)
    state.weight.resize(2, refcheck=False)
    with pytest.raises(ValueError, match=r"weight has shape \(2,\); the state has 3 channels"):
        anybn.batch_norm(x, state)


@pytest.mark.parametrize(
    ("x", "options", "error"),
    [
        (X[:, :2].copy(), {}, ValueError),
        (X[0, 0, 0].copy(), {}, ValueError),
        (X, {"axis": True}, TypeError),
        (X, {"axis": 4}, ValueError),
        (X, {"activation": "gelu"}, ValueError),
        (X, {"nonfinite": "sometimes"}, ValueError),
        (X.astype(">f4"), {}, TypeError),
        (X.astype(np.int32), {}, TypeError),
    ],
)
def test_evaluation_at_once_takes_nothing_that_is_wrong(x, options, error):
    state = anybn.BatchNormState(3)
    anybn.batch_norm(X, state)  # what is known of a shape holds for no other
    with pytest.raises(error):
        anybn.batch_norm(x, state, **options)


def test_evaluation_at_once_is_not_another_backends():
    class Counting(NumPyBackend):
        name, calls = "counting", 0

        def evaluate(self, call, statistics):
            self.calls += 1
            return super().evaluate(call, statistics)

    backend, state = Counting(), anybn.BatchNormState(3)
    y = anybn.batch_norm(X, state)
    anybn.register_backend(backend)
    try:
        assert np.array_equal(anybn.batch_norm(X, state), y)
    finally:
        anybn.unregister_backend("counting")
    assert backend.calls == 1
