"""Nothing is left half done."""

import sys

import numpy as np
import pytest

import anybn
from anybn import _lock


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
def test_modules_are_atomic_under_interrupts(torch, way):
    import anybn.torch

    assert interrupted_everywhere(lambda: anybn.torch.BatchNorm1d(4), WAYS[way], buffers) > 5


@pytest.mark.parametrize("kind", ["states", "modules", "both"])
def test_accumulate_is_atomic_under_interrupts(torch, kind):
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
def test_no_torn_reads_beside_a_thread_that_trains(torch, reader):
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


def test_a_load_that_fails_changes_nothing(torch):
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
def test_a_forward_pass_that_fails_late_changes_nothing(torch, shape, activation):
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
