"""What crashed, went wrong silently or was left half done, once: each with what was done to it."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import anybn
from anybn import _lock, norms, variants


def survives(code, **environment):
    """The code ends without an error in a process of its own, which it may kill; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout


# -- arrays of the wrong length ------------------------------------------------------------------------------------

SHRINK = {
    "assigned": "m.running_mean, m.running_var = m.running_mean[:3].clone(), m.running_var[:3].clone()",
    "resized": "m.running_mean.resize_(3)",
    "data": "m.running_var.data = torch.ones(3, dtype=torch.float64)",
    "weight": "m.weight.data = torch.ones(3)",
    "longer": "m.bias.data = torch.ones(5000)",
    "two axes": "m.weight.data = torch.ones(4096, 1)",
}


@pytest.mark.parametrize("how", SHRINK)
def test_arrays_of_the_wrong_length_in_a_module(how):
    pytest.importorskip("torch", reason="torch: not installed")
    name = {"assigned": "running_mean", "resized": "running_mean", "data": "running_var"}.get(how, "weight")
    shape = {"longer": "(5000,)", "two axes": "(4096, 1)"}.get(how, "(3,)")
    name = "bias" if how == "longer" else name
    survives(f"""
        import numpy as np, torch, anybn, anybn.torch
        words = "{name} has shape {shape}; the state has 4096 channels: it must be (4096,)"
        for x in (torch.randn(8, 4096), torch.randn(300, 4096), np.ones((8, 4096), np.float32)):
            for training in (True, False):
                m = anybn.torch.BatchNorm1d(4096).train(training)
                {SHRINK[how]}
                call = m if isinstance(x, torch.Tensor) else lambda x: anybn.batch_norm(x, m.state, training=training)
                for _ in range(20):
                    try:
                        call(x)
                    except ValueError as error:
                        assert str(error) == words, error
                    else:
                        raise AssertionError("no error")
                assert int(m.num_batches_tracked) == 0
    """)


def test_arrays_of_the_wrong_length_in_a_compiled_module():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    m = anybn.torch.BatchNorm1d(4)
    m.running_mean = m.running_mean[:3].clone()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"running_mean has shape \(3,\)"):
        torch.compile(m, fullgraph=True, backend="eager")(torch.randn(8, 4))


def resized(array):
    array.resize(3, refcheck=False)


def with_two_axes(array):
    array.shape = (4096, 1)


@pytest.mark.parametrize("change", [resized, with_two_axes])
@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_arrays_of_the_wrong_length_in_a_state(change):
    x = np.ones((4, 4096), np.float32)
    for call in (anybn.batch_norm, anybn.batch_norm_vjp, variants.batch_norm, variants.batch_norm_vjp):
        state = anybn.BatchNormState(4096)
        change(state.weight)
        with pytest.raises(
            ValueError, match=r"^weight has shape .*; the state has 4096 channels: it must be \(4096,\)$"
        ):
            call(x, state)
        assert state.num_batches_tracked == 0
    for call in (anybn.batch_norm_vjp, variants.batch_norm_vjp):
        state = anybn.BatchNormState(4096)
        y, pullback = call(np.random.default_rng(0).normal(size=x.shape), state)
        change(state.weight)
        with pytest.raises(ValueError, match=r"^weight has shape .*; the state has 4096 channels"):
            pullback(y)


PULLBACKS = {
    "batch_norm_vjp": lambda x: anybn.batch_norm_vjp(x, anybn.BatchNormState(4), training=True),
    "variants.batch_norm_vjp": lambda x: variants.batch_norm_vjp(x, anybn.BatchNormState(4)),
    "group_norm_vjp": lambda x: norms.group_norm_vjp(x, 2),
    "layer_norm_vjp": norms.layer_norm_vjp,
    "rms_norm_vjp": norms.rms_norm_vjp,
}


@pytest.mark.parametrize("name", PULLBACKS)
@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_x_that_changes_its_shape_before_the_pullback(name):
    x = np.random.default_rng(0).normal(size=(8, 4))
    _, pullback = PULLBACKS[name](x)
    x.shape = (2, 16)
    with pytest.raises(ValueError, match=r"^x has shape \(2, 16\) but had \(8, 4\) when y was made"):
        pullback(np.ones((2, 16)))


