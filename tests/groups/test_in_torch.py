"""What is torch's own: derivatives of any order, DistributedDataParallel, sub-groups, checkpointing."""

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs
from groups import ROWS, images


@pytest.mark.members("gloo")
@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_autograd(member, split):
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


@pytest.mark.members("gloo", sizes=(2,))
def test_torch_func(member):
    """torch.func's derivatives go op by op. It takes a second to import."""
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


@pytest.mark.members("gloo")
def test_distributed_data_parallel(member):
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
    ddp = torch.nn.parallel.DistributedDataParallel(model, process_group=member.group)
    train(ddp, mine, mine_labels)
    for name, expected in whole.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), expected.double(), rtol=1e-9, atol=1e-11), name
    alone = anybn.torch.convert(small_net())
    alone = torch.nn.parallel.DistributedDataParallel(alone, process_group=member.group)
    train(alone, mine, mine_labels)
    assert not torch.allclose(alone.module[1].running_var, whole[1].running_var, rtol=1e-4)  # it is not for nothing


@pytest.mark.members("gloo", sizes=(4,))
def test_sub_groups(member):
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
    with pytest.raises(TypeError, match="that this process is a member of"):
        anybn.BatchNorm(8, group=other)(torch.from_numpy(of_half[rows]))


@pytest.mark.members("gloo")
def test_checkpointing(member):
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


@pytest.mark.members("gloo", sizes=(2,))
def test_compiled(member):
    """torch.compile ends its graph at each batch norm; members of different sizes compile different graphs."""
    import warnings

    import torch

    import anybn.torch

    x = torch.from_numpy(inputs.normal((ROWS, 1, 8, 8)) * 3 + 100)
    whole, net = (anybn.torch.convert(small_net(), group=group) for group in (None, member.group))
    whole(x).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch.compile(net, backend="eager")(member.part(x)).square().sum().backward()
    for (name, expected), found in zip(whole.named_parameters(), net.parameters(), strict=True):
        assert np.allclose(member.total(found.grad.numpy()), expected.grad.numpy(), rtol=1e-9, atol=1e-9), name
    for (name, expected), found in zip(whole.named_buffers(), net.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12), name
