"""Tests of groups of real processes, against one process on the whole batch.

Every test is run by all members of a group: each makes the whole batch, keeps its part of it, and compares what it gets
with the whole. `conftest` starts the processes, once per engine, and reports what they found; `member` is what they do.
"""

import hashlib

import numpy as np

import anybn
from anybn.conformance import inputs, oracle
from anybn.distributed import as_group

ROWS = 12
#: Rows of the batch per member.
SPLITS = {
    2: {"equal": (6, 6), "unequal": (1, 11), "empty": (0, 12)},
    4: {"equal": (3, 3, 3, 3), "unequal": (1, 7, 2, 2), "empty": (5, 0, 7, 0)},
}


class Member:
    """This process, in a group of that size."""

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
    mean, var = oracle.trained([s, s])
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


def same_bits(member, *states):
    """On every member."""
    digest = int(hashlib.sha256(b"".join(inputs.state_values(state) for state in states)).hexdigest()[:8], 16)
    assert member.total([digest])[0] == member.size * digest
    assert member.total([digest**2 % 2**32])[0] == member.size * (digest**2 % 2**32)


def images(row="N(0, 1)", dtype="float32"):
    return inputs.cast(inputs.ROWS[row](inputs.normal((ROWS, 8, 9, 7))), dtype)


def one_fails(member, group, call, state, message, names=True):
    """The last member gets its own error, the others one that names it, and no state changes."""
    before, last = inputs.state_values(state), member.size - 1
    try:
        call()
    except Exception as error:
        found, notes = error, getattr(error, "__notes__", ())
    else:
        found, notes = "nothing was raised", ()
    if member.rank == last:
        wrong = message not in str(found) or isinstance(found, anybn.MemberError) or bool(notes)
    else:
        named = f"member {last} of the group raised an error" if names else "a member of the group raised an error"
        wrong = not isinstance(found, anybn.MemberError) or named not in str(found)
        wrong = wrong or found.members != ((last,) if names else ())
    assert member.total([float(wrong or inputs.state_values(state) != before)])[0] == 0, (found, notes)
