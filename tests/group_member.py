"""One member of a group of processes: ``group_member.py ENGINE RANK SIZE FOLDER``, started by test_distributed.py.

Every member makes the whole batch, keeps its part of it, and compares what it gets with the whole. All of them go
through the same cases; what failed is left in FOLDER, for the tests to read.
"""

import contextlib
import datetime
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np

import anybn
from anybn import _synchronized
from anybn.conformance import inputs, oracle
from anybn.distributed import as_group

ROWS = 12
#: Rows of the batch per member.
SPLITS = {
    2: {"equal": (6, 6), "unequal": (1, 11), "empty": (0, 12)},
    4: {"equal": (3, 3, 3, 3), "unequal": (1, 7, 2, 2), "empty": (5, 0, 7, 0)},
}
CASES = {}


def case(*engines, sizes=(2, 4), **parameters):
    """Of these engines, all without any, once for every value of the one parameter."""

    def add(function):
        ((name, values),) = parameters.items() or ((None, [None]),)
        for value in values:
            label = function.__name__ + (f"[{value}]" if name else "")
            options = {name: value} if name else {}
            CASES[label] = function, options, engines, sizes
        return function

    return add


def cases_of(engine, size):
    return [
        name for name, (_, _, engines, sizes) in CASES.items() if engine in (engines or (engine,)) and size in sizes
    ]


class Member:
    """What a case needs to know."""

    def __init__(self, engine, rank, size, group):
        self.engine, self.rank, self.size, self.group = engine, rank, size, group

    def array(self, values):
        if self.engine == "mpi":
            return values
        import torch

        return torch.from_numpy(np.ascontiguousarray(values))

    def part(self, values, split="unequal"):
        """This member's rows."""
        sizes = SPLITS[self.size][split]
        start = sum(sizes[: self.rank])
        return values[start : start + sizes[self.rank]]

    def total(self, values):
        """The sum over all members, in float64."""
        return np.asarray(as_group(self.group).all_reduce_sum(self.array(np.asarray(values, np.float64))))

    def all_raise(self, error, match, function, state):
        """Every member gets this error, and its state is as before."""
        before = inputs.state_values(state)
        try:
            function()
        except error as raised:
            found = str(raised)
        else:
            found = "nothing was raised"
        wrong = float(match not in found or inputs.state_values(state) != before)
        assert self.total([wrong])[0] == 0, found


class Counting:
    """A group that counts its collectives."""

    def __init__(self, group):
        self.group = as_group(group)
        self.rank, self.size, self.calls = self.group.rank, self.group.size, 0

    def all_reduce_sum(self, array):
        self.calls += 1
        return self.group.all_reduce_sum(array)


class Nameless:
    """A group that can sum, and nothing else."""

    def __init__(self, group):
        self.all_reduce_sum = as_group(group).all_reduce_sum


