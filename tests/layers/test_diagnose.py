"""diagnose: its numbers are distances of y as the oracle makes it; causes are told apart; nothing changes."""

import json
import sys

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs, oracle

SIZES = (64, 4, 57, 0, 2)


def uneven(values, sizes=SIZES):
    return np.split(values, np.cumsum(sizes)[:-1])


def data(n=127, seed=0, mean=0.0, std=1.0):
    spread = np.array([1.0, 2.0, 0.1])[:, None]
    return (inputs.normal((n, 3, 5), seed) * spread * std + np.array([3.0, -20.0, 1e3])[:, None] + mean).astype(
        "float32"
    )


def trained_state():
    state = anybn.BatchNormState(3, eps=1e-3, momentum=0.3)
    state.running_mean = np.array([2.5, -19.0, 1e3])
    state.running_var = np.array([1.5, 2.0, 0.02])
    state.weight, state.bias = np.array([1.0, -2.0, 0.5], "float32"), np.array([0.0, 1.0, -1.0], "float32")
    state.num_batches_tracked = 40
    return state


def y_by(parts, statistics, eps, masks=None):
    """y of every batch, normalized with what ``statistics(batch, mask)`` gives: (C, all values), in long double."""
    masks = masks or [None] * len(parts)
    rows = []
    for x, mask in zip(parts, masks, strict=True):
        if x.size:
            y = oracle.normalize(x, *statistics(x, mask), eps=eps)
            rows.append(oracle.selected(y, 1, mask))
    return np.concatenate(rows, axis=1)


def expected(parts, state, training=None, masks=None):
    """gap, noise, apart and shift of each channel: root mean squares of differences of y."""
    whole_mask = None if masks is None else np.concatenate(masks)

    def of_all(parts, mask=None):
        s = oracle.statistics(np.concatenate(parts), mask=mask)
        return s.mean, s.var(state.ddof)

    def of_batch(x, mask):
        s = oracle.statistics(x, mask=mask)
        return s.mean, s.var()

    def rms(a, b):
        return np.sqrt(((a - b) ** 2).mean(1)).astype(float)

    running = y_by(parts, lambda *_: (state.running_mean, state.running_var), state.eps, masks)
    population = y_by(parts, lambda *_: of_all(parts, whole_mask), state.eps, masks)
    own = y_by(parts, of_batch, state.eps, masks)
    b = sum(1 for x in parts if x.size)
    found = {"gap": rms(running, population), "apart": rms(own, running)}
    found["noise"] = rms(own, population) * np.sqrt(b / (b - 1))
    if training is not None:
        found["shift"] = rms(y_by(parts, lambda *_: of_all(training), state.eps), population)
    return found


def check(layer, wanted, rtol=1e-9):
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(layer, name), values, rtol=rtol, err_msg=name)


@pytest.mark.parametrize(
    "library", ["numpy", "torch", "jax", "dask", "array_api_strict", "array_api_strict:no_float64"]
)
def test_the_numbers_are_distances_of_y(library):
    pytest.importorskip(library.partition(":")[0], reason=f"{library}: not installed")
    backend, device = anybn.backends.registry.resolve_target(library)
    parts, training = uneven(data()), uneven(data(seed=1, mean=0.5, std=1.3))
    state = trained_state()

    def there(parts):
        return (backend.from_numpy(part, device) for part in parts)

    report = anybn.diagnose(state, there(parts), training_batches=there(training))
    layer = report.layers[""]
    check(layer, expected(parts, state, training))
    assert (layer.batches, layer.values.tolist(), layer.updates) == (4, [635] * 3, 40)
    whole = oracle.statistics(np.concatenate(parts))
    np.testing.assert_allclose(layer.var, whole.var(1).astype(float), rtol=1e-9)
    assert layer.leftover == pytest.approx(0.7**40)
    assert layer.averaging == pytest.approx(np.sqrt(np.mean(layer.noise**2) * 0.3 / 1.7))
    assert [f.cause for f in report.findings if "data" in f.cause] == ["shifted data"]


def test_a_layer_has_its_axis_and_moments_have_no_range():
    parts, state = uneven(data()), trained_state()
    bn = anybn.BatchNorm(3, axis=-1, state=state)
    check(anybn.diagnose(bn, [np.moveaxis(x, 1, -1) for x in parts]).layers[""], expected(parts, state))
    check(anybn.diagnose(state, [np.moveaxis(x, 1, -1) for x in parts], axis=-1).layers[""], expected(parts, state))
    layer = anybn.diagnose(state, [anybn.moments(x) for x in parts]).layers[""]
    check(layer, expected(parts, state))
    assert not layer.saturated.any()
    assert np.isnan(layer.unlike)


