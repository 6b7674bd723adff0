"""Moments: any split of the data, merged in any order, gives the moments of the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anybn
from anybn.conformance import inputs, oracle


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(-6, 6),
    st.integers(-6, 6),
    st.randoms(use_true_random=False),
)
def test_any_split_in_any_order(sizes, mean_exponent, std_exponent, random):
    rng = np.random.default_rng(random.randrange(2**32))
    x = 10.0**mean_exponent + rng.standard_normal((sum(sizes), 2)) * 10.0**std_exponent
    parts = [anybn.moments(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop() + parts.pop())
    (merged,) = parts
    assert merged.count == len(x)
    if len(x) < 2:
        assert np.array_equal(merged.m2, [0, 0])
        return
    expected = oracle.statistics(x)
    mean = expected.mean.origin + expected.mean.offset
    assert np.abs(merged.mean - mean).max() <= 1e-14 * np.abs(x).max()
    assert np.all(np.abs(merged.m2 - expected.m2) <= 1e-13 * expected.m2)


def test_var_and_errors():
    m = anybn.moments(np.array([[1.0], [3.0]]))
    assert m.var() == [1.0]
    assert m.var(ddof=1) == [2.0]
    assert sum([m, m]).count == 4
    assert np.isnan(m.var(ddof=2)).all()
    with pytest.raises(ValueError, match="other has 2 channels, these moments have 1"):
        m + anybn.moments(np.ones((3, 2)))
    with pytest.raises(TypeError, match="unsupported operand"):
        m + 3


X = inputs.normal((6, 3, 4)) + 1e6
GAPS = np.where(np.random.default_rng(0).random(X.shape) < 0.5, X, np.nan)


@pytest.mark.parametrize(
    "moments",
    [
        anybn.moments(X),
        anybn.moments(X[:2]) + anybn.moments(X[2:]),
        anybn.moments(GAPS, nonfinite="omit"),
        anybn.moments(X, axis=(1, 2)),
        anybn.moments(X[:0]),
        anybn.moments(GAPS),
    ],
    ids=["one", "two", "gaps", "positions", "empty", "NaN"],
)
def test_files(moments, tmp_path):
    moments.save(tmp_path / "m")
    back = anybn.Moments.load(tmp_path / "m")
    assert type(back.count) is type(moments.count)
    for name in ("count", "mean", "m2", "shift"):
        wanted, found = (0 * m.mean if getattr(m, name) is None else getattr(m, name) for m in (moments, back))
        assert np.array_equal(found, wanted, equal_nan=True), name


def test_files_of_other_libraries_and_lazy_ones(tmp_path):
    dask = pytest.importorskip("dask.array", reason="dask: not installed, pip install 'dask[array]'")
    read = []

    def chunk(part):
        read.append(part.shape)
        return part

    mask = np.random.default_rng(1).random((6, 4)) < 0.7
    lazy = dask.from_array(X, chunks=(2, 3, 4)).map_blocks(chunk, dtype=X.dtype, meta=np.empty((0, 0, 0)))
    moments = anybn.moments(lazy, mask=dask.from_array(mask, chunks=(2, 4)))
    assert read == []
    moments.save(tmp_path / "m")
    assert len(read) == 3, "computed once, counts and all"
    back, expected = anybn.Moments.load(tmp_path / "m"), anybn.moments(X, mask=mask)
    assert back.count == expected.count == mask.sum()
    assert np.allclose(back.m2, expected.m2, rtol=1e-12)


def file_of(tensors, **metadata):
    import safetensors.numpy

    from anybn.checkpoints import files

    tensors = {name: np.asarray(a) for name, a in tensors.items()}
    described = {"format": "anybn.Moments", "version": "1", "settings": "{}", "sha256": files._checksum(tensors, "{}")}
    return safetensors.numpy.save(tensors, described | metadata)


GOOD = {"count": np.int64(4), "mean": np.zeros(2), "m2": np.ones(2), "shift": np.zeros(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_of(GOOD, note="of another length")[:-3], "truncated, damaged"),
        (file_of(GOOD)[:-1] + b"\x01", "do not have the checksum"),
        (file_of(GOOD, version="9"), "has version '9'"),
        (file_of(GOOD, format="anybn.BatchNormState"), r"was not written by Moments\.save"),
        (file_of({"mean": np.zeros(2)}), "holds no valid moments"),
        (file_of(GOOD | {"extra": np.zeros(2)}), "holds no valid moments"),
        (file_of(GOOD | {"m2": np.ones(3)}), "holds no valid moments"),
        (file_of(GOOD | {"m2": -np.ones(2)}), "holds no valid moments"),
        (file_of(GOOD | {"count": np.int64(-1)}), "holds no valid moments"),
        (file_of(GOOD | {"count": np.ones(3, np.int64)}), "holds no valid moments"),
        (file_of(GOOD | {"mean": np.zeros(2, np.float32)}), "holds no valid moments"),
        (b"", "truncated, damaged"),
    ],
)
def test_files_need_not_be_trusted(content, message, tmp_path):
    (tmp_path / "m").write_bytes(file_of(GOOD))
    assert anybn.Moments.load(tmp_path / "m").count == 4
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(anybn.CheckpointError, match=message):
        anybn.Moments.load(tmp_path / "m")


def test_a_state_is_not_moments(tmp_path):
    anybn.BatchNormState(2).save(tmp_path / "s")
    with pytest.raises(anybn.CheckpointError, match=r"was not written by Moments\.save"):
        anybn.Moments.load(tmp_path / "s")
    anybn.moments(X).save(tmp_path / "m")
    with pytest.raises(anybn.CheckpointError, match=r"was not written by BatchNormState\.save"):
        anybn.BatchNormState.load(tmp_path / "m")


def test_the_sum_goes_where_float64_is():
    jax = pytest.importorskip("jax", reason="jax: not installed, pip install jax")
    here, there = anybn.moments(X[:2]), anybn.moments(jax.numpy.asarray(X[2:], "float32"))
    assert there.mean.dtype == "float32"
    for both in (here + there, there + here):
        assert type(both.mean) is np.ndarray
        assert both.mean.dtype == np.float64
    traced = jax.jit(lambda x: (anybn.moments(x) + here).mean)(jax.numpy.asarray(X[2:], "float32"))
    assert np.allclose(traced, X.mean((0, 2)), rtol=1e-6)


def test_a_state_is_fitted_to_data_with_gaps():
    parts = [anybn.moments(GAPS[:2], nonfinite="omit"), anybn.moments(GAPS[2:], nonfinite="omit")]
    state = anybn.recalibrate(anybn.BatchNormState(3, ddof=0), parts)
    for c in range(3):
        row = GAPS[:, c][np.isfinite(GAPS[:, c])]
        expected = oracle.statistics(row[:, None])
        assert oracle.error(state.running_mean[c : c + 1], expected.mean, "float64") <= 1
        assert oracle.error(state.running_var[c : c + 1], expected.var(), "float64") <= 2
    nothing = np.where(np.arange(3)[:, None] == 1, np.nan, X)
    with pytest.raises(ValueError, match="batches gave 0 values per channel"):
        anybn.recalibrate(state, [anybn.moments(nothing, nonfinite="omit")])
    assert state.num_batches_tracked == 2
