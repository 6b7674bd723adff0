"""Moments: any split of the data, merged in any order, gives the moments of the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anybn
from anybn.conformance import oracle


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