def test_values_that_are_not_finite_are_left_out():
    parts = uneven(data())
    parts[2][5, 1, 0] = np.nan
    state = trained_state()
    report = anybn.diagnose(state, parts)
    layer = report.layers[""]
    assert layer.nonfinite.tolist() == [0, 1, 0]
    assert layer.values.tolist() == [635, 350, 635]
    others = expected([parts[0], parts[1], parts[4]], state)
    assert layer.gap[1] == pytest.approx(others["gap"][1])
    assert layer.noise[1] == pytest.approx(others["noise"][1])
    (finding,) = (f for f in report.findings if f.cause == "not finite")
    assert finding.channels == (1,)
    assert "1 of 3 channels (1) have a NaN or an infinity in up to 1 of 4 batches" in finding.what


# -- causes ----------------------------------------------------------------------------------------------------


def batches_of(size, number, *, channels=8, mean=2.0, std=3.0, seed=0, between=0.0):
    """``between``: how much the means of batches differ beyond chance."""
    rng = np.random.default_rng(seed)
    return [rng.normal(mean + between * rng.normal(size=channels), std, (size, channels)) for _ in range(number)]


def trained(batches, *, updates=200, momentum=0.1, **options):
    bn = anybn.BatchNorm(batches[0].shape[1], momentum=momentum, **options)
    for i in range(updates):
        bn(batches[i % len(batches)])
    return bn


LARGE = batches_of(512, 8)


def constant_channel(batches, value):
    return [np.concatenate([np.full((len(x), 1), value), x[:, 1:]], axis=1) for x in batches]


def biased(bias):
    bn = trained(LARGE)
    bn.state.bias = np.array([bias] + [0] * 7, "float32")
    return bn


def spoilt():
    bn = trained(LARGE)
    anybn.batch_norm(np.where(np.arange(8) == 3, np.nan, LARGE[0]), bn.state, training=True, nonfinite="propagate")
    return bn


CAUSES = {
    "healthy": (lambda: trained(LARGE), LARGE, {}, []),
    "not trained": (lambda: anybn.BatchNorm(8), LARGE, {}, ["no updates"]),
    "ten updates": (lambda: trained(LARGE, updates=10), LARGE, {}, ["too few updates"]),
    "slow": (lambda: trained(LARGE, updates=200, momentum=1e-3), LARGE, {}, ["too few updates"]),
    "noisy average": (lambda: trained(batches_of(24, 64), momentum=0.9), batches_of(24, 64), {}, ["momentum"]),
    "batches of four": (
        lambda: trained(batches_of(4, 400), momentum=0.01, updates=1000),
        batches_of(4, 400),
        {},
        ["small batches"],
    ),
    "other data": (lambda: trained(LARGE), batches_of(512, 8, mean=4), {}, ["shifted or stale"]),
    "other data, with training": (
        lambda: trained(LARGE),
        batches_of(512, 8, mean=4),
        {"training_batches": LARGE},
        ["shifted data"],
    ),
    "stale": (lambda: trained(batches_of(512, 8, std=2)), LARGE, {"training_batches": LARGE}, ["stale"]),
    "sorted": (
        lambda: trained(batches_of(256, 40, between=0.9), momentum=0.01, updates=2000),
        batches_of(256, 40, between=0.9),
        {},
        ["unlike batches"],
    ),
    "constant input": (
        lambda: trained(constant_channel(LARGE, 7.0)),
        constant_channel(LARGE, 7.0),
        {},
        ["dead channels"],
    ),
    "large bias": (lambda: biased(20.0), LARGE, {}, ["saturated channels"]),
    "NaN learnt": (spoilt, LARGE, {}, ["not finite"]),
}


@pytest.mark.parametrize("name", list(CAUSES))
def test_causes_are_told_apart(name):
    make, batches, options, causes = CAUSES[name]
    report = anybn.diagnose(make(), batches, **options)
    assert [f.cause for f in report.findings] == causes
    assert all(cause in str(report) for cause in causes)
    assert all(f.remedy in str(report) for f in report.findings)


def test_a_channel_that_relu_closes_is_dead():
    bn = biased(-20.0)
    assert [f.cause for f in anybn.diagnose(bn, LARGE).findings] == ["saturated channels"]
    bn.activation = "relu"
    (finding,) = anybn.diagnose(bn, LARGE).findings
    assert (finding.cause, finding.channels) == ("dead channels", (0,))


def test_what_mends_it_does():
    """recalibrate closes the gap; the updates and the momentum that are named leave a hundredth of the start."""
    bn = trained(LARGE, updates=10)
    (finding,) = anybn.diagnose(bn, LARGE).findings
    assert finding.remedy == "recalibrate, make 44 updates, or use momentum=0.37 or None"
    assert 0.9**44 < 0.01 < 0.9**43
    assert abs((1 - 0.37) ** 10 - 0.01) < 1e-3
    for better in (trained(LARGE, updates=44), trained(LARGE, updates=10, momentum=0.37)):
        assert not anybn.diagnose(better, LARGE).findings
    layer = anybn.diagnose(anybn.recalibrate(bn, LARGE), LARGE).layers[""]
    assert np.abs(layer.gap).max() < 1e-12