def test_a_weight_that_changes_its_shape_before_the_pullback():
    x, weight = np.random.default_rng(0).normal(size=(8, 4)), np.ones(4)
    y, pullback = norms.layer_norm_vjp(x, weight)
    weight.resize(2, refcheck=False)
    with pytest.raises(ValueError, match=r"weight has shape \(2,\)"):
        pullback(y)


# -- running statistics in 16 bits ---------------------------------------------------------------------------------


def loaded(torch, m, dtype):
    m.load_state_dict({n: a.to(dtype) if a.is_floating_point() else a for n, a in m.state_dict().items()}, assign=True)


def in_place(torch, m, dtype):
    for b in (m.running_mean, m.running_var):
        b.data = b.data.to(dtype)


def compiled(torch, m):
    return torch.compile(m, backend="eager")


def accumulated(torch, m):
    def call(x):
        with anybn.accumulate(m):
            return m(x)

    return call


def natively(torch, m):
    def call(x):
        with anybn.use_backend("torch-native"):
            return m(x)

    return call


def from_numpy(torch, m):
    return lambda x: torch.from_numpy(anybn.batch_norm(x.numpy(), m.state, training=m.training))


def functional(torch, m):
    return lambda x: anybn.batch_norm(x, m.state, training=m.training)


def with_mask(torch, m):
    return lambda x: anybn.batch_norm(x, m.state, training=m.training, mask=torch.ones(len(x), dtype=torch.bool))


@pytest.mark.parametrize("call", [None, compiled, accumulated, natively, from_numpy, functional, with_mask])
@pytest.mark.parametrize("change", [loaded, in_place])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_running_statistics_in_16_bits(dtype, change, call):
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    m, exact = anybn.torch.BatchNorm1d(4, momentum=0.3), anybn.torch.BatchNorm1d(4, momentum=0.3)
    change(torch, m, getattr(torch, dtype))
    # A file's are widened as they are loaded; what somebody does to the buffers themselves is theirs to decide.
    assert m.running_mean.dtype is (torch.float64 if change is loaded else getattr(torch, dtype))
    step = m if call is None else call(torch, m)
    for seed in range(3):
        x = torch.from_numpy(np.random.default_rng(seed).normal(5, 3, (64, 4))).float()
        step(x), exact(x)
        for name in ("running_mean", "running_var"):  # rounded once a step
            torch.testing.assert_close(getattr(m, name).double(), getattr(exact, name), rtol=0.02, atol=0)
    assert int(m.num_batches_tracked) == 3
    exact.running_mean, exact.running_var = m.running_mean.double(), m.running_var.double()
    m.eval(), exact.eval()
    torch.testing.assert_close(step(x).detach().float(), exact(x).detach(), rtol=1e-5, atol=1e-6)


def test_export_of_running_statistics_in_16_bits():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    m, x = anybn.torch.BatchNorm1d(4).eval(), torch.randn(8, 4) * 3 + 5
    in_place(torch, m.train(), torch.bfloat16)
    m(x)
    m.eval()
    torch.testing.assert_close(torch.export.export(m, (x,), strict=False).module()(x), m(x))


# -- memory that others resize -------------------------------------------------------------------------------------


