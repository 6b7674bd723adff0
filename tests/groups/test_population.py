"""recalibrate and accumulate over a group: one population, one step, whoever holds which part of it."""

import contextlib

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle
from groups import ROWS, Nameless, images, one_fails, same_bits


def batches_of(member, values):
    """This member's, uneven and in another number than its neighbour's; some have none at all."""
    mine = member.part(values, "empty")
    return np.split(mine, [2, 5] if member.rank % 2 else [3]) if len(mine) else []


#: Over all members.
BATCHES = {2: 3, 4: 4}


def is_that_of(state, values, axis=1):
    """The mean in units of float32 of the standard deviation, the variance in its own."""
    expected = oracle.statistics(values, axis)
    mean, var = (np.asarray(a, np.float64) for a in (state.running_mean, state.running_var))
    assert oracle.error(var, expected.var(state.ddof), "float32", size=0) <= 2
    assert oracle.error(mean, expected.mean, "float32", size=np.sqrt(expected.var())) <= 2


@pytest.mark.parametrize("what", ["arrays", "moments", "a layer with channels last"])
def test_recalibrate(member, what):
    values, axis = images("mean 1e6, std 1") + np.arange(ROWS, dtype=np.float32).reshape(-1, 1, 1, 1), 1
    if what == "a layer with channels last":
        values, axis = np.moveaxis(values, 1, -1), -1
    bn = anybn.BatchNorm(8, axis=axis, ddof=0)
    before = bn.state.weight
    batches = (member.array(part) for part in batches_of(member, values))
    if what == "moments":
        batches = map(anybn.moments, batches)
    assert anybn.recalibrate(bn, batches, group=member.group) is bn
    is_that_of(bn.state, values, axis)
    same_bits(member, bn.state)
    assert bn.state.num_batches_tracked == BATCHES[member.size]
    assert bn.state.weight is before


@pytest.mark.members(sizes=(2,))
def test_recalibrate_on_dask_arrays(member):
    import dask.array as da

    values = images("mean 1e3, std 1")
    mine = da.from_array(member.part(values), chunks=(2, 3, 9, 7))
    state = anybn.recalibrate(anybn.BatchNormState(8), mine, group=member.group)
    is_that_of(state, values)
    same_bits(member, state)
    assert state.num_batches_tracked == 2


def test_recalibrate_fails_together(member):
    """On bad batches, on bad data, on no data, on members that differ; and no statistics change."""
    values, last, state = images(), member.size - 1, anybn.BatchNormState(8)
    anybn.batch_norm(values, state, training=True)
    mine = member.part(values)

    def broken():
        yield member.array(mine)
        if member.rank == last:
            raise OSError("the disk is gone")

    one_fails(member, None, lambda: anybn.recalibrate(state, broken(), group=member.group), state, "the disk is gone")
    bad = np.where(np.arange(8).reshape(1, 8, 1, 1) == member.rank, np.float32(np.nan), mine)
    for batches, error, message in (
        ([member.array(bad)], anybn.NonFiniteError, f"NaN or infinite in {member.size} of 8 channels (0, 1"),
        ([], ValueError, "batches gave 0 values per channel"),
    ):
        member.all_raise(error, message, lambda: anybn.recalibrate(state, batches, group=member.group), state)  # noqa: B023
    other = anybn.BatchNormState(8, ddof=0 if member.rank == last else 1)
    message = f"and member {last} of the group differ in what they recalibrate"
    member.all_raise(ValueError, message, lambda: anybn.recalibrate(other, [mine], group=member.group), other)
    message, nameless = "group has no rank and size", Nameless(member.group)
    member.all_raise(TypeError, message, lambda: anybn.recalibrate(state, [mine], group=nameless), state)


def small_net():
    import torch

    torch.manual_seed(0)
    nn = torch.nn
    layers = (nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(140, 6), nn.BatchNorm1d(6))
    return nn.Sequential(nn.BatchNorm2d(8), *layers, nn.ReLU()).double()


NORMS = (0, 2, 6)


def buffers(model):
    return [buffer.double().numpy().copy() for buffer in model.buffers()]


@pytest.mark.members("gloo")
@pytest.mark.parametrize("one_pass", [False, True])
def test_recalibrate_a_model(member, one_pass):
    """All batch norms of it: as one process with everybody's batches."""
    import torch

    import anybn.torch

    values = images("mean 1e3, std 1", "float64")
    parts = [torch.from_numpy(part) for part in batches_of(member, values)]
    sizes = {2: [2, 3, 7], 4: [3, 2, 3, 4]}[member.size]
    whole = [torch.from_numpy(part) for part in np.split(values, np.cumsum(sizes)[:-1])]
    expected = anybn.recalibrate(small_net(), whole, one_pass=one_pass)
    for model in (small_net(), anybn.torch.convert(small_net(), group=member.group)):
        anybn.recalibrate(model, parts, group=member.group, one_pass=one_pass)
        is_that_of(model[0] if hasattr(model[0], "ddof") else anybn.torch.convert(model)[0].state, values)
        same_bits(member, *(anybn.torch.convert(model)[i].state for i in NORMS))
        for found, wanted in zip(buffers(model), buffers(expected), strict=True):
            assert np.allclose(found, wanted, rtol=1e-10)