def compared_with_the_whole(member, x, split, *, group=None, mask=None, axis=1, bar=0.500001, dtype="float32"):
    """y, gradients and running statistics of two steps against long double arithmetic on the whole batch."""
    rng = np.random.default_rng(1)
    channels = x.shape[axis]
    residual, dy = (rng.standard_normal(x.shape).astype(dtype) for _ in range(2))
    weight, bias = rng.standard_normal((2, channels)).astype(np.float32)
    state = anybn.BatchNormState(channels)
    state.weight, state.bias = weight, bias
    mine = [member.array(member.part(a, split)) for a in (x, residual, dy)]
    of_mine = None if mask is None else member.array(member.part(mask, split))
    options = {"training": True, "axis": axis, "mask": of_mine, "residual": mine[1], "activation": "relu"}
    for _ in range(2):
        y, pullback = anybn.batch_norm_vjp(mine[0], state, group=group or member.group, **options)
    grads = pullback(mine[2])

    s = oracle.statistics(x, axis, mask)
    options = {"weight": weight, "bias": bias, "residual": residual, "relu": True, "axis": axis, "mask": mask}
    expected = oracle.normalize(x, s.mean, s.var(), **options)
    options = {"count": s.count, "weight": weight, "axis": axis, "active": expected > 0, "mask": mask}
    of_whole = oracle.gradients(dy, x, s.mean, s.var(), **options)
    mean, var = np.zeros(channels), np.ones(channels)
    for _ in range(2):
        mean = oracle.running(mean, s.mean.origin + s.mean.offset, 0.1)
        var = oracle.running(var, s.var(ddof=1), 0.1)
    # float64 has nothing wider behind it: judged, as in the conformance suite, by the size of what was subtracted.
    term = slope = 1
    if dtype == "float64":
        term = np.abs(weight).max() * 5 + np.abs(bias).max()
        slope = member.part(np.maximum(1, of_whole.x_size), split)
    # Every member rounds its share of the parameters' gradients to float32, half a unit of what it is made of.
    shares = {name: member.total(getattr(grads, name)) for name in ("weight", "bias")}
    sizes = {name: np.maximum(1, getattr(of_whole, f"{name}_size")) for name in shares}
    errors = {
        "y": (oracle.error(np.asarray(y), member.part(expected, split), dtype, term), bar),
        "dx": (oracle.error(np.asarray(grads.x), member.part(of_whole.x, split), dtype, slope), bar),
        "dresidual": (oracle.error(np.asarray(grads.residual), member.part(of_whole.residual, split), dtype), 0),
        "dweight": (oracle.error(shares["weight"], of_whole.weight, "float32", sizes["weight"]), 0.51),
        "dbias": (oracle.error(shares["bias"], of_whole.bias, "float32", sizes["bias"]), 0.51),
        # A member's mean of 1e6 is right to 1e-10, and what lies between two such means to 1e-3 float32's eps.
        "running_mean": (oracle.error(np.asarray(state.running_mean), mean, dtype), 1e-3 if dtype == "float32" else 2),
        "running_var": (oracle.error(np.asarray(state.running_var), var, dtype), 1e-3 if dtype == "float32" else 2),
    }
    wrong = {name: error for name, error in errors.items() if not error[0] <= error[1]}
    assert not wrong, wrong
    assert state.num_batches_tracked == 2
    return y, state


def images(row="N(0, 1)", dtype="float32"):
    return inputs.cast(inputs.ROWS[row](inputs.normal((ROWS, 8, 9, 7))), dtype)


# -- numbers ---------------------------------------------------------------------------------------------------


@case(split=["equal", "unequal", "empty"])
def splits(member, split):
    compared_with_the_whole(member, images("mean 1e3, std 1"), split)


@case(row=list(inputs.ROWS))
def hard_data(member, row):
    compared_with_the_whole(member, images(row), "unequal")


@case(split=["equal", "unequal", "empty"])
def float64(member, split):
    compared_with_the_whole(member, images("mean 1e6, std 1", "float64"), split, bar=2, dtype="float64")


@case(split=["unequal", "empty"])
def members_of_different_means(member, split):
    """What lies between the members is all of the variance."""
    x = images("mean 1e6, std 1") + 1000 * np.arange(ROWS, dtype=np.float32).reshape(-1, 1, 1, 1)
    compared_with_the_whole(member, x, split)


@case(split=["equal", "unequal", "empty"])
def masks(member, split):
    mask = inputs.normal((ROWS, 9, 7), 2) > 0
    mask[: SPLITS[member.size][split][0]] = False  # the first member has nothing that counts
    compared_with_the_whole(member, images("mean 1e3, std 1"), split, mask=mask)


@case()
def channels_last(member):
    compared_with_the_whole(member, np.moveaxis(images(), 1, -1), "unequal", axis=3)


@case(split=["equal", "unequal", "empty"])
def rows_without_names(member, split):
    """A group that has only all_reduce_sum."""
    x = images("mean 1e6, std 1")
    compared_with_the_whole(member, x, split, group=Nameless(member.group))
    x = images("mean 1e6, std 1", "float64")
    # dx of float64 comes within 1.8 here in one process; where four parts were summed 2.2 was seen.
    compared_with_the_whole(member, x, split, group=Nameless(member.group), bar=2.5, dtype="float64")


@case()
def many_members(member):
    """Rows of all of them would be too many: two sums of C values, and errors that name members at first."""
    few, _synchronized.MANY = _synchronized.MANY, 1
    group = Counting(member.group)
    try:
        compared_with_the_whole(member, images("mean 1e6, std 1"), "empty", group=group)
        assert group.calls == 1 + 2 * 2 + 1
    finally:
        _synchronized.MANY = few


