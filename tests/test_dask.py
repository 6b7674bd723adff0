"""Dask: nothing computes before the user does, whatever the chunks."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

dask = pytest.importorskip("dask", reason="dask: not installed, pip install 'dask[array]'")
da = pytest.importorskip("dask.array", reason="dask: not installed, pip install 'dask[array]'")

X = (inputs.normal((12, 4, 6)) + 3).astype(np.float32)


@pytest.fixture
def nothing_computes():
    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


@pytest.mark.parametrize("chunks", [(12, 4, 6), (5, 4, 6), (12, 3, 6), (12, 4, 1), (1, 1, 1)])
def test_lazy_and_right(chunks, nothing_computes):
    state, expected = anybn.BatchNormState(4), anybn.BatchNormState(4)
    x = da.from_array(X, chunks=chunks)
    mask = np.random.default_rng(0).random((12, 6)) < 0.8
    for step in range(3):
        y, pullback = anybn.batch_norm_vjp(
            x + step, state, training=True, mask=da.from_array(mask, chunks=5), residual=x, activation="relu"
        )
        grads = pullback(x)
        y_expected, pullback = anybn.batch_norm_vjp(
            X + step, expected, training=True, mask=mask, residual=X, activation="relu"
        )
        grads_expected = pullback(X)
    evaluated = anybn.batch_norm(x, state)
    moments = anybn.moments(x, mask=da.from_array(mask))
    assert state.num_batches_tracked == 3
    with dask.config.set(scheduler="synchronous"):
        assert oracle.error(y.compute(), y_expected, "float32") <= 0.51
        assert oracle.error(grads.x.compute(), grads_expected.x, "float32") <= 0.51
        assert oracle.error(evaluated.compute(), anybn.batch_norm(X, expected), "float32") <= 0.51
        assert int(moments.count) == mask.sum()
        assert oracle.error(state.to("numpy").running_var, expected.running_var, "float64") <= 4


def test_unknown_chunks():
    x = da.from_array(X)
    with pytest.raises(TypeError, match=r"x has the unknown shape \(nan, 4, 6\): call x.compute_chunk_sizes\(\) first"):
        anybn.batch_norm(x[x[:, 0, 0] > 0], anybn.BatchNormState(4))


def test_raise_needs_values():
    with pytest.raises(ValueError, match='nonfinite is "raise" but x has no values yet'):
        anybn.batch_norm(da.from_array(X), anybn.BatchNormState(4), training=True, nonfinite="raise")


def test_a_channel_of_fewer_than_two_values_is_not_committed(nothing_computes):
    """Lazily, the count is not known when the call returns, so it cannot be an error."""
    state = anybn.BatchNormState(4)
    mask = da.from_array(np.arange(12) == 0)[:, None]
    y = anybn.batch_norm(da.from_array(X[:, :, :1]), state, training=True, mask=mask)
    with dask.config.set(scheduler="synchronous"):
        assert np.all(y.compute() == 0)
        assert np.array_equal(state.to("numpy").running_var, np.ones(4))


def test_moving_computes_outside_of_the_lock():
    """The workers that compute it may use anybn themselves."""
    inner, state = anybn.BatchNormState(4), anybn.BatchNormState(4)
    x = da.from_array(X[:, :, 0], chunks=(6, 4)).map_blocks(
        lambda block: anybn.batch_norm(block, inner, training=len(block) > 1),
        dtype="f4",
        meta=np.empty((0, 0), "f4"),
    )
    anybn.batch_norm(x, state, training=True)
    with dask.config.set(scheduler="threads"):
        state.to("numpy")
    assert np.all(np.isfinite(state.running_mean))
    assert inner.num_batches_tracked >= 2


def test_chunks_that_are_no_plain_arrays():
    masked = da.ma.masked_greater(da.from_array(X), 3)
    with pytest.raises(TypeError, match=r"a chunk of x is a numpy.ma.*MaskedArray"):
        anybn.batch_norm(masked, anybn.BatchNormState(4))
    with pytest.raises(TypeError, match="x has dtype >f4 in the other byte order"):
        anybn.batch_norm(da.from_array(X.astype(">f4")), anybn.BatchNormState(4))
    with pytest.raises(ValueError, match="dask has no device 'foo'"):
        anybn.BatchNormState(4).to("dask:foo")
