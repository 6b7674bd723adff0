"""recalibrate: the statistics of all the data, whatever the batches; and nothing else changes, on an error nothing."""

import subprocess
import sys

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

SIZES = (100, 4, 57, 0, 1)


def uneven(values, sizes=SIZES):
    return np.split(values, np.cumsum(sizes)[:-1])


def data(shape=(162, 3, 5), mean=1e3):
    return (inputs.normal(shape) * [[[1], [2], [3]]] + mean).astype(np.float32)


def check(state, values, axis=1, dtype="float32"):
    """To two units of x, relative to itself for the variance and to the standard deviation for the mean."""
    expected = oracle.statistics(values, axis)
    mean, var = (np.asarray(a, np.float64) for a in (state.running_mean, state.running_var))
    assert oracle.error(var, expected.var(state.ddof), dtype, size=0) <= 2
    assert oracle.error(mean, expected.mean, dtype, size=np.sqrt(expected.var())) <= 2


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("mean", [0, 1e3, 1e6])
@pytest.mark.parametrize(
    "library", ["numpy", "torch", "jax", "dask", "array_api_strict", "array_api_strict:no_float64"]
)
def test_uneven_batches(library, mean, ddof):
    pytest.importorskip(library.partition(":")[0], reason=f"{library}: not installed")
    backend, device = anybn.backends.registry.resolve_target(library)
    values = data(mean=mean)
    bn = anybn.BatchNorm(3, ddof=ddof, momentum=None)
    bn.state.weight = np.array([1.0, 2.0, 3.0], np.float32)
    weight = bn.state.weight
    assert anybn.recalibrate(bn, (backend.from_numpy(part, device) for part in uneven(values))) is bn
    check(bn.state, values)
    assert bn.state.num_batches_tracked == 4  # one of the five is empty
    assert bn.state.weight is weight
    assert bn.training


@pytest.mark.parametrize("row", list(inputs.ROWS))
def test_float64(row):
    """However far the mean is from 0, variances of parts merge to float64's own accuracy."""
    values = inputs.ROWS[row](inputs.normal((162, 3, 5)))
    state, expected = anybn.recalibrate(anybn.BatchNormState(3), uneven(values)), oracle.statistics(values)
    mean, var = expected.mean.origin + expected.mean.offset, expected.var(1)
    assert oracle.error(state.running_mean, mean, "float64", np.abs(values).max()) <= 1
    assert oracle.error(state.running_var, var, "float64", var) <= 2


def test_other_sources():
    """Channels last, masked parts as moments, parts of different libraries, one array."""
    values = data()
    bn = anybn.recalibrate(anybn.BatchNorm(3, axis=-1), uneven(np.moveaxis(values, 1, -1)))
    check(bn.state, values)

    mask = np.random.default_rng(0).random((162, 5)) < 0.7
    state = anybn.BatchNormState(3)
    pairs = zip(uneven(values), uneven(mask), strict=True)
    anybn.recalibrate(state, (anybn.moments(x, mask=m) for x, m in pairs))
    expected = oracle.statistics(values, mask=mask)
    assert oracle.error(state.running_var, expected.var(1), "float32") <= 2

    torch = pytest.importorskip("torch", reason="torch: not installed")
    first, *rest = uneven(values)
    module = torch.nn.BatchNorm1d(3)
    check(anybn.recalibrate(state, [torch.from_numpy(first), *rest]), values)
    assert state.to("numpy") is state  # it stayed here, whatever came
    anybn.recalibrate(module, [torch.from_numpy(part) for part in uneven(values) if len(part)])
    assert oracle.error(module.running_var.numpy(), oracle.statistics(values).var(1), "float32") <= 2
    assert int(module.num_batches_tracked) == 4


def test_a_dask_array_is_all_the_data():
    da = pytest.importorskip("dask.array", reason="dask: not installed")
    values = data()
    state = anybn.recalibrate(anybn.BatchNormState(3), da.from_array(values, chunks=(50, 2, 5)))
    check(state, values)
    assert isinstance(state.running_mean, np.ndarray)
    mask = np.random.default_rng(0).random((162, 5)) < 0.7
    lazy = anybn.moments(da.from_array(values, chunks=(50, 2, 5)), mask=da.from_array(mask))
    anybn.recalibrate(state, lazy)
    assert oracle.error(state.running_var, oracle.statistics(values, mask=mask).var(1), "float32") <= 2