@pytest.mark.members("gloo")
def test_recalibrate_a_model_fails_together(member):
    """In the second pass, where one layer is done already."""
    import torch

    model, last = small_net(), member.size - 1
    before = buffers(model)

    def forward(model, x):
        if member.rank == last and int(model[0].num_batches_tracked):
            raise OSError("the disk is gone")
        return model(x)

    mine = [torch.from_numpy(member.part(images(dtype="float64")))]
    state = anybn.BatchNormState(1)
    one_fails(
        member, None, lambda: anybn.recalibrate(model, mine, group=member.group, forward=forward), state, "the disk"
    )
    assert all(np.array_equal(a, b) for a, b in zip(buffers(model), before, strict=True))


# -- micro-batches ---------------------------------------------------------------------------------------------

#: Rows of the whole in each micro-batch, of which every member has a part, or nothing.
MICRO_BATCHES = (slice(0, 5), slice(5, 7), slice(7, ROWS))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accumulate(member, dtype):
    """One commit per step, from all micro-batches of all members; y and dx from the micro-batch of all members."""
    x, dy = images("mean 1e6, std 1", dtype), inputs.normal((ROWS, 8, 9, 7), 1).astype(dtype)
    bn = anybn.BatchNorm(8, group=member.group)
    for step in range(2):
        with anybn.accumulate(bn):
            for rows in MICRO_BATCHES:
                mine, my_dy = (np.array_split(a[rows], member.size)[member.rank] for a in (x, dy))
                y, pullback = bn.vjp(member.array(mine))
                dx = pullback(member.array(my_dy)).x
                s = oracle.statistics(x[rows])
                expected = oracle.normalize(x[rows], s.mean, s.var())
                of_all = oracle.gradients(dy[rows], x[rows], s.mean, s.var(), count=s.count)
                for found, whole in ((y, expected), (dx, of_all.x)):
                    part = np.array_split(whole, member.size)[member.rank]
                    # of float64, by the size of what was subtracted, as everywhere
                    bar, size = (0.500001, 1) if dtype == "float32" else (2, 5)
                    assert oracle.error(np.asarray(found), part, dtype, size) <= bar
        assert bn.state.num_batches_tracked == step + 1
    mean, var = oracle.trained([oracle.statistics(x)] * 2)
    assert oracle.error(np.asarray(bn.state.running_mean), mean, dtype) <= (1e-3 if dtype == "float32" else 2)
    assert oracle.error(np.asarray(bn.state.running_var), var, dtype) <= (1e-3 if dtype == "float32" else 2)
    same_bits(member, bn.state)


def test_accumulate_commits_nothing_where_a_member_fails(member):
    state, mine = anybn.BatchNormState(8), member.part(images())

    def step():
        with anybn.accumulate(state):
            anybn.batch_norm(member.array(mine), state, training=True, group=member.group)
            x = mine.astype(int) if member.rank == member.size - 1 else mine
            anybn.batch_norm(member.array(x), state, training=True, group=member.group)

    one_fails(member, None, step, state, "x has dtype int")
    anybn.batch_norm(member.array(mine), state, training=True, group=member.group)
    assert state.num_batches_tracked == 1


@pytest.mark.members("gloo")
def test_accumulate_a_model(member):
    """Gradient accumulation over micro-batches and members, with DistributedDataParallel's no_sync."""
    import torch

    import anybn.torch

    x = torch.from_numpy(images(dtype="float64"))

    def train(model, share, quiet, scale):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            with anybn.accumulate(model):
                for i, rows in enumerate(MICRO_BATCHES):
                    with quiet() if i + 1 < len(MICRO_BATCHES) else contextlib.nullcontext():
                        (scale * model(share(x[rows])).square().sum()).backward()
            optimizer.step()

    whole, model = (anybn.torch.convert(small_net(), group=group) for group in (None, member.group))
    train(whole, lambda rows: rows, contextlib.nullcontext, 1)
    parallel = torch.nn.parallel.DistributedDataParallel(model, process_group=member.group)
    # which gives the mean of the members' gradients
    train(parallel, lambda rows: rows.tensor_split(member.size)[member.rank], parallel.no_sync, member.size)
    assert [int(model[i].num_batches_tracked) for i in NORMS] == [2, 2, 2]
    for name, expected in whole.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), expected.double(), rtol=1e-9, atol=1e-11), name