@case(split=["equal", "unequal", "empty"])
def exact_data_is_exact(member, split):
    x = inputs.exact((ROWS, 3, 5, 7)).astype(np.float32)
    whole = anybn.BatchNormState(3)
    expected = anybn.batch_norm(x, whole, training=True)
    state = anybn.BatchNormState(3)
    y = anybn.batch_norm(member.array(member.part(x, split)), state, training=True, group=member.group)
    assert np.array_equal(np.asarray(y), member.part(expected, split))
    assert np.array_equal(np.asarray(state.running_mean), whole.running_mean)


@case(dtype=["float32", "float64"])
def constant_input_gives_bias(member, dtype):
    state = anybn.BatchNormState(3)
    state.bias = np.array([0.0, 1.0, -2.5], np.float32)
    x = np.full((ROWS, 3, 5), 1e7 + 0.1, dtype)
    y = anybn.batch_norm(member.array(member.part(x)), state, training=True, group=member.group)
    assert np.array_equal(np.asarray(y), np.broadcast_to(state.bias[None, :, None], y.shape))


@case()
def all_states_are_the_same_bits(member):
    state = anybn.BatchNormState(8)
    for seed in range(3):
        x = inputs.normal((ROWS, 8, 9, 7), seed).astype(np.float32)
        anybn.batch_norm(member.array(member.part(x)), state, training=True, group=member.group)
    digest = int(hashlib.sha256(inputs.state_values(state)).hexdigest()[:8], 16)
    assert member.total([digest])[0] == member.size * digest
    assert member.total([digest**2 % 2**32])[0] == member.size * (digest**2 % 2**32)


@case()
def one_collective_each_way(member):
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


# -- few values, and bad ones ----------------------------------------------------------------------------------


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


# -- disagreement ----------------------------------------------------------------------------------------------

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


# -- torch -----------------------------------------------------------------------------------------------------


@case("gloo", split=["equal", "unequal", "empty"])
def autograd(member, split):
    """First and second derivatives, against one process on the whole batch."""
    import torch

    values = inputs.normal((ROWS, 3, 4)) * 2 + 5
    weight, dy, v = inputs.normal((3,), 1), inputs.normal(values.shape, 2), inputs.normal(values.shape, 3)

    def derivatives(x, dy, v, group, share):
        state = anybn.BatchNormState(3, dtype="float64", like="torch")
        state.weight = torch.nn.Parameter(torch.from_numpy(weight))
        state.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        x = torch.from_numpy(x.copy()).requires_grad_()
        y = anybn.batch_norm(x, state, training=True, group=group)
        loss = (y.sigmoid() * torch.from_numpy(dy)).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        first = dx.detach().numpy().copy()
        (dx.sin() * torch.from_numpy(v)).sum().backward()
        return share(first), share(x.grad.numpy()), state.weight.grad.numpy()

    whole = derivatives(values, dy, v, None, lambda a: member.part(a, split))
    mine = derivatives(*(member.part(a, split) for a in (values, dy, v)), member.group, lambda a: a)
    for of_mine, of_whole in zip(mine[:2], whole[:2], strict=True):
        assert of_mine.shape == of_whole.shape
        assert np.allclose(of_mine, of_whole, rtol=1e-11, atol=1e-12)
    assert np.allclose(member.total(mine[2]), whole[2], rtol=1e-11, atol=1e-12)


@case("gloo")
def torch_func(member):
    """torch.func's derivatives go op by op."""
    import torch

    x = torch.from_numpy(inputs.normal((ROWS, 3)))

    def loss(x, group):
        state = anybn.BatchNormState(3, like=x)
        return anybn.batch_norm(x, state, training=True, group=group).sigmoid().square().sum()

    expected = torch.func.grad(loss)(x, None).numpy()
    mine = torch.func.grad(loss)(torch.from_numpy(member.part(x.numpy()).copy()), member.group)
    assert np.allclose(mine.numpy(), member.part(expected), rtol=1e-12, atol=1e-14)