def test_torch_update_bn_weighs_batches_not_values(torch):
    """Batches of 100 and 4 whose true mean is 0.35: update_bn finds 5.33."""
    rng = np.random.default_rng(0)
    parts = rng.normal(0.0, 1.0, (100, 1)), rng.normal(0.0, 1.0, (4, 1))
    for part, mean in zip(parts, (-0.065, 10.725), strict=True):
        part += mean - part.mean()  # (100 * -0.065 + 4 * 10.725) / 104 = 0.35 and (-0.065 + 10.725) / 2 = 5.33
    batches = [torch.from_numpy(part.astype(np.float32)) for part in parts]
    theirs, ours = (torch.nn.Sequential(torch.nn.BatchNorm1d(1)) for _ in range(2))
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert float(theirs[0].running_mean) == pytest.approx(5.33, abs=0.005)
    anybn.recalibrate(ours, batches)
    everything = torch.cat(batches).numpy()
    assert everything.mean() == pytest.approx(0.35, abs=0.0005)
    assert oracle.error(ours[0].running_mean.numpy(), oracle.statistics(everything).mean, "float32") <= 1
    assert oracle.error(ours[0].running_var.numpy(), oracle.statistics(everything).var(1), "float32", 0.1) <= 1


def test_errors_leave_the_state_alone(monkeypatch):
    values = data()
    state = anybn.BatchNormState(3)
    anybn.batch_norm(values, state, training=True)
    before = inputs.state_values(state)
    bad = values.copy()
    bad[70, 1] = np.nan

    def broken():
        yield values
        raise RuntimeError("no more")

    for batches, error, message in (
        ([], ValueError, "batches gave 0 values per channel; a variance needs more than 1"),
        ([values[:1, :, :1]], ValueError, "batches gave 1 values per channel"),
        ([values, values[:, :2]], ValueError, "x has 2 channels on axis 1 but the state has 3"),
        ([values, anybn.moments(values[:, :2])], ValueError, "a batch's moments are of 2 channels but the state has 3"),
        (None, TypeError, "batches is a NoneType; it must be an iterable"),
        ([values, "x"], TypeError, "a batch is a str, not an array that anybn knows"),
        (uneven(bad), anybn.NonFiniteError, r"NaN or infinite in 1 of 3 channels \(1\)"),
        (broken(), RuntimeError, "no more"),
    ):
        with pytest.raises(error, match=message):
            anybn.recalibrate(state, batches)
        assert inputs.state_values(state) == before
    with pytest.raises(TypeError, match=r"target is a int; it must be an anybn\.BatchNorm"):
        anybn.recalibrate(3, [values])
    with pytest.raises(ValueError, match="one_pass and forward are for models"):
        anybn.recalibrate(state, [values], one_pass=True)
    with pytest.raises(ValueError, match="target has track_running_stats=False"):
        anybn.recalibrate(anybn.BatchNorm(3, track_running_stats=False), [values])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(anybn.BackendNotInstalled, match="progress=True needs tqdm"):
        anybn.recalibrate(state, [values], progress=True)


def test_progress(capsys):
    pytest.importorskip("tqdm", reason="tqdm: not installed")
    anybn.recalibrate(anybn.BatchNormState(3), uneven(data()), progress=True)
    assert "recalibrate" in capsys.readouterr().err


def network(torch, convert=False):
    """Three batch norms, one behind a branch, so that the order of the modules is not the order of the calls."""
    import anybn.torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last = torch.nn.BatchNorm1d(4)
            self.first = torch.nn.BatchNorm2d(3)
            self.conv = torch.nn.Conv2d(3, 5, 3)
            self.branch = torch.nn.BatchNorm2d(5)
            self.dropout = torch.nn.Dropout(0.5)
            self.linear = torch.nn.Linear(5, 4)
            self.unused = torch.nn.BatchNorm1d(2)

        def forward(self, x):
            x = torch.relu(self.conv(self.first(x)))
            x = x + self.branch(input=x)
            return self.last(self.dropout(self.linear(x.mean((2, 3)))))

    torch.manual_seed(0)
    model = Net()
    return anybn.torch.convert(model) if convert else model


def images(torch, cuts=(20, 24, 36)):
    values = (inputs.normal((37, 3, 6, 6)) * 3 + 7).astype(np.float32)
    return [torch.from_numpy(part) for part in np.split(values, cuts)]


