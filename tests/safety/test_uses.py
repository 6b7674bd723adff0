"""Uses of torch and Python that went wrong once."""

import copy
import functools
import pickle

import numpy as np
import pytest

import anybn
from anybn import norms
from safety import survives

# -- many gradients at a time ----------------------------------------------------------------------------------------


BATCHED = {
    "module": lambda torch, mode: anybn.torch.BatchNorm1d(3, dtype=torch.float64).train(mode),
    "relu": lambda torch, mode: anybn.torch.BatchNorm1d(3, dtype=torch.float64, activation="relu").train(mode),
    "state": lambda torch, mode: functools.partial(
        anybn.batch_norm, state=anybn.BatchNormState(3, dtype="float64", like="torch"), training=mode
    ),
    "layer_norm": lambda torch, mode: norms.layer_norm,
    "group_norm": lambda torch, mode: lambda x: norms.group_norm(x, 1),
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("training", [True, False])
def test_batched_backward(torch, name, training):
    import anybn.torch  # noqa: F401

    call = BATCHED[name](torch, training)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3))).requires_grad_()
    y = call(x)
    one_by_one = torch.stack(
        [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in torch.eye(18).view(18, 6, 3)]
    )
    eye = torch.eye(18, dtype=torch.float64).view(18, 6, 3)
    torch.testing.assert_close(torch.autograd.grad(call(x), x, eye, is_grads_batched=True)[0], one_by_one)
    jacobian = torch.autograd.functional.jacobian(call, x, vectorize=True)
    torch.testing.assert_close(jacobian.view(18, 6, 3), one_by_one)

    def loss(x):
        return call(x).sigmoid().sum()

    hessians = [torch.autograd.functional.hessian(loss, x, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*hessians)
    assert torch.autograd.gradcheck(call, x, check_batched_grad=True)
    zeros = torch._efficientzerotensor((6, 3), dtype=torch.float64)
    assert not torch.autograd.grad(call(x), x, zeros)[0].any()


def test_distributed_tensors(tmp_path):
    """All of them, as torch's module takes them; a mixture is torch's error, and changes nothing."""
    pytest.importorskip("torch.distributed.tensor", reason="torch: not installed")
    survives(f"""
        import torch, torch.distributed as dist, anybn, anybn.torch
        from anybn import norms
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        x = torch.randn(6, 4)
        spread = distribute_tensor(x, mesh, [Shard(0)])
        replicated = lambda a: distribute_tensor(a.detach(), mesh, [Replicate()])

        def module(parameters, buffers):
            m = anybn.torch.BatchNorm1d(4)
            for name, p in list(m.named_parameters()) if parameters else ():
                setattr(m, name, torch.nn.Parameter(replicated(p)))
            for name, b in list(m.named_buffers()) if buffers else ():
                setattr(m, name, replicated(b))
            return m

        m, plain = module(True, True), anybn.torch.BatchNorm1d(4)
        for training in (True, False):
            y, expected = m.train(training)(spread), plain.train(training)(x)
            torch.testing.assert_close(y.full_tensor(), expected)
            y.square().sum().backward(), expected.square().sum().backward()
            torch.testing.assert_close(m.weight.grad.full_tensor(), plain.weight.grad)
        torch.testing.assert_close(m.running_var.full_tensor(), plain.running_var)
        torch.testing.assert_close(norms.layer_norm(spread).full_tensor(), norms.layer_norm(x))
        for m, given in ((module(True, False), spread), (module(True, False), x), (module(False, False), spread)):
            for training in (True, False):
                try:
                    m.train(training)(given)
                except RuntimeError as error:
                    assert "got mixed torch.Tensor and DTensor" in str(error), error
                else:
                    raise AssertionError("no error")
                assert int(m.num_batches_tracked) == 0 and not m.running_mean.any()
        dist.destroy_process_group()
    """)


# -- states and layers that are looked at or copied ------------------------------------------------------------------


def test_states_without_values_have_a_repr(jax):
    state = anybn.BatchNormState(4, like="jax")
    shapes = jax.eval_shape(lambda s: s, state)
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), state)
    assert repr(shapes) == "BatchNormState(4, eps=1e-05, momentum=0.1) of ShapeDtypeStruct"
    assert repr(specs).startswith("BatchNormState(4, eps=1e-05, momentum=0.1) of P")
    assert repr(anybn.BatchNorm(4, state=specs)).startswith("BatchNorm(4, eps=1e-05, momentum=0.1, axis=1) in training")


def test_layers_copy_within_their_group():
    class Group:
        def all_reduce_sum(self, array):
            return array

        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle this")

    layer = anybn.BatchNorm(4, group=Group())
    twin = copy.deepcopy(layer)
    layer(np.random.default_rng(0).normal(size=(8, 4)))
    assert twin.group is layer.group
    assert (twin.state.num_batches_tracked, layer.state.num_batches_tracked) == (0, 1)


def test_the_state_of_a_module_pickles(torch):
    import anybn.torch

    state = pickle.loads(pickle.dumps(anybn.torch.BatchNorm1d(4).state))
    anybn.batch_norm(np.random.default_rng(0).normal(size=(8, 4)), state, training=True)
    assert state.num_batches_tracked == 1


# -- other things ----------------------------------------------------------------------------------------------------


def test_a_default_device_without_memory(torch):
    import anybn.torch

    m = anybn.torch.BatchNorm1d(4, activation="relu")
    plain = anybn.torch.BatchNorm1d(4, activation="relu")
    x, residual = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    other, other_residual = (a.detach().clone().requires_grad_() for a in (x, residual))
    with torch.device("meta"):
        m(x, residual).sum().backward()
        m.state.num_batches_tracked = 5
    plain(other, other_residual).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(residual.grad, other_residual.grad)
    assert int(m.num_batches_tracked) == 5
    state = anybn.BatchNormState(4, like=x)
    _, pullback = anybn.batch_norm_vjp(x, state, training=True, activation="relu", residual=residual)
    with torch.device("meta"):
        found = pullback(torch.ones(8, 4, device="cpu"))
    torch.testing.assert_close(found.residual, other_residual.grad)


def test_an_interrupted_recalibrate_leaves_no_hook(torch, monkeypatch):
    import anybn.torch

    model = torch.nn.Sequential(anybn.torch.BatchNorm1d(4), anybn.torch.BatchNorm1d(4))
    register = torch.nn.Module.register_forward_pre_hook

    def interrupted(*args, **options):
        register(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        anybn.recalibrate(model, [torch.randn(8, 4)])
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model)
    assert all(m.training for m in model.modules())
