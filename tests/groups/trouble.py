"""Few values and bad ones, members that disagree or fail: everybody gets the error, and keeps its state."""

import numpy as np

import anybn
from anybn.conformance import inputs
from anybn.distributed import as_group
from groups import Counting, Nameless, case, images


@case()
def one_value_per_member_is_enough(member):
    x = np.arange(3.0 * member.size).reshape(member.size, 3)
    y = anybn.BatchNorm(3, group=member.group)(member.array(x[member.rank : member.rank + 1]))
    assert np.allclose(np.asarray(y), anybn.BatchNorm(3)(x)[member.rank])


@case()
def one_value_in_all_is_not(member):
    state = anybn.BatchNormState(3)
    x = member.array(np.ones((1 if member.rank == 1 else 0, 3)))
    message = f"training needs more than 1 value per channel, got 1 over the {member.size} members of the group"
    member.all_raise(ValueError, message, lambda: anybn.batch_norm(x, state, training=True, group=member.group), state)


@case()
def all_members_empty(member):
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    y, pullback = anybn.batch_norm_vjp(member.array(np.ones((0, 3))), state, training=True, group=member.group)
    assert y.shape == (0, 3)
    assert pullback(y).x.shape == (0, 3)
    assert inputs.state_values(state) == before


@case()
def nan_on_one_member(member):
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
    "axis": "axis is 1 on member{s} {others} and 3 on member {last}",
}


@case(what=list(DISAGREEMENTS))
def disagreement(member, what):
    last = member.size - 1
    channels, x, settings, options = 8, member.part(images()), {}, {}
    if member.rank == last:
        settings = {"eps": {"eps": 1e-3}, "momentum": {"momentum": None}, "affine": {"affine": False}}.get(what, {})
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


@case()
def disagreement_without_names(member):
    state = anybn.BatchNormState(8, eps=1e-5 if member.rank else 1e-3)
    member.all_raise(
        ValueError,
        "the members of the group disagree in channels, dtype or settings",
        lambda: anybn.batch_norm(
            member.array(member.part(images())), state, training=True, group=Nameless(member.group)
        ),
        state,
    )