def test_noise_of_a_moving_average():
    """Over many trainings, the gap is what ``averaging`` says; with the momentum that is named, half of the bound."""
    batches = batches_of(16, 2000, channels=64)
    layer = anybn.diagnose(trained(batches[:500], momentum=0.5, updates=500), batches).layers[""]
    # 64 channels: the root mean square of so many has a relative error of 1 / sqrt(2 * 64) = 0.09; three of these.
    assert np.sqrt(np.mean(layer.gap**2)) == pytest.approx(layer.averaging, rel=0.27)
    # Of 16 normal values: sqrt(1 / 16 + 1 / 32) for many; more for so few, whose deviation is low on average.
    assert np.sqrt(np.mean(layer.noise**2)) == pytest.approx((1.5 / 16) ** 0.5, rel=0.1)
    (finding,) = (
        f for f in anybn.diagnose(trained(batches[:500], momentum=0.9), batches).findings if f.cause == "momentum"
    )
    better = float(finding.remedy.rpartition("momentum=")[2])
    layer = anybn.diagnose(trained(batches, momentum=better, updates=1000), batches).layers[""]
    assert layer.averaging == pytest.approx(0.05, rel=0.05)


# -- nets ------------------------------------------------------------------------------------------------------


def test_a_net_of_plain_layers():
    """Layers behind each other see what training shows them, with their masks, and are left as they were."""
    layers = {"first": anybn.BatchNorm(3, eps=1e-3), "second": anybn.BatchNorm(3, group=object_group())}
    layers["second"].eval()
    state = layers["first"].state
    parts = [x for x in uneven(data()) if x.size]
    masks = [np.random.default_rng(0).random((len(x), 5)) < 0.7 for x in parts]
    before = {name: inputs.state_values(layer.state) for name, layer in layers.items()}
    seen = []

    def forward(layers, batch):
        x, mask = batch
        y = layers["first"](x, mask=mask)
        seen.append(np.tanh(y))
        layers["second"](seen[-1])

    report = anybn.diagnose(layers, list(zip(parts, masks, strict=True)), forward=forward)
    check(report.layers["first"], expected(parts, state, masks=masks))
    check(report.layers["second"], expected(seen, layers["second"].state))
    assert {name: inputs.state_values(layer.state) for name, layer in layers.items()} == before
    assert (layers["first"].training, layers["second"].training) == (True, False)
    assert layers["second"].group is not None
    assert "first: " in str(report)
    with pytest.raises(ZeroDivisionError):
        anybn.diagnose(layers, parts, forward=lambda layers, batch: layers["first"](batch) / (1 // 0))
    layers["first"](parts[0])
    assert state.num_batches_tracked == 1  # it learns again


def object_group():
    class Alone:
        rank, size = 0, 1

        def all_reduce_sum(self, array):
            raise AssertionError("a diagnosis is a process's own")

    return Alone()


def test_states_of_a_jax_function(jax):
    states = {"in": trained_state(), "out": trained_state()}
    place = {name: type(state.running_mean) for name, state in states.items()}
    parts, seen = [x for x in uneven(data()) if x.size], []

    def forward(states, x):
        y = anybn.batch_norm(jax.numpy.asarray(x), states["in"], training=True, activation="relu")
        seen.append(np.asarray(y))
        return anybn.batch_norm(y, states["out"], training=True)

    report = anybn.diagnose(states, parts, forward=forward)
    check(report.layers["in"], expected(parts, states["in"]))
    check(report.layers["out"], expected(seen, states["out"]))
    assert {name: type(state.running_mean) for name, state in states.items()} == place


def network(torch, convert=False):
    import anybn.torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3, eps=1e-3)
    )
    model.add_module("unused", torch.nn.Identity())
    model.unused.norm = torch.nn.BatchNorm2d(2)
    return anybn.torch.convert(model) if convert else model


