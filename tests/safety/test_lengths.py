"""Arrays of the wrong length, which compiled code would read beyond."""

import numpy as np
import pytest

import anybn
from anybn import norms, variants
from safety import survives

SHRINK = {
    "assigned": "m.running_mean, m.running_var = m.running_mean[:3].clone(), m.running_var[:3].clone()",
    "resized": "m.running_mean.resize_(3)",
    "data": "m.running_var.data = torch.ones(3, dtype=torch.float64)",
    "weight": "m.weight.data = torch.ones(3)",
    "longer": "m.bias.data = torch.ones(5000)",
    "two axes": "m.weight.data = torch.ones(4096, 1)",
}


@pytest.mark.parametrize("how", SHRINK)
def test_arrays_of_the_wrong_length_in_a_module(torch, how):
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


def test_arrays_of_the_wrong_length_in_a_compiled_module(torch):
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
