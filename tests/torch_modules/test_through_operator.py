"""Modules whose calls torch runs without Python: that they do, and what is special about such a call."""

import copy
import gc
import pickle

import numpy as np
import pytest
from safety import survives

from anybn.conformance import inputs

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch.utils import flop_counter  # noqa: E402

import anybn.torch  # noqa: E402
from anybn.torch import through_operator  # noqa: E402

prepared = pytest.importorskip("anybn.kernels.cpu.prepared", reason="numba: not installed, pip install 'anybn[fast]'")
if through_operator.operator() is None:
    pytest.skip("numba: not installed, or torch has no OpenMP threads that can be shared", allow_module_level=True)

SHAPE = (4, 8, 3, 5)


def module(**options):
    bn = anybn.torch.BatchNorm2d(SHAPE[1], **options)
    with torch.no_grad():
        bn.weight.copy_(torch.arange(8) / 4 + 0.5)
        bn.bias.copy_(torch.arange(8) / 8 - 0.5)
    return bn


def tensor(seed=0, dtype=torch.float32):
    return torch.from_numpy(inputs.normal(SHAPE, seed) * 3 + 1).to(dtype)


def residual_of(adds, dtype=torch.float32):
    return tensor(7, dtype).requires_grad_() if adds else None


def plain(bn, x, residual=None):
    """The formula in operations of torch's, of the batch."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    y = (x - mean) / torch.sqrt(var + bn.eps) * bn.weight[:, None, None] + bn.bias[:, None, None]
    y = y if residual is None else y + residual
    return y.relu() if bn.activation else y


def expected_gradient(bn, x, dy):
    return expected_gradients(bn, x, None, dy)[0]


def expected_gradients(bn, x, residual, dy):
    """x's, and the residual's where there is one."""
    given = [a.detach().double().requires_grad_() for a in (x, residual) if a is not None]
    return torch.autograd.grad(plain(copy.deepcopy(bn).double(), *given), given, dy.double())


def check_gradients(y, bn, x, residual, dy, tolerance, **options):
    given = [a for a in (x, residual) if a is not None]
    found, expected = torch.autograd.grad(y, given, dy, **options), expected_gradients(bn, x, residual, dy)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, atol=tolerance)


def takes(y):
    node = y.grad_fn
    if type(node).__name__ == "UnsafeViewBackward0":
        node = node.next_functions[0][0]
    return type(node).__name__ in ("CudnnBatchNormBackward0", "ScaledDotProductEfficientAttentionBackward0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_takes_what_nets_have(dtype, kind, activation, adds, training):
    bn = module(activation=activation).train(training)
    x, residual = (tensor(seed, dtype).to(memory_format=kind).requires_grad_() for seed in (0, 7))
    y = bn(x, residual=residual if adds else None)
    assert takes(y)
    assert y.is_contiguous(memory_format=kind)
    for gradient in torch.autograd.grad(y, (x, residual) if adds else x, torch.ones_like(y)):
        assert gradient.is_contiguous(memory_format=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_takes_what_is_not_recorded(dtype, activation, adds, training):
    """Evaluation gives the operator the statistics themselves then."""
    bn, x, residual = module().train(training), tensor(dtype=dtype), tensor(7, dtype) if adds else None
    bn.running_mean.fill_(0.5)
    expected = copy.deepcopy(bn)(x, residual=residual, activation=activation)
    assert takes(expected)
    with torch.no_grad():
        y = through_operator.through_operator(bn, x, residual, activation)
    assert torch.equal(y, expected)
    assert int(bn.num_batches_tracked) == training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("records", [True, False])
def test_only_as_many_axes_as_the_module_takes(training, records):
    bn, anyhow = module().train(training), anybn.torch.convert(torch.nn.SyncBatchNorm(8)).train(training)
    with torch.set_grad_enabled(records):
        bn(tensor())
        for x in (tensor()[..., 0].contiguous(), tensor()[..., None]):
            assert through_operator.through_operator(bn, x, None, None) is None
            assert through_operator.through_operator(anyhow, x, None, None) is not None
            with pytest.raises(ValueError, match=r"BatchNorm2d needs \(N, C, H, W\)"):
                bn(x)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_differentiable_to_any_order(activation, adds, training):
    bn = module(activation=activation).double().train(training)
    x, residual = tensor(dtype=torch.float64).requires_grad_(), residual_of(adds, torch.float64)
    assert takes(bn(x, residual=residual))
    given = x if residual is None else (x, residual)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, residual=None: bn(x, residual=residual), given)
    if training:
        thirds = []
        for f in (lambda x: bn(x, residual=residual), lambda x: plain(bn, x, residual)):
            first = torch.autograd.grad(f(x).pow(4).sum(), x, create_graph=True)[0]
            second = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]
            thirds.append(torch.autograd.grad(second.pow(2).sum(), x)[0])
        assert torch.allclose(*thirds, rtol=1e-10, atol=1e-10 * float(thirds[1].abs().max()))


DY = {
    "negative in a bit": lambda dy: torch.complex(dy, -dy).conj().imag,
    "expanded": lambda dy: dy[:1].expand(SHAPE),
    "in another format": lambda dy: dy.to(memory_format=torch.channels_last),
    "in no format": lambda dy: dy.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "with gaps": lambda dy: torch.stack((dy, dy), -1)[..., 0],
    "zero": lambda dy: torch._efficientzerotensor(SHAPE),
}


@pytest.mark.parametrize("how", DY)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
def test_dy_may_lie_anyhow(how, activation, adds):
    bn, x, residual, dy = (
        module(activation=activation),
        tensor().requires_grad_(),
        residual_of(adds),
        DY[how](tensor(1)),
    )
    y = bn(x, residual=residual)
    assert takes(y)
    given = (x, residual) if adds else (x,)
    found, expected = torch.autograd.grad(y, given, dy), expected_gradients(bn, x, residual, dy.contiguous() + 0)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
def test_many_dy_at_once(activation, adds):
    bn, x, residual = module(activation=activation), tensor().requires_grad_(), residual_of(adds)
    many = torch.stack([tensor(seed) for seed in range(3)])
    given = (x, residual) if adds else (x,)
    found = torch.autograd.grad(bn(x, residual=residual), given, many, is_grads_batched=True)
    for i, dy in enumerate(many):
        for gradients, expected in zip(found, expected_gradients(bn, x, residual, dy), strict=True):
            assert torch.allclose(gradients[i].double(), expected, atol=1e-5)


@pytest.mark.parametrize("adds", [False, True])
def test_twice_through_one_graph(adds):
    bn, x, residual, dy = module(activation="relu"), tensor().requires_grad_(), residual_of(adds), tensor(1)
    y = bn(x, residual=residual)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("adds", [False, True])
def test_what_hooks_keep_in_its_place(adds):
    """Anything may come back from them: another layout, another precision."""
    bn, x, residual, dy = module(activation="relu"), tensor().requires_grad_(), residual_of(adds), tensor(1)
    last = x.to(memory_format=torch.channels_last)
    added = residual.to(memory_format=torch.channels_last) if adds else None
    for pack, unpack in (
        (lambda a: a.detach().clone(memory_format=torch.contiguous_format), lambda a: a),
        (lambda a: a.half() if a.dtype is torch.float32 else a, lambda a: a.float() if a.dtype is torch.half else a),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = bn(last, residual=added)
        check_gradients(y, bn, x, residual, dy, 2e-2, retain_graph=True)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
def test_checkpointing_counts_what_is_kept(activation, adds):
    """In a first call too, before which there is no plan."""
    prepared.forget_plans()
    bn, x, residual, dy = module(activation=activation), tensor().requires_grad_(), residual_of(adds), tensor(1)
    y = torch.utils.checkpoint.checkpoint(bn, x, residual, use_reentrant=False)
    check_gradients(y, bn, x, residual, dy, 1e-5)
    assert int(bn.num_batches_tracked) == 1


@pytest.mark.parametrize("adds", [False, True])
def test_statistics_that_are_gone_are_an_error(adds):
    bn, x = module(), tensor().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda a: a[:1] if a.dtype is torch.float64 else a, lambda a: a):
        y = bn(x, residual=residual_of(adds))
    with pytest.raises(RuntimeError, match="invalid gradient"):
        y.sum().backward()


@pytest.mark.parametrize("adds", [False, True])
def test_y_after_a_relu_is_not_to_be_written_to(adds):
    y = module(activation="relu")(tensor().requires_grad_(), residual=residual_of(adds))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_residual_may_be_written_to(activation):
    """And y too without a relu, as after an addition of torch's."""
    bn, x, dy = module(activation=activation), tensor().requires_grad_(), tensor(1)
    residual = tensor(7).requires_grad_()
    written = residual * 1
    y = bn(x, residual=written)
    with torch.no_grad():
        expected = y.clone()
    written.mul_(2)
    assert torch.equal(y, expected)
    check_gradients(y if activation else y.add_(1), bn, x, residual, dy, 1e-5)