def test_storages_stay_resizable():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    m = anybn.torch.BatchNorm1d(512)
    calls = {
        "moments": anybn.moments,
        "layer_norm": norms.layer_norm,
        "rms_norm": norms.rms_norm,
        "batch_norm": lambda x: anybn.batch_norm(x, anybn.BatchNormState(512), training=True),
        "batch_norm_vjp": lambda x: anybn.batch_norm_vjp(x, anybn.BatchNormState(512), training=True)[1](x),
        "variants": lambda x: variants.batch_norm(x, anybn.BatchNormState(512)),
        "module": m,
        "module in evaluation": m.eval(),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for call in calls.values():
            for rows in (8, 600):
                x = torch.randn(rows, 512).to(dtype)
                call(x)
                x.resize_(rows + 2, 512)
                x = torch.randn(rows, 512).to(dtype)
                call(x)
                x.untyped_storage().resize_(0)
    for t in (m.weight, m.bias, m.running_mean, m.running_var):
        t.detach().untyped_storage().resize_(0)


def test_x_can_be_what_cat_fills():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    x = torch.randn(8, 4)
    norms.layer_norm(x)
    parts = torch.randn(3, 10, 4).unbind()
    torch.cat(parts, out=x.resize_(0))
    assert torch.equal(x, torch.cat(parts))


def test_freed_storages_are_errors():
    pytest.importorskip("torch", reason="torch: not installed")
    survives("""
        import torch, anybn, anybn.torch
        from anybn import norms
        for shape in ((8, 64), (2000, 64)):
            for name in ("x", "weight", "bias", "running_mean", "running_var", "residual"):
                for training in (True, False):
                    m = anybn.torch.BatchNorm1d(64).train(training)
                    x, residual = torch.randn(shape), torch.randn(shape)
                    freed = {"x": x, "residual": residual}.get(name)
                    freed = getattr(m, name) if freed is None else freed
                    freed.detach().untyped_storage().resize_(0)
                    try:
                        m(x, residual)
                    except TypeError as error:
                        assert f"{name} has no memory: its storage was freed" in str(error), error
                    else:
                        raise AssertionError((shape, name, training))
                    assert int(m.num_batches_tracked) == 0
        x = torch.randn(8, 64)
        x.untyped_storage().resize_(0)
        for call in (anybn.moments, norms.layer_norm):
            try:
                call(x)
            except TypeError as error:
                assert "x has no memory" in str(error), error
            else:
                raise AssertionError(call)
    """)


# -- tensors whose address says nothing ----------------------------------------------------------------------------


def test_weights_that_are_no_plain_memory():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    class Wrapped(torch.Tensor):
        """Its values lie in another tensor, as DTensor's do."""

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            def unwrap(a):
                return a.inner if isinstance(a, Wrapped) else a

            inner, options = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
            result = function(*inner, **options)
            return Wrapped(result) if function is torch.ops.aten.detach.default else result

    values = torch.tensor([2.0, 3.0, 4.0, 5.0])
    for shape in ((8, 4), (40000, 4)):
        x = torch.randn(shape)
        ways = {
            "wrapped": lambda: (Wrapped(values), Wrapped(-values)),
            "negated": lambda: (torch._neg_view(-values), torch._neg_view(values)),
        }
        for way, made in ways.items():
            plain = anybn.torch.BatchNorm1d(4)
            plain.weight = torch.nn.Parameter(values, requires_grad=False)
            plain.bias = torch.nn.Parameter(-values, requires_grad=False)
            m = anybn.torch.BatchNorm1d(4)
            m.weight, m.bias = (torch.nn.Parameter(a, requires_grad=False) for a in made())
            for training in (True, False):
                torch.testing.assert_close(m.train(training)(x), plain.train(training)(x), msg=way)
                for a, b in zip(m.buffers(), plain.buffers(), strict=True):
                    torch.testing.assert_close(a, b)
        m = anybn.torch.BatchNorm1d(4)
        m.running_mean, m.running_var = torch._neg_view(torch.zeros(4).double() - 7), torch._neg_view(-m.running_var)
        expected = anybn.torch.BatchNorm1d(4)
        expected.running_mean += 7
        for module in (m, expected):
            module(x)
            module.eval()
        torch.testing.assert_close(m.running_mean.resolve_neg(), expected.running_mean)
        torch.testing.assert_close(m(torch._neg_view(x)), expected(-x))


# -- nothing is left half done -------------------------------------------------------------------------------------


def interrupted_everywhere(make, call, values):
    """After a KeyboardInterrupt before any line of anybn, the values are the old ones or the new ones."""
    holder = make()
    before = values(holder)
    call(holder)
    after = values(holder)
    assert before != after
    for line in range(100_000):
        holder, left = make(), line

        def trace(frame, event, arg):
            nonlocal left
            if "/anybn/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            call(holder)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            # The trace also comes inside the end of a with, where Python lets no signal in: before a lock is released,
            # before torch's no_grad turns gradients on again.
            _lock._renew_commits()
            if (torch := sys.modules.get("torch")) is not None:
                torch.set_grad_enabled(True)
        assert values(holder) in (before, after), line
        if left >= 0:
            return line
    raise AssertionError("it does not end")


def buffers(m):
    return [b.tolist() for b in m.buffers()]


WAYS = {
    "small": lambda m: m(torch_array((8, 4))),
    "relu": lambda m: m(torch_array((8, 4)), activation="relu"),
    "large": lambda m: m(torch_array((40000, 4))),
    "numpy": lambda m: anybn.batch_norm(np.random.default_rng(0).normal(size=(8, 4)), m.state, training=True),
    "masked": lambda m: anybn.batch_norm(torch_array((8, 4)), m.state, training=True, mask=torch_array((8,)) < 1),
    "loaded": lambda m: m.state.load_state_dict(
        {"weight": np.ones(4), "bias": np.ones(4), "running_mean": np.ones(4), "running_var": np.full(4, 2.0)}
        | {"num_batches_tracked": 7}
    ),
}


def torch_array(shape):
    import torch

    return torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_atomic_under_interrupts(way):
    pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    assert interrupted_everywhere(lambda: anybn.torch.BatchNorm1d(4), WAYS[way], buffers) > 5


@pytest.mark.parametrize("kind", ["states", "modules", "both"])
def test_accumulate_is_atomic_under_interrupts(kind):
    pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    x = torch_array((8, 4))

    def make():
        kinds = {"states": "sss", "modules": "mmm", "both": "sms"}[kind]
        return [anybn.BatchNormState(4, like=x) if k == "s" else anybn.torch.BatchNorm1d(4) for k in kinds]

    def call(holders):
        with anybn.accumulate(*holders):
            for holder in holders:
                for part in (x[:3], x[3:]):
                    anybn.batch_norm(part, getattr(holder, "state", holder), training=True)

    def values(holders):
        with anybn.accumulate(*holders):  # which is not open any more
            states = [getattr(holder, "state", holder) for holder in holders]
            return [(s.running_mean.tolist(), s.running_var.tolist(), s.num_batches_tracked) for s in states]

    interrupted_everywhere(make, call, values)


def test_threads_in_one_block():
    from concurrent.futures import ThreadPoolExecutor

    x, state, whole = (
        np.random.default_rng(0).normal(size=(800, 4)) + 5,
        anybn.BatchNormState(4),
        anybn.BatchNormState(4),
    )
    with anybn.accumulate(state), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda part: anybn.batch_norm(part, state, training=True), np.split(x, 100)))
    anybn.batch_norm(x, whole, training=True)
    assert state.num_batches_tracked == 1
    np.testing.assert_allclose(state.running_var, whole.running_var, rtol=1e-12)


