"""y, gradients and running statistics of a group are those of one process, to the last bit or rounding."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs
from anybn.groups import exchange
from groups import ROWS, SPLITS, Counting, Nameless, compared_with_the_whole, images, same_bits


@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_splits(member, split):
    compared_with_the_whole(member, images("mean 1e3, std 1"), split)


@pytest.mark.parametrize("row", inputs.ROWS)
def test_hard_data(member, row):
    compared_with_the_whole(member, images(row), "unequal")


@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_float64(member, split):
    compared_with_the_whole(member, images("mean 1e6, std 1", "float64"), split, bar=2, dtype="float64")


@pytest.mark.parametrize("split", ["unequal", "empty"])
def test_members_of_different_means(member, split):
    """What lies between the members is all of the variance."""
    x = images("mean 1e6, std 1") + 1000 * np.arange(ROWS, dtype=np.float32).reshape(-1, 1, 1, 1)
    compared_with_the_whole(member, x, split)


@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_masks(member, split):
    mask = inputs.normal((ROWS, 9, 7), 2) > 0
    mask[: SPLITS[member.size][split][0]] = False  # the first member has nothing that counts
    compared_with_the_whole(member, images("mean 1e3, std 1"), split, mask=mask)


def test_channels_last(member):
    compared_with_the_whole(member, np.moveaxis(images(), 1, -1), "unequal", axis=3)


@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_rows_without_names(member, split):
    """A group that has only all_reduce_sum."""
    x = images("mean 1e6, std 1")
    compared_with_the_whole(member, x, split, group=Nameless(member.group))
    x = images("mean 1e6, std 1", "float64")
    # dx of float64 takes ten roundings: 1.95 were seen where the statistics were exact but for their own. Adding up the
    # members' squares one by one may cost a unit of the variance, half of one in its root: 2.39.
    compared_with_the_whole(member, x, split, group=Nameless(member.group), bar=2.5, dtype="float64")


def test_many_members(member, monkeypatch):
    """Rows of all of them would be too many: two sums of C values, and errors that name members at first."""
    monkeypatch.setattr(exchange, "MANY", 1)
    group = Counting(member.group)
    compared_with_the_whole(member, images("mean 1e6, std 1"), "empty", group=group)
    assert group.calls == 1 + 2 * 2 + 1


@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_exact_data_is_exact(member, split):
    x = inputs.exact((ROWS, 3, 5, 7)).astype(np.float32)
    whole = anybn.BatchNormState(3)
    expected = anybn.batch_norm(x, whole, training=True)
    state = anybn.BatchNormState(3)
    y = anybn.batch_norm(member.array(member.part(x, split)), state, training=True, group=member.group)
    assert np.array_equal(np.asarray(y), member.part(expected, split))
    assert np.array_equal(np.asarray(state.running_mean), whole.running_mean)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constant_input_gives_bias(member, dtype):
    state = anybn.BatchNormState(3)
    state.bias = np.array([0.0, 1.0, -2.5], np.float32)
    x = np.full((ROWS, 3, 5), 1e7 + 0.1, dtype)
    y = anybn.batch_norm(member.array(member.part(x)), state, training=True, group=member.group)
    assert np.array_equal(np.asarray(y), np.broadcast_to(state.bias[None, :, None], y.shape))


def test_all_states_are_the_same_bits(member):
    state = anybn.BatchNormState(8)
    for seed in range(3):
        x = inputs.normal((ROWS, 8, 9, 7), seed).astype(np.float32)
        anybn.batch_norm(member.array(member.part(x)), state, training=True, group=member.group)
    same_bits(member, state)


def test_one_collective_each_way(member):
    group, x = Counting(member.group), member.array(member.part(images()))
    bn = anybn.BatchNorm(8, group=group)
    bn(x)
    assert group.calls == 2  # the first time, the members compare what they are about to send
    for _ in range(3):
        group.calls = 0
        _, pullback = bn.vjp(x)
        assert group.calls == 1
        pullback(x)
        assert group.calls == 2
    group.calls = 0
    bn.eval()(x)
    assert group.calls == 0