def small_net():
    import torch

    torch.manual_seed(0)
    nn = torch.nn
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8, bias=False))
    return nn.Sequential(*layers, nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


@case("gloo")
def distributed_data_parallel(member):
    """Training on parts of the batch is training on the batch."""
    import copy

    import torch

    import anybn.torch

    x, labels = torch.from_numpy(inputs.normal((ROWS, 1, 8, 8)) * 3 + 100), torch.arange(ROWS) % 3
    mine, mine_labels = member.part(x, "equal"), member.part(labels, "equal")

    def train(model, x, labels):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        return model

    whole = train(anybn.torch.convert(small_net()), x, labels)
    model = copy.deepcopy(anybn.torch.convert(small_net(), group=member.group))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    train(ddp, mine, mine_labels)
    for name, expected in whole.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), expected.double(), rtol=1e-9, atol=1e-11), name
    alone = train(torch.nn.parallel.DistributedDataParallel(anybn.torch.convert(small_net())), mine, mine_labels)
    assert not torch.allclose(alone.module[1].running_var, whole[1].running_var, rtol=1e-4)  # it is not for nothing


@case("gloo", sizes=(4,))
def sub_groups(member):
    """Each half is a group of its own."""
    import torch.distributed

    halves = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    half, x = halves[member.rank // 2], images()
    of_half = x[:6] if member.rank < 2 else x[6:]
    whole, state = anybn.BatchNormState(8), anybn.BatchNormState(8)
    expected = anybn.batch_norm(of_half, whole, training=True)
    rows = slice(0, 1) if member.rank % 2 == 0 else slice(1, 6)
    y = anybn.batch_norm(torch.from_numpy(of_half[rows]), state, training=True, group=half)
    assert np.array_equal(y.numpy(), expected[rows])
    assert np.allclose(state.running_var.numpy(), whole.running_var, rtol=1e-14)
    other = halves[1 - member.rank // 2]  # what torch gives those that are no members
    try:
        anybn.BatchNorm(8, group=other)(torch.from_numpy(of_half[rows]))
    except TypeError as error:
        assert "that this process is a member of" in str(error)  # noqa: PT017 there is no pytest here
    else:
        raise AssertionError("a process that is no member was let in")


@case("gloo")
def checkpointing(member):
    """What is computed twice asks the group twice, on all members, and learns once."""
    import torch
    from torch.utils.checkpoint import checkpoint

    import anybn.torch

    x = inputs.normal((ROWS, 3)) + 4
    bn = anybn.torch.BatchNorm1d(3, group=member.group)
    mine = torch.from_numpy(member.part(x).copy()).requires_grad_()
    checkpoint(lambda x: bn(x).sigmoid(), mine, use_reentrant=False).sum().backward()
    whole = anybn.BatchNormState(3)
    anybn.batch_norm(x, whole, training=True)
    assert int(bn.num_batches_tracked) == 1
    assert np.allclose(bn.running_var.numpy(), whole.running_var, rtol=1e-14)


# -- running them ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(engine, rank, size, folder):
    """The group of all members."""
    if engine == "mpi":
        from mpi4py import MPI

        yield MPI.COMM_WORLD
        return
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=float(os.environ.get("GROUP_TIMEOUT", "60")))
    store = torch.distributed.FileStore(str(folder / "store"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def run_cases(member, folder):
    """All cases. One that fails on a member may leave the others waiting, so its name is written before it starts."""
    results = folder / f"results-{member.rank}.json"
    found = {}
    for name in cases_of(member.engine, member.size):
        function, options, *_ = CASES[name]
        found[name] = "it hung, or the process died"
        results.write_text(json.dumps(found))
        try:
            function(member, **options)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            results.write_text(json.dumps(found))
    results.write_text(json.dumps(found))


def run_a_death(member, folder):
    """The last member dies between two steps; the others get the engine's error, and keep their state."""
    state = anybn.BatchNormState(8)
    x = member.array(member.part(images()))
    anybn.batch_norm(x, state, training=True, group=member.group)
    if member.rank == member.size - 1:
        os._exit(1)
    before = inputs.state_values(state)
    try:
        anybn.batch_norm(x, state, training=True, group=member.group)
        found = "nothing was raised"
    except RuntimeError:  # all of torch's are
        found = "the engine's error"
    same = inputs.state_values(state) == before
    (folder / f"death-{member.rank}.json").write_text(json.dumps({"raised": found, "same": same}))
    os._exit(0)  # the connections are gone: there is nothing to leave in order


def main(engine, rank, size, folder, what="cases"):
    folder = Path(folder)
    if engine == "mpi":
        from mpi4py import MPI

        rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    rank, size = int(rank), int(size)
    with joined(engine, rank, size, folder) as group:
        {"cases": run_cases, "death": run_a_death}[what](Member(engine, rank, size, group), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