def test_a_call_that_ends_after_its_block_is_learnt():
    state, x = anybn.BatchNormState(4), np.random.default_rng(0).normal(size=(8, 4))
    with anybn.accumulate(state):
        block = state._store.block
    state._store.block = block
    anybn.batch_norm(x, state, training=True)
    assert state.num_batches_tracked == 1
    with anybn.accumulate(state):
        pass


@pytest.mark.parametrize("reader", ["copy", "state_dict", "evaluation", "numpy", "small", "large"])
def test_no_torn_reads_beside_a_thread_that_trains(reader):
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import threading
    import time

    import anybn.torch

    channels = 20_000
    sign = torch.tensor([[-1.0], [1.0]]) / 2**0.5  # of unbiased variance 1
    batches = [(sign * k + k).expand(2, channels).contiguous().double() for k in (1, 3)]
    m, other = anybn.torch.BatchNorm1d(channels, momentum=1.0), anybn.torch.BatchNorm1d(channels).eval()
    m(batches[0])
    other.running_mean, other.running_var = m.running_mean, m.running_var
    x = torch.full((1, channels), 5.0).double()

    def of_statistics(mean, var):
        return (5 - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5)

    def of_dict(found):
        return of_statistics(found["running_mean"], found["running_var"])

    def of_copy(copy):
        return of_statistics(copy.running_mean, copy.running_var)

    readers = {
        "copy": lambda: of_copy(m.state.copy()),
        "state_dict": lambda: of_dict(m.state.state_dict()),
        "evaluation": lambda: anybn.batch_norm(x, m.state).detach().numpy(),
        "numpy": lambda: anybn.batch_norm(x.numpy(), m.state),
        "small": lambda: other(x).detach().numpy(),
        "large": lambda: other(x.expand(20, -1).contiguous()).detach().numpy(),
    }
    stop = threading.Event()

    def train():
        while not stop.is_set():
            for batch in batches:
                m(batch)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            y = readers[reader]()
            assert min(np.abs(y - 4).max(), np.abs(y - 2 / 3).max()) < 1e-3
    finally:
        stop.set()
        thread.join()


