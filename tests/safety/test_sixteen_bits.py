"""Running statistics that a checkpoint or a cast has made float16 or bfloat16."""

import numpy as np
import pytest

import anybn


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
def test_running_statistics_in_16_bits(torch, dtype, change, call):
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


def test_export_of_running_statistics_in_16_bits(torch):
    import anybn.torch

    m, x = anybn.torch.BatchNorm1d(4).eval(), torch.randn(8, 4) * 3 + 5
    in_place(torch, m.train(), torch.bfloat16)
    m(x)
    m.eval()
    torch.testing.assert_close(torch.export.export(m, (x,), strict=False).module()(x), m(x))
