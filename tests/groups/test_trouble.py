"""Few values and bad ones, members that disagree or fail: everybody gets the error, and keeps its state."""

import numpy as np
import pytest

import anybn
from anybn.backends.registry import backend_for
from anybn.conformance import inputs
from anybn.distributed import as_group
from anybn.groups import exchange
from groups import Counting, Nameless, images, one_fails


def test_one_value_per_member_is_enough(member):
    x = np.arange(3.0 * member.size).reshape(member.size, 3)
    y = anybn.BatchNorm(3, group=member.group)(member.array(x[member.rank : member.rank + 1]))
    assert np.allclose(np.asarray(y), anybn.BatchNorm(3)(x)[member.rank])


def test_one_value_in_all_is_not(member):
    state = anybn.BatchNormState(3)
    x = member.array(np.ones((1 if member.rank == 1 else 0, 3)))
    message = f"training needs more than 1 value per channel, got 1 over the {member.size} members of the group"
    member.all_raise(ValueError, message, lambda: anybn.batch_norm(x, state, training=True, group=member.group), state)


def test_all_members_empty(member):
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    y, pullback = anybn.batch_norm_vjp(member.array(np.ones((0, 3))), state, training=True, group=member.group)
    assert y.shape == (0, 3)
    assert pullback(y).x.shape == (0, 3)
    assert inputs.state_values(state) == before


def test_nan_on_one_member(member):
    x = images()
    x[0, 2, 0, 0] = np.nan
    mine, state = member.array(member.part(x)), anybn.BatchNormState(8)
    y = anybn.batch_norm(mine, state, training=True, group=member.group)
    assert np.isnan(np.asarray(y)[:, 2]).all()
    assert not np.isnan(np.asarray(y)[:, [0, 1, 3, 4, 5, 6, 7]]).any()
    assert state.running_var[2] == 1
    assert (np.asarray(state.running_var)[[0, 1, 3]] != 1).all()
    member.all_raise(
        anybn.NonFiniteError,
        "in 1 of 8 channels (2)",
        lambda: anybn.batch_norm(mine, state, training=True, group=member.group, nonfinite="raise"),
        state,
    )