@pytest.mark.parametrize("adds", [False, True])
def test_parameters_of_another_dtype_before_the_backward_pass(adds):
    bn, x, residual, dy = module(), tensor().requires_grad_(), residual_of(adds), tensor(1)
    exact, y = copy.deepcopy(bn), bn(x, residual=residual)
    bn.half()
    check_gradients(y, exact, x, residual, dy, 1e-3)


def test_residuals_that_the_operator_does_not_take():
    bn, x, dy = module(), tensor().requires_grad_(), tensor(1)
    last = tensor(7).to(memory_format=torch.channels_last).requires_grad_()
    y = bn(x, residual=last)
    assert not takes(y)
    check_gradients(y, bn, x, last, dy, 1e-5)
    for residual in (last.double(), last[:1], last.to("meta")):
        with pytest.raises((TypeError, ValueError), match="residual"):
            bn(x, residual=residual)


def test_counting_flops():
    """The operator of attention that `through_operator` borrows would count as one, of shapes that it cannot have."""
    bn, x, count = module(activation="relu"), tensor().requires_grad_(), flop_counter.FlopCounterMode(display=False)
    y = bn(x, residual=residual_of(True))
    assert takes(y)
    with count:
        y.sum().backward()
        bn(x, residual=residual_of(True)).sum().backward()
    assert count.get_total_flops() == 0


