"""Dask: nothing computes before the user does, whatever the chunks; no more is in memory than the chunks at work."""

import collections
import threading

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


@pytest.mark.parametrize(
    "chunks", [(12, 4, 6), (5, 4, 6), (12, 3, 6), (12, 4, 1), (1, 1, 1), ((5, 0, 7), (0, 2, 0, 2), (6, 0))]
)
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


# -- larger than memory ----------------------------------------------------------------------------------------------


class Source:
    """Chunks that are counted while they are alive and each time they are made."""

    def __init__(self, chunks=24, shape=(4, 6, 64), channels=6):
        self.values = (inputs.normal((chunks * shape[0], *shape[1:])) + 1e3).astype(np.float32)
        self.made, self.alive, self.most = collections.Counter(), 0, 0
        self.lock = threading.Lock()
        sizes = (shape[0],) * chunks, (channels,) * (shape[1] // channels), shape[2:]
        self.array = da.map_blocks(self.load, chunks=sizes, dtype="f4", meta=np.empty((0, 0, 0), "f4"))

    def load(self, block_info):
        window = tuple(slice(*ends) for ends in block_info[None]["array-location"])
        chunk = self.values[window].view(Counted)
        chunk.source = self
        with self.lock:
            self.made[tuple(block_info[None]["chunk-location"])] += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
        return chunk


class Counted(np.ndarray):
    source = None

    def __del__(self):
        if self.source is not None:
            with self.source.lock:
                self.source.alive -= 1


def drained(array):
    """Compute an array without holding it, as storing does."""
    return array.map_blocks(lambda a: np.zeros((1,) * a.ndim), chunks=(1,) * array.ndim, dtype="f8").sum()


@pytest.mark.parametrize("channels", [6, 2])
@pytest.mark.parametrize("wanted", ["moments", "y", "dx", "running_var"])
def test_no_more_is_held_than_the_chunks_at_work(wanted, channels, nothing_computes):
    source, state = Source(channels=channels), anybn.BatchNormState(6)
    chunks = len(source.array.__dask_keys__()) * 6 // channels
    y, pullback = anybn.batch_norm_vjp(source.array, state, training=True)
    result, reads = {
        "moments": lambda: (anybn.moments(source.array).m2, 1),
        "y": lambda: (drained(y), 2),
        "dx": lambda: (drained(pullback(source.array).x), 3),
        "running_var": lambda: (state.running_var, 1),
    }[wanted]()
    assert not source.made
    with dask.config.set(scheduler="threads", num_workers=2):
        result.compute()
    assert set(source.made.values()) == {reads}
    assert len(source.made) == chunks
    assert source.most <= 8  # of 24 or 72: those of two workers, and what waits to be merged


def test_a_chain_reads_once_more_for_each_layer(nothing_computes):
    source, states = Source(), [anybn.BatchNormState(6) for _ in range(3)]
    h, expected = source.array, source.values
    for state in states:
        h = anybn.batch_norm(h, state, training=True) * np.float32(2) + np.float32(1)
        expected = anybn.batch_norm(expected, anybn.BatchNormState(6), training=True) * np.float32(2) + np.float32(1)
    with dask.config.set(scheduler="threads", num_workers=2):
        drained(h).compute()
        assert set(source.made.values()) == {4}
        assert source.most <= 8
        assert oracle.error(h.compute(), expected, "float32") <= 4  # the first y of two neighbours, normalized twice


def test_mean_far_away_in_uneven_chunks():
    """Moments merge without loss: rows of the accuracy table, in float32 and float64, channels chunked."""
    for dtype in ("float32", "float64"):
        for make in inputs.ROWS.values():
            values = make(inputs.normal((37, 6, 9))).astype(dtype)
            statistics = oracle.statistics(values)
            x = da.from_array(values, chunks=((1, 17, 19), (4, 2), (5, 4)))
            y, pullback = anybn.batch_norm_vjp(x, anybn.BatchNormState(6), training=True)
            expected = oracle.normalize(values, statistics.mean, statistics.var())
            assert oracle.error(y.compute(), expected, dtype) <= (0.51 if dtype == "float32" else 2)
            m2 = anybn.moments(x).m2.compute() / statistics.m2
            assert oracle.error(m2, np.ones_like(m2), dtype) <= 2
            dy = inputs.normal(values.shape, seed=1).astype(dtype)
            grads = oracle.gradients(dy, values, statistics.mean, statistics.var(), count=statistics.count)
            size = np.maximum(1, grads.x_size)
            assert oracle.error(pullback(da.from_array(dy, chunks=(5, 6, 9))).x.compute(), grads.x, dtype, size) <= 2


def test_empty_chunks_and_masked_ones():
    x = da.from_array(X, chunks=(4, 4, 6))
    mask = np.zeros((12, 6), bool)
    mask[8:, :3] = True
    state, expected = anybn.BatchNormState(4), anybn.BatchNormState(4)
    y = anybn.batch_norm(da.concatenate([x[:0], x]), state, training=True, mask=da.from_array(mask, chunks=(4, 6)))
    assert oracle.error(y.compute(), anybn.batch_norm(X, expected, training=True, mask=mask), "float32") <= 0.51
    assert oracle.error(state.to("numpy").running_var, expected.running_var, "float64") <= 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_several_empty_chunks(training, masked):
    """What a selection leaves that finds nothing."""
    x = da.zeros((0, 4, 6), chunks=((0, 0, 0), (2, 2), (6,)), dtype="f4")
    state = anybn.BatchNormState(4)
    options = {"residual": x, "activation": "relu", "mask": x[:, 0] > 0 if masked else None}
    y, pullback = anybn.batch_norm_vjp(x, state, training=training, **options)
    grads = pullback(y)
    for a in (y, grads.x, grads.residual):
        assert a.compute().shape == (0, 4, 6)
    assert np.array_equal(grads.weight.compute(), np.zeros(4))
    assert np.array_equal(grads.bias.compute(), np.zeros(4))
    assert state.num_batches_tracked == 0


def test_a_cluster_of_two_workers():
    distributed = pytest.importorskip("distributed", reason="distributed: not installed, pip install distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "processes": True}
    state, expected = anybn.BatchNormState(6), anybn.BatchNormState(6)
    values = (inputs.normal((48, 6, 16)) + 1e3).astype(np.float32)
    y_expected, pullback = anybn.batch_norm_vjp(values, expected, training=True, activation="relu")
    grads_expected = pullback(values)
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        lazy = da.from_array(values, chunks=(5, 2, 16))
        for x in (lazy, client.persist(lazy)):  # read twice, and at hand on the workers
            fresh = state.copy()
            y, pullback = anybn.batch_norm_vjp(x, fresh, training=True, activation="relu")
            grads = pullback(x)
            results = client.compute([y, grads.x, grads.weight, fresh.running_var])
            for future, wanted in zip(
                results, (y_expected, grads_expected.x, grads_expected.weight, expected.running_var), strict=True
            ):
                assert oracle.error(future.result(), wanted, "float32") <= 0.51
        anybn.recalibrate(state, lazy)  # computes where the client does
    assert oracle.error(state.running_var, oracle.statistics(values).var(1), "float32") <= 2