@pytest.mark.parametrize("convert", [False, True])
def test_a_torch_model(torch, convert):
    model = network(torch, convert)
    model[3].eval()
    parts = [x for x in uneven(data()) if x.size]
    batches = [(torch.from_numpy(x), "label") for x in parts]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = anybn.diagnose(model, batches)
    assert list(report.layers) == ["0", "3"]  # nothing reaches the third
    own = torch.nn.BatchNorm1d(3).train()
    hidden = [torch.relu(own(torch.from_numpy(x))).detach().numpy() for x in parts]
    for name, shown in (("0", parts), ("3", hidden)):
        state = anybn.BatchNormState(3, eps=model[int(name)].eps)
        # of the hidden layer, torch rounds to float32 what is compared here
        check(report.layers[name], expected(shown, state), rtol=1e-9 if name == "0" else 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model[3].training) == (True, False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {(f.layer, f.cause) for f in report.findings} >= {("0", "no updates"), ("3", "no updates")}


def test_the_score_says_what_evaluation_gains(torch):
    model = network(torch)
    x = torch.from_numpy(data())
    batches, others = list(x.split(32)), list((x + 1).split(32))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def score(model, batch):
        y = model(batch)
        return (y.mean() ** 2 + (y.var() - 1) ** 2).item()

    found = anybn.diagnose(model, others, training_batches=batches, score=score).score
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def average():
        with torch.no_grad():
            return sum(score(model, batch) for batch in others) / len(others)

    model.eval()
    assert found["running"] == pytest.approx(average(), rel=1e-5)
    anybn.recalibrate(model, batches, one_pass=True)
    assert found["recalibrated"] == pytest.approx(average(), rel=1e-5)
    for layer in (model[0], model[3]):
        layer.running_mean = layer.running_var = None
    assert found["batch"] == pytest.approx(average(), rel=1e-5)
    assert found["batch"] < found["recalibrated"] < found["running"]


# -- the report ------------------------------------------------------------------------------------------------


def test_the_report_as_data():
    parts = uneven(data())
    parts[0][0, 0, 0] = np.nan
    report = anybn.diagnose(trained_state(), parts)
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    layer = report.layers[""]
    assert read["layers"][""]["gap"] == pytest.approx(np.sqrt(np.mean(layer.gap**2)))
    assert read["layers"][""]["channels"]["noise"] == pytest.approx(layer.noise.tolist())
    assert read["layers"][""]["channels"]["nonfinite"] == [1, 0, 0]
    assert read["layers"][""]["shift"] is None
    assert [f["cause"] for f in read["findings"]] == [f.cause for f in report.findings]
    assert read["score"] is None
    assert repr(report) == f"Diagnosis of 1 layers, {len(report.findings)} findings: print it"
    single = anybn.diagnose(trained_state(), parts[2])
    assert np.isnan(single.layers[""].noise).all()
    assert "  -  " in str(single)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_picture(ending, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib: not installed")
    report = anybn.diagnose(trained_state(), uneven(data()))
    path = tmp_path / f"report.{ending}"
    figure = report.plot(path)
    assert path.stat().st_size > 1000
    above, below = figure.axes
    layer, state = report.layers[""], trained_state()
    dots = np.ma.getdata(above.collections[0].get_offsets())[:, 1]
    np.testing.assert_allclose(dots, (layer.mean - state.running_mean) / np.sqrt(state.running_var + state.eps))
    dots = np.ma.getdata(below.collections[0].get_offsets())[:, 1]
    np.testing.assert_allclose(dots, np.sqrt((layer.var + state.eps) / (state.running_var + state.eps)))


def test_errors(monkeypatch):
    state, parts = trained_state(), uneven(data())
    bn = anybn.BatchNorm(3)
    for arguments, options, error, message in (
        ((3, parts), {}, TypeError, r"target is a int; it must be an anybn\.BatchNorm"),
        (({"a": 3}, parts), {"forward": print}, TypeError, r"target\['a'\] is a int"),
        (({"a": bn}, parts), {}, ValueError, r"forward\(layers, batch\) runs a net"),
        ((state, parts), {"forward": print}, ValueError, r"forward\(layers, batch\) runs a net"),
        (({"a": bn}, parts), {"forward": lambda *_: None}, ValueError, "no batch reached a batch norm"),
        ((state, []), {}, ValueError, "no batch reached a batch norm"),
        ((state, parts), {"score": len}, ValueError, "score is for models"),
        ((bn, parts), {"axis": -1}, ValueError, "axis is for states"),
        ((state, [parts[0][:, :2]]), {}, ValueError, "x has 2 channels on axis 1 but the state has 3"),
        ((anybn.BatchNorm(3, track_running_stats=False), parts), {}, ValueError, "track_running_stats=False"),
    ):
        with pytest.raises(error, match=message):
            anybn.diagnose(*arguments, **options)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(anybn.BackendNotInstalled, match="progress=True needs tqdm"):
        anybn.diagnose(state, parts, progress=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(anybn.BackendNotInstalled, match="plot needs matplotlib"):
        anybn.diagnose(state, parts).plot()


def test_errors_of_models(torch):
    model, x = network(torch), torch.from_numpy(data())
    with pytest.raises(ValueError, match="the model has no batch norm with running statistics"):
        anybn.diagnose(torch.nn.Linear(1, 1), [x])
    with pytest.raises(ValueError, match="batches is an iterator, which can be read once, and score reads it"):
        anybn.diagnose(model, iter([x]), score=lambda *_: 0.0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        anybn.diagnose(model, [x[:1, :, 0]])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