def test_copies_have_statistics_of_their_own():
    bn = module()
    bn(tensor())
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        before = bn.running_mean.clone()
        twin(tensor(1))
        assert torch.equal(bn.running_mean, before)
        assert not torch.equal(twin.running_mean, before)


def test_buffers_that_change_their_memory():
    """Each way that torch has, after a call has gone through the operator."""
    ways = (
        lambda bn: torch.utils.swap_tensors(bn.running_mean, torch.zeros(8, dtype=torch.float64)),
        lambda bn: bn.running_mean.set_(torch.zeros(8, dtype=torch.float64)),
        lambda bn: setattr(bn.running_mean, "data", torch.zeros(8, dtype=torch.float64)),
        lambda bn: setattr(bn, "running_mean", torch.zeros(8, dtype=torch.float64)),
        lambda bn: bn.load_state_dict({**bn.state_dict(), "running_mean": np.zeros(8)}, assign=True),
    )
    x = tensor()
    for change in ways:
        bn, fresh = module(), module()
        bn(tensor(1))
        bn.running_var.fill_(1)
        change(bn)
        gc.collect()
        for each in (bn, fresh):
            each(x)
        assert torch.equal(bn.running_mean, fresh.running_mean)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("swaps", [True, False])
def test_a_count_that_changes_its_memory(dtype, swaps):
    """Also to a dtype that the operator does not count in."""
    bn, count = module(), torch.tensor(5, dtype=dtype)
    bn(tensor())
    if swaps:
        torch.utils.swap_tensors(bn.num_batches_tracked, count)
    else:
        bn.num_batches_tracked.data = count
    gc.collect()
    mean = bn.running_mean.clone()
    bn(tensor(1))
    assert int(bn.num_batches_tracked) == 6
    assert not torch.equal(bn.running_mean, mean)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_arrays_of_another_length_are_named(name):
    bn = module()
    bn(tensor())
    getattr(bn, name).data = torch.ones(5, dtype=getattr(bn, name).dtype)
    before = copy.deepcopy(bn.state_dict())
    with pytest.raises(ValueError, match=rf"{name} has shape \(5,\)"):
        bn(tensor())
    for key, value in bn.state_dict().items():
        assert torch.equal(value, before[key])