def test_a_load_that_fails_changes_nothing():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    good = {"weight": np.ones(4) * 2, "bias": np.ones(4), "running_mean": np.ones(4), "running_var": np.ones(4) * 2}
    m = anybn.torch.BatchNorm1d(4)
    before = [t.tolist() for t in m.state_dict().values()]
    with pytest.raises(anybn.CheckpointError, match=r"num_batches_tracked is 2\*\*63 or more"):
        m.state.load_state_dict(good | {"num_batches_tracked": 2**63})
    with pytest.raises(ValueError, match="num_batches_tracked is 9223372036854775808"):
        m.state.num_batches_tracked = 2**63
    m.bias.data = torch.zeros(1).expand(4)
    with pytest.raises(anybn.CheckpointError, match="nothing was loaded: bias is an expanded view"):
        m.state.load_state_dict(good | {"num_batches_tracked": 1})
    assert [t.tolist() for t in m.state_dict().values()] == before


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(8, 4), (40000, 4)])
def test_a_forward_pass_that_fails_late_changes_nothing(shape, activation):
    torch = pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    m = anybn.torch.BatchNorm1d(4, activation=activation)
    before = buffers(m)
    with torch.inference_mode():
        x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        m(x)
    assert buffers(m) == before

    def refuse(_):
        raise MemoryError

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda a: a), pytest.raises(MemoryError):
        m(torch.randn(shape))
    assert buffers(m) == before
    with torch.autograd.graph.save_on_cpu():
        x = torch.randn(shape, requires_grad=True)
        y = m(x)
    y.square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    anybn.torch.BatchNorm1d(4, activation=activation)(expected).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


# -- many gradients at a time --------------------------------------------------------------------------------------


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
def test_batched_backward(name, training):
    torch = pytest.importorskip("torch", reason="torch: not installed")
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


# -- states and layers that are looked at or copied ----------------------------------------------------------------


def test_states_without_values_have_a_repr():
    jax = pytest.importorskip("jax", reason="jax: not installed")
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


def test_the_state_of_a_module_pickles():
    pytest.importorskip("torch", reason="torch: not installed")
    import anybn.torch

    state = pickle.loads(pickle.dumps(anybn.torch.BatchNorm1d(4).state))
    anybn.batch_norm(np.random.default_rng(0).normal(size=(8, 4)), state, training=True)
    assert state.num_batches_tracked == 1


# -- threads -------------------------------------------------------------------------------------------------------

#: Calls that several threads share, by compiled kernels and by NumPy alone; and what they give.
SHARED = """
    import numpy as np, anybn

    x = np.random.default_rng(0).normal(size=(64, 1 << 14)).astype("f4")
    mask = np.ones(64, bool)

    def compiled():
        return anybn.batch_norm(x, anybn.BatchNormState(1 << 14), training=True)

    def masked():
        return anybn.batch_norm(x, anybn.BatchNormState(1 << 14), training=True, mask=mask)

    def right():
        x64 = x.astype("f8")
        expected = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
        return all(np.abs(call() - expected).max() < 1e-5 for call in (compiled, masked))
"""