DISAGREEMENTS = {
    "eps": "eps is {0} on member{s} {others} and 0.001 on member {last}",
    "relu": "relu is False on member{s} {others} and True on member {last}",
    "momentum": "momentum is 0.1 on member{s} {others} and None on member {last}",
    "dtype": "dtype is 'float32' on member{s} {others} and 'float64' on member {last}",
    "channels": "channels is 8 on member{s} {others} and 5 on member {last}",
    "affine": "affine is True on member{s} {others} and False on member {last}",
    "bias": "bias is True on member{s} {others} and False on member {last}",
    "axis": "axis is 1 on member{s} {others} and 3 on member {last}",
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreement(member, what):
    last = member.size - 1
    channels, x, settings, options = 8, member.part(images()), {}, {}
    if member.rank == last:
        settings = {
            "eps": {"eps": 1e-3},
            "momentum": {"momentum": None},
            "affine": {"affine": False},
            "bias": {"bias": False},
        }.get(what, {})
        options = {"relu": {"activation": "relu"}, "axis": {"axis": -1}}.get(what, {})
        if what == "dtype":
            x = x.astype(np.float64)
        elif what == "channels":
            channels, x = 5, x[:, :5]
        elif what == "axis":
            x = np.moveaxis(x, 1, -1)
    state = anybn.BatchNormState(channels, **settings)
    # not seen before in this form, so that lengths that differ are not sent
    group = as_group(Counting(member.group))
    names = {"others": ", ".join(map(str, range(last))), "last": last, "s": "s" if last > 1 else ""}
    member.all_raise(
        ValueError,
        "the members of the group disagree: " + DISAGREEMENTS[what].format("1e-05", **names),
        lambda: anybn.batch_norm(member.array(x), state, training=True, group=group, **options),
        state,
    )


def test_disagreement_without_names(member):
    state = anybn.BatchNormState(8, eps=1e-5 if member.rank else 1e-3)
    member.all_raise(
        ValueError,
        "the members of the group disagree in channels, dtype or settings",
        lambda: anybn.batch_norm(
            member.array(member.part(images())), state, training=True, group=Nameless(member.group)
        ),
        state,
    )


def broken(what, values):
    """x of a member, the options and what it has to say about them."""
    x, options, message = values, {}, ""
    if what == "dtype":
        x, message = values.astype(np.int32), "x has dtype int32: cast to float32"
    elif what == "no array":
        x, message = values.tolist(), "wrap it with np.asarray"
    elif what == "channels":
        x, message = values[:, :4], "x has 4 channels on axis 1 but the state has"
    elif what == "rank":
        x, message = values[..., 0], "BatchNorm2d needs (N, C, H, W)"
    elif what == "mask":
        options, message = {"mask": values[:, 0]}, "it must be bool"
    elif what == "memory":
        message = "no more"
    return x, options, message


def without_memory(statistics):
    """A backend's statistics, which fail for a member's own batch."""

    def failing(backend, call):
        if call.group is None:
            raise MemoryError("no more")
        return statistics(backend, call)

    return failing


@pytest.mark.parametrize("what", ["dtype", "no array", "channels", "rank", "mask", "memory"])
def test_a_member_that_fails(member, what, monkeypatch):
    """Before the group has met such rows, and after; in a group with names, many names, and none."""
    values, usual = images(), exchange.MANY
    groups = {"names": member.group, "many": Counting(member.group), "none": Nameless(member.group)}
    for i, (kind, group) in enumerate(groups.items()):
        monkeypatch.setattr(exchange, "MANY", 1 if kind == "many" else usual)
        part = member.part(values)[:, : 8 - i]
        backend = type(backend_for(member.array(part)))
        bn = anybn.BatchNorm2d(8 - i, group=group).to(member.array(part))  # which shows what the wrappers sum
        for _ in range(2):
            x, options, message = broken(what, part) if member.rank == member.size - 1 else (part, {}, "")
            x = x if isinstance(x, list) else member.array(x)
            options = {name: member.array(value) for name, value in options.items()}
            with monkeypatch.context() as patched:
                if message == "no more":
                    patched.setattr(backend, "statistics", without_memory(backend.statistics))
                one_fails(member, group, lambda: bn(x, **options), bn.state, message, kind != "none")  # noqa: B023
            y = bn(member.array(part))
        whole = anybn.BatchNormState(8 - i)
        expected = anybn.batch_norm(values[:, : 8 - i], whole, training=True)
        assert np.array_equal(np.asarray(y), member.part(expected))
        assert bn.state.num_batches_tracked == 2


def test_evaluation_asks_nobody(member):
    """A member that fails in evaluation tells nobody, since nobody waits."""
    group, state = Counting(member.group), anybn.BatchNormState(8)
    with pytest.raises(TypeError):
        anybn.batch_norm(member.array(images().astype(int)), state, group=group)
    assert group.calls == 0


@pytest.mark.parametrize("first", ["float32", "float64"])
def test_a_dtype_that_changes(member, first):
    """Rows of float64 are longer: a member that comes with them alone is an error, not a crash of the engine."""
    group = Counting(member.group)
    for _ in range(2):  # the second time, both have been seen
        for dtype in (first, "float64" if first == "float32" else "float32"):
            state, other = anybn.BatchNormState(8), "float64" if dtype == "float32" else "float32"
            x = member.array(member.part(images("mean 1e3, std 1", dtype)))
            anybn.batch_norm(x, state, training=True, group=group)
            whole = anybn.BatchNormState(8)
            anybn.batch_norm(images("mean 1e3, std 1", dtype), whole, training=True)
            assert np.allclose(np.asarray(state.running_var), whole.running_var, rtol=1e-12)
            mine = member.part(images("mean 1e3, std 1", other if member.rank == 1 else dtype))
            member.all_raise(
                ValueError,
                f"'{other}' on member 1",
                lambda: anybn.batch_norm(member.array(mine), state, training=True, group=group),  # noqa: B023
                state,
            )
