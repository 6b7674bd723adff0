"""What crashed, went wrong silently or was left half done, once: each with what was done to it."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import anybn
from anybn import norms, variants


def survives(code):
    """The code ends without an error in a process of its own, which it may kill."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


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
    assert m.running_mean.dtype is getattr(torch, dtype)
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
    torch = pytest.importorskip("torch", reason="torch: not installed")
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
                    except ValueError as error:
                        assert "has no memory: its storage was freed" in str(error), error
                    else:
                        raise AssertionError((shape, name, training))
                    assert int(m.num_batches_tracked) == 0
        x = torch.randn(8, 64)
        x.untyped_storage().resize_(0)
        for call in (anybn.moments, norms.layer_norm):
            try:
                call(x)
            except ValueError as error:
                assert "has no memory" in str(error), error
    """)
    assert torch