def with_calls(code):
    return textwrap.dedent(SHARED) + textwrap.dedent(code)


@pytest.mark.skipif(sys.platform != "linux", reason="limits threads as Linux does")
def test_no_threads_to_be_had():
    """The caller works alone."""
    pytest.importorskip("numba", reason="numba: not installed")
    survives(
        with_calls("""
        import os, resource, threading
        from anybn.kernels.cpu import pool
        anybn.set_num_threads(2)
        assert right()  # what is compiled, and read from disk, is
        if os.getuid() == 0:  # whom the limit does not hold for
            os.setuid(65534)
        helpers = pool._helpers  # which are there yet, and look at it
        pool._renew()  # as in a forked child: there are none
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        anybn.set_num_threads(4)
        try:
            threading.Thread(target=print).start()
        except RuntimeError:
            assert right() and right()
        else:
            raise AssertionError("there is no limit")
        """)
    )


@pytest.mark.parametrize("when", ["at exit", "after the main thread has ended", "first at exit"])
def test_work_while_the_interpreter_ends(when):
    code = {
        "at exit": "import atexit; atexit.register(lambda: print(right())); right()",
        "after the main thread has ended": (
            "import threading\n"
            "def wait_and_work():\n"
            "    threading.main_thread().join()\n"
            "    print(right())\n"
            "threading.Thread(target=wait_and_work).start()"
        ),
        "first at exit": "import atexit; atexit.register(lambda: print(right()))",
    }[when]
    assert survives(with_calls(f"anybn.set_num_threads(3)\n{code}")) == "True\n"


@pytest.mark.parametrize("first", [True, False])
def test_calls_while_objects_die_with_the_interpreter(first):
    """Python may have let go of what a first call needs: what counts is that it ends."""
    survives(
        with_calls(f"""
        class Owner:
            def __del__(self):
                try:
                    print(right())
                except ImportError as error:
                    assert "Python is likely shutting down" in str(error)
        anybn.set_num_threads(3)
        if not {first}:
            right()
        owner = Owner()
        """)
    )