def test_more_layouts_than_there_are_plans(monkeypatch):
    prepared.forget_plans()
    monkeypatch.setattr(prepared, "_MOST_PLANS", 1)
    bn, other = module(), tensor().reshape(4, 8, 5, 3).requires_grad_()
    assert takes(bn(tensor().requires_grad_()))
    y = bn(other)
    assert not takes(y)
    assert torch.allclose(y.double(), plain(copy.deepcopy(bn).double(), other.double()), atol=1e-5)
    prepared.forget_plans()


def test_somebody_elses_call_of_torchs_operator_gives_nothing():
    """Before anybn was there, it had no kernel for the CPU."""
    given = tensor(), torch.ones(8), torch.zeros(8)
    for state in ((None, None), (torch.zeros(8), torch.ones(8)), (torch.zeros(3, dtype=torch.int64), None)):
        assert torch.cudnn_batch_norm(*given, *state, True, 0.1, 1e-5)[0] is None
    for scale in (None, 0.125, -1e300, float("nan"), float("-nan")):
        of_attention = tensor(), tensor(), torch.ones(8), torch.zeros(8), True, 1e-5
        assert torch._scaled_dot_product_efficient_attention(*of_attention, scale=scale)[0] is None


def test_trains_after_a_first_call_in_inference_mode():
    bn = module().eval()
    with torch.inference_mode():
        bn(tensor())
    y = bn.train()(tensor().requires_grad_())
    assert takes(y)
    y.sum().backward()


def test_a_default_device_does_not_matter():
    bn = module()
    with torch.device("meta"):
        y = bn(tensor().requires_grad_())
    assert takes(y)
    assert y.device.type == "cpu"


CALL = """
import torch, anybn.torch
bn = anybn.torch.BatchNorm2d(2)
x = torch.arange(16.0).reshape(2, 2, 2, 2).requires_grad_()
y = bn(x)
y.sum().backward()
print(type(y.grad_fn).__name__, abs(float(y.detach().sum())) < 1e-5)
"""


def test_a_torch_that_lacks_a_function():
    """As older ones do: then Python makes the calls."""
    lacking = "from anybn.kernels.cpu import torch_abi; torch_abi._SYMBOLS.append('aoti_torch_of_another_version')"
    assert survives(f"import torch\n{lacking}\n{CALL}") == "RecordedBackward True\n"


def test_a_forked_child_has_plans_of_its_own():
    """On one thread; on more, Python hands out threads that are not the parent's."""
    code = f"""{CALL}
import os, sys
for threads, expected in ((1, "CudnnBatchNormBackward0"), (2, "RecordedBackward")):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        torch.set_num_threads(threads)
        anybn.set_num_threads(threads)
        y = bn(x)
        y.sum().backward()
        os._exit(type(y.grad_fn).__name__ != expected)
    assert os.waitpid(child, 0)[1] == 0
"""
    assert survives(code, PYTHONWARNINGS="ignore") == "CudnnBatchNormBackward0 True\n"