def layer_inputs(torch, model, batches):
    """What each batch norm gets in evaluation, in one batch of everything."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):

            def keep(_, args, options, y, name=name):
                seen[name] = (args[0] if args else options["input"]).detach().numpy()

            module.register_forward_hook(keep, with_kwargs=True)
    training = model.training
    with torch.no_grad():
        model.eval()(torch.cat(batches))
    model.train(training)
    return seen


@pytest.mark.parametrize("convert", [False, True])
def test_model_exactly(torch, convert):
    """After it, the statistics of each layer are those of its input in evaluation: the model is calibrated."""
    model, batches = network(torch, convert), images(torch)
    model.branch.eval()
    anybn.recalibrate(model, [(x, "label") for x in batches])
    assert model.training
    assert not model.branch.training
    assert int(model.unused.num_batches_tracked) == 0
    seen = layer_inputs(torch, model, batches)
    assert set(seen) == {"first", "branch", "last"}
    for name, x in seen.items():
        layer, expected = model.get_submodule(name), oracle.statistics(x)
        # Convolutions of another batch size add in another order: a few units of x, beside its deviation.
        assert oracle.error(layer.running_var.numpy(), expected.var(1), "float32", size=0) <= 16
        assert oracle.error(layer.running_mean.numpy(), expected.mean, "float32", np.sqrt(expected.var())) <= 16
        assert int(layer.num_batches_tracked) == 4


def test_model_in_one_pass_is_exact_for_the_first_layer_only(torch):
    model, exact, batches = network(torch), network(torch), images(torch, cuts=(20, 24))
    anybn.recalibrate(exact, batches)
    anybn.recalibrate(model, iter(batches), one_pass=True)
    assert torch.equal(model.first.running_var, exact.first.running_var)
    assert torch.equal(model.first.running_mean, exact.first.running_mean)
    assert not torch.allclose(model.last.running_var, exact.last.running_var, rtol=1e-3)
    assert torch.allclose(model.last.running_var, exact.last.running_var, rtol=0.5)
    # It is what each batch's own normalization makes of the next layer's input.
    single = network(torch)
    hidden = torch.cat([single.conv(single.first(x)).relu().detach() for x in batches])
    expected = oracle.statistics(hidden.numpy()).var(1)
    assert oracle.error(model.branch.running_var.numpy(), expected, "float32", expected) <= 16


def test_model_errors_and_other_ways(torch):
    model, batches = network(torch), images(torch)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def breaks(model, batch):
        if batch.shape[0] == 12 and model.first.num_batches_tracked > 0:  # in the second pass, when one layer is done
            raise KeyboardInterrupt
        return model(batch)

    for options in ({}, {"one_pass": True}):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            anybn.recalibrate(model, [*batches[:2], torch.zeros(2, 3, 1, 1)], **options)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):  # a batch of one, by itself
        anybn.recalibrate(model, batches, one_pass=True)
    with pytest.raises(KeyboardInterrupt):
        anybn.recalibrate(model, batches, forward=breaks)
    with pytest.raises(ValueError, match="batches is an iterator, which can be read once, and 4 batch norms take"):
        anybn.recalibrate(model, iter(batches))
    with pytest.raises(TypeError, match="batches is a int; it must be an iterable"):
        anybn.recalibrate(model, 3)
    with pytest.raises(TypeError, match="forward is a int; it must be a function"):
        anybn.recalibrate(model, batches, forward=3)
    with pytest.raises(ValueError, match="no batch reached a batch norm"):
        anybn.recalibrate(model, [])
    with pytest.raises(ValueError, match="the model has no batch norm"):
        anybn.recalibrate(torch.nn.Linear(1, 1), batches)
    with pytest.raises(ValueError, match="a batch norm of the model is lazy"):
        anybn.recalibrate(torch.nn.LazyBatchNorm1d(), batches)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when torch.compile is imported
def test_compiled_model_and_another_call(torch):
    compiled, model, batches = network(torch), network(torch), images(torch)
    anybn.recalibrate(torch.compile(compiled), [{"x": x} for x in batches], forward=lambda m, batch: m(batch["x"]))
    anybn.recalibrate(model, batches)
    assert torch.equal(compiled.last.running_var, model.last.running_var)


def test_a_layer_called_twice_counts_all_its_inputs(torch):
    norm = torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(norm, torch.nn.Linear(2, 2), norm)
    batches = [torch.from_numpy(part.astype(np.float32)) for part in np.split(inputs.normal((9, 2)) + 5, [6])]
    everything = torch.cat(batches)
    with torch.no_grad():
        norm.eval()
        both = torch.cat([everything, model[1](norm(everything))])
    anybn.recalibrate(model, batches)
    assert oracle.error(norm.running_var.numpy(), oracle.statistics(both.numpy()).var(1), "float32", 1) <= 8


def test_a_model_of_somebody_who_never_imports_anybn_torch(torch):
    code = (
        "import sys, torch, anybn\n"
        "norm = torch.nn.BatchNorm1d(1)\n"
        "assert 'anybn.torch' not in sys.modules\n"
        "anybn.recalibrate(norm, [torch.tensor([[1.0], [3.0]])])\n"
        "print(*norm.running_mean.tolist(), *norm.running_var.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2.0 2.0\n"