@pytest.mark.parametrize("pause", [0, 0.1], ids=["awake", "asleep"])
@pytest.mark.parametrize("torch", ["", "import torch"])
def test_the_interpreter_ends_while_threads_wait(torch, pause):
    if torch:
        pytest.importorskip("torch", reason="torch: not installed")
    survives(with_calls(f"{torch}\nimport time\nanybn.set_num_threads(3)\nassert right()\ntime.sleep({pause})"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("imports", ["", "import torch; torch.ones(1 << 20).mul(2)"])
@pytest.mark.parametrize("before", ["", "right()"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_children_work_on_threads_of_their_own(imports, before):
    if imports:
        pytest.importorskip("torch", reason="torch: not installed")
    survives(
        with_calls(f"""
        import os, warnings
        warnings.simplefilter("ignore")
        {imports}
        anybn.set_num_threads(3)
        {before}
        child = os.fork()
        if child == 0:
            os._exit(not (right() and right()))
        assert right()
        assert os.waitpid(child, 0)[1] == 0
        """)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_imported_in_a_forked_child():
    """What torch did before the fork, nobody has seen."""
    pytest.importorskip("torch", reason="torch: not installed")
    survives(
        """
        import os, torch
        torch.ones(1 << 20).mul(2)
        child = os.fork()
        if child == 0:
            import numpy as np, anybn
            y = anybn.batch_norm(np.ones((64, 1 << 14), "f4"), anybn.BatchNormState(1 << 14), training=True)
            os._exit(bool(y.any()))
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_torch_says_how_many_threads(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch: not installed")
    before, before_torch = anybn.get_num_threads(), torch.get_num_threads()
    try:
        anybn.set_num_threads(4)
        torch.set_num_threads(1)  # as in a DataLoader's workers
        assert anybn.get_num_threads() == 1
        torch.set_num_threads(3)
        assert anybn.get_num_threads() == 3
        anybn.set_num_threads(2)
        assert anybn.get_num_threads() == 2
    finally:
        torch.set_num_threads(before_torch)
        anybn.set_num_threads(before)


def test_inside_a_parallel_region_the_caller_works_alone():
    pytest.importorskip("torch", reason="torch: not installed")
    openmp = pytest.importorskip("anybn.kernels.cpu.openmp")
    if openmp.team() is None:
        pytest.skip("torch has no OpenMP threads that can be shared here")
    survives(
        with_calls("""
        import ctypes, torch
        from anybn.kernels.cpu import openmp
        torch.set_num_threads(3)
        expected, found, team = compiled(), [], openmp.team()

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def region(_):
            found.append((team.in_parallel(), np.array_equal(compiled(), expected)))

        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(team.parallel)(
            ctypes.cast(region, ctypes.c_void_p), None, 3, 0
        )
        assert found == [(1, True)] * 3, found
        """)
    )


@pytest.mark.parametrize("kind", ["torch's", "own", "NumPy alone"])
def test_small_numbers_are_flushed_by_all_threads_or_none(kind):
    torch = pytest.importorskip("torch", reason="torch: not installed")
    if not torch.set_flush_denormal(False):
        pytest.skip("the processor cannot")
    counts = survives(f"""
        import numpy as np, torch, anybn
        from anybn.backends import numpy as backend
        from anybn.kernels.cpu import chunked, openmp

        x = np.full((64, 1 << 14), 1e-39, "f4")  # in float32, a number with fewer digits
        state = anybn.BatchNormState(1 << 14, eps=1e-30)
        if {kind!r} == "own":
            openmp.team = lambda: None
        if {kind!r} == "NumPy alone":
            backend.kernels = lambda: chunked
        torch.set_num_threads(2)
        torch.ones(1 << 20).mul(2)
        for flush in (False, True, False):
            anybn.set_num_threads(2)
            anybn.batch_norm(x, state)  # threads that were there before
            torch.set_flush_denormal(flush)
            found = set()
            for threads in (1, 2) * 20:
                anybn.set_num_threads(threads)
                y = anybn.batch_norm(x, state)
                found.add(int((y.view("i4") != 0).sum()) / x.size)
            print(*found)
        torch.set_flush_denormal(True)
        anybn.batch_norm(x, state)
        torch.set_flush_denormal(False)
        assert (torch.full((1 << 20,), 1e-39) * 1).all()  # torch's threads are as they were
    """)
    assert counts == "1.0\n0.0\n1.0\n"


# -- compiling -----------------------------------------------------------------------------------------------------


def test_without_compiled_kernels():
    pytest.importorskip("numba", reason="numba: not installed")
    assert survives(with_calls("print(right())"), NUMBA_DISABLE_JIT="1") == "True\n"


def test_float16_for_a_processor_that_does_not_convert_it():
    pytest.importorskip("numba", reason="numba: not installed")
    code = """
        import numpy as np, anybn
        x = np.random.default_rng(0).normal(size=(16, 4)).astype("f2")
        y = anybn.batch_norm(x, anybn.BatchNormState(4), training=True)
        x = x.astype("f8")
        expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        print(np.abs(y - expected).max() < 2e-3)
    """
    assert survives(code, NUMBA_CPU_NAME="generic") == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_compiles(tmp_path):
    pytest.importorskip("numba", reason="numba: not installed")
    survives(
        with_calls("""
        import os, threading, time
        from numba.core.compiler_lock import global_compiler_lock
        compiling = threading.Thread(target=right)
        compiling.start()
        while compiling.is_alive() and not (taken := not global_compiler_lock._lock.acquire(blocking=False)):
            global_compiler_lock._lock.release()
            time.sleep(0.001)
        assert taken
        child = os.fork()
        if child == 0:
            os._exit(not right())
        assert os.waitpid(child, 0)[1] == 0
        compiling.join()
        assert right()
        """),
        NUMBA_CACHE_DIR=str(tmp_path),
    )


# -- other things --------------------------------------------------------------------------------------------------


def test_a_default_device_without_memory():
    torch = pytest.importorskip("torch", reason="torch: not installed")
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


def test_an_interrupted_recalibrate_leaves_no_hook(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch: not installed")
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
