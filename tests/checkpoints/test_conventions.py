"""Other frameworks' conventions: the frameworks themselves where installed, what they were seen to do elsewhere.

`frameworks.json` holds what each made of the same layer and batches, see `frameworks.py`; chainer and mxnet, which no
longer run beside a current NumPy, are only there.
"""

import json
import math

import frameworks
import numpy as np
import pytest

import anybn
from anybn import interop
from anybn.conformance import inputs

RECORD = json.loads(frameworks.RECORD.read_text())
X, *STEPS = frameworks.batches()
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


@pytest.fixture(params=["recorded", "live"], scope="module")
def source(request):
    return request.param


@pytest.fixture(params=frameworks.RUN, scope="module")
def convention(request):
    return request.param


@pytest.fixture(scope="module")
def seen(source, convention):
    """What the framework did with its own layer, with `frameworks.start`, and with that after training it."""
    if source == "recorded":
        return RECORD[convention]
    if not frameworks.installed(convention):
        pytest.skip(f"{convention}: not installed, pip install {frameworks.RUN[convention][0]}")
    return frameworks.observe(convention, RECORD[convention]["given"])


def state_of(seen, arrays, convention):
    return interop.from_state_dict(
        {name: frameworks.as_array(a) for name, a in arrays.items()}, convention, **seen["given"]["eps and momentum"]
    )


def assert_same_evaluation(state, y):
    """To a few roundings of float32; some frameworks make it x * scale + shift, of numbers up to 10 times as large."""
    ours = anybn.batch_norm(X.astype(np.float64), state)
    assert np.abs(ours - y).max() <= 10 * 2**-23 * np.abs(ours).max()


def assert_same_statistics(state, mean, var):
    """The sums and averages that the frameworks take in float32, Haiku and Flax from squares."""
    assert np.allclose(state.running_mean, mean, rtol=1e-6, atol=0)
    assert np.allclose(state.running_var, var, rtol=3e-6, atol=0)


def test_a_state_is_written_as_it_was_given_to_the_frameworks(convention):
    given = json.loads(json.dumps(frameworks.given(convention)))
    assert given == RECORD[convention]["given"]
    assert list(given["arrays"]) == list(RECORD[convention]["given"]["arrays"])  # in their order too


@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict", "dask"])
def test_a_state_is_written_where_it_lies(convention, library):
    pytest.importorskip(library, reason=f"{library}: not installed")
    state = frameworks.start(convention).to(library)
    arrays = state.state_dict(convention)
    for name, given in RECORD[convention]["given"]["arrays"].items():
        assert type(arrays[name]) is type(state.running_mean)
        assert np.array_equal(np.asarray(arrays[name]), given)
    back = anybn.BatchNormState(3, momentum=0.25).to(library)
    back.load_state_dict(arrays, convention)
    assert type(back.running_mean) is type(state.running_mean)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert np.array_equal(np.asarray(getattr(back, name)), np.asarray(getattr(state, name)))
    assert inputs.state_values(
        interop.from_state_dict(arrays, convention, **RECORD[convention]["given"]["eps and momentum"])
    ) == inputs.state_values(back)


def test_a_layer_trained_there_evaluates_the_same_here(seen, convention):
    state = state_of(seen, seen["own"]["arrays"], convention)
    assert (state.eps, state.momentum) == (2.0**-7, 0.25)
    assert_same_evaluation(state, seen["own"]["y"])


def test_it_goes_back_as_it_came(seen, convention):
    arrays = seen["own"]["arrays"]
    back = state_of(seen, arrays, convention).state_dict(convention)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        tolerance = 1e-6 if "hidden" in name or "batch_state" in name else 0  # multiplied by what it was divided by
        assert np.allclose(back[name], np.reshape(array, np.shape(back[name])), rtol=tolerance, atol=0), name


def trained_as_there(convention, momentum, steps):
    """(mean, var) of batches, by the ddof and momentum of a convention.

    Those that fill or debias their averages weigh the first batches more: momentum (1 - decay) / (1 - decay**i).
    """
    decay = 1 - momentum
    state = anybn.BatchNormState(3, momentum=momentum, ddof=interop.CONVENTIONS[convention].ddof)
    for i, batch in enumerate(steps, 1):
        if convention in ("haiku", "equinox"):
            state.momentum = min(1, momentum / (1 - decay**i))
        elif convention == "equinox-ema":
            state.momentum = 1 if i == 1 else momentum
        anybn.batch_norm(batch.astype(np.float64), state, training=True)
    var = state.running_var
    if convention == "equinox":  # its variance starts at 1, which it does not take out again
        var = var + decay ** len(steps) / (1 - decay ** len(steps))
    return state.running_mean, var


def test_its_statistics_are_what_this_ddof_and_momentum_make_of_the_same_batches(seen, convention):
    theirs = state_of(seen, seen["own"]["arrays"], convention)
    assert_same_statistics(theirs, *trained_as_there(convention, 0.25, STEPS))


def test_the_defaults_are_the_frameworks(seen, convention):
    """On batches so small that eps shows: what is within a few roundings for 1e-5 is not for 2e-5."""
    arrays = {name: frameworks.as_array(a) for name, a in seen["by default"]["arrays"].items()}
    state = interop.from_state_dict(arrays, convention)
    steps = [batch * frameworks.SMALL for batch in STEPS]
    mean, var = trained_as_there(convention, state.momentum, steps)
    # Haiku and Equinox divide by 1 - decay**2 in float32, where it has lost digits.
    lost = 1 / (1 - (1 - state.momentum) ** 2) if convention in ("haiku", "equinox") else 1
    assert np.allclose(state.running_mean, mean, rtol=1e-6 * lost, atol=0)
    assert np.allclose(state.running_var, var, rtol=3e-6 * lost, atol=0)
    y = (X.astype(np.float64) * frameworks.SMALL - state.running_mean) / np.sqrt(state.running_var + state.eps)
    assert np.abs(y - seen["by default"]["y"]).max() <= 10 * 2**-23 * lost * np.abs(y).max()


def test_equinoxs_default_eps():
    """Which a young average hides: its variance starts at 1 and is divided by 0.02."""
    equinox = pytest.importorskip("equinox", reason="equinox: not installed, pip install equinox")
    layer = equinox.nn.BatchNorm(3, "batch", mode="batch")
    assert interop.CONVENTIONS["equinox"].eps == ("eps", layer.eps)
    assert interop.CONVENTIONS["equinox"].momentum == ("momentum", layer.momentum)


def test_a_state_evaluates_the_same_there(seen, convention):
    start = frameworks.start(convention)
    assert_same_evaluation(start, seen["evaluated"]["y"])
    same = state_of(seen, seen["evaluated"]["arrays"], convention)
    counted = same.num_batches_tracked
    same.num_batches_tracked = 0
    assert inputs.state_values(same) == inputs.state_values(start)
    assert counted == (131 if convention in ("haiku", "equinox") else 0)  # 0.75**131 < 2**-54


def test_and_training_goes_on_the_same(seen, convention):
    state = frameworks.start(convention)
    for batch in STEPS:
        anybn.batch_norm(batch.astype(np.float64), state, training=True)
    theirs = state_of(seen, seen["trained on"]["arrays"], convention)
    assert_same_statistics(theirs, state.running_mean, state.running_var)
    assert_same_evaluation(theirs, seen["trained on"]["y"])


# -- what no framework is needed for ---------------------------------------------------------------------------


def arrays_of(convention, **changes):
    return frameworks.start(convention).state_dict(convention) | changes


def test_load_state_dict_keeps_the_settings(convention):
    state = anybn.BatchNormState(3, eps=0.5, momentum=0.25, ddof=1, dtype="float64")
    state.load_state_dict(arrays_of(convention), convention)
    assert (state.eps, state.momentum, state.ddof, state.dtype) == (0.5, 0.25, 1, "float64")
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert np.array_equal(getattr(state, name), getattr(frameworks.start(convention), name))


def test_nested_as_the_frameworks_have_them():
    flax = arrays_of("flax")
    nested = {
        "params": {"scale": flax["scale"], "bias": flax["bias"]},
        "batch_stats": {"mean": flax["mean"], "var": flax["var"]},
    }
    assert np.array_equal(interop.from_state_dict(nested, "flax").running_mean, [0.5, 3, -7])
    assert np.array_equal(interop.from_state_dict(nested, "flax-linen").running_mean, [0.5, 3, -7])
    equinox = arrays_of("equinox")
    averages = equinox.pop("batch_state_index/0"), equinox.pop("batch_state_index/1")
    state = interop.from_state_dict({**equinox, "batch_state_index": averages}, "equinox", momentum=0.75)
    assert np.array_equal(state.running_var, [0.125, 4, 16])
    haiku = {name: a[None, :, None, None] if a.ndim else a for name, a in arrays_of("haiku").items()}
    assert np.array_equal(interop.from_state_dict(haiku, "haiku").running_var, [0.125, 4, 16])


@pytest.mark.parametrize("convention", ["torch", "keras", "flax", "flax-linen", "haiku", "chainer"])
def test_weight_or_bias_alone(convention):
    """A state has what the layer has, no more, and gives it back; its framework makes the same of it, live."""
    rules, start = interop.CONVENTIONS[convention], frameworks.start(convention)
    for quantity, other, neutral in (("weight", "bias", 0), ("bias", "weight", 1)):
        arrays = {n: a for n, a in arrays_of(convention).items() if rules.names[n] != other}
        loaded = anybn.BatchNormState(3)
        if convention != "torch":  # whose keys are all there, or it is another layer
            loaded.load_state_dict(arrays, convention)
            assert np.array_equal(getattr(loaded, other), [neutral] * 3)
        state = interop.from_state_dict(arrays, convention, **RECORD[convention]["given"]["eps and momentum"])
        assert getattr(state, other) is None
        assert np.array_equal(getattr(state, quantity), getattr(start, quantity))
        back = state.state_dict(convention)
        assert list(back) == list(arrays)
        if (convention, quantity) == ("torch", "bias"):
            with pytest.raises(ValueError, match="state has scale=False, but torch's layers with a bias have a weight"):
                interop.settings(state, convention)
        elif frameworks.installed(convention):
            settings = interop.settings(state, convention)
            kept, y = frameworks.RUN[convention][1](settings, {n: np.asarray(a) for n, a in back.items()}, [], X)
            assert sorted(kept) == sorted(back)
            assert_same_evaluation(state, y)


@pytest.mark.parametrize("convention", ["mlx", "equinox"])
def test_weight_and_bias_come_together_where_one_setting_switches_them(convention):
    arrays = arrays_of(convention)
    del arrays["bias"]
    with pytest.raises(anybn.CheckpointError, match="missing key 'bias'"):
        interop.from_state_dict(arrays, convention)


def test_affine_off(convention):
    state = anybn.BatchNormState(3, affine=False, momentum=0.25)
    arrays = state.state_dict(convention)
    back = interop.from_state_dict(arrays, convention)
    always = convention in ("onnx", "mxnet", "mxnet-fix-gamma")
    assert back.affine == always
    again = anybn.BatchNormState(3, affine=False, momentum=0.25)
    again.load_state_dict(arrays, convention)
    if always:
        arrays[next(n for n, q in interop.CONVENTIONS[convention].names.items() if q == "bias")] += 1
        with pytest.raises(anybn.CheckpointError, match="bias is not 0, but the state has affine=False"):
            again.load_state_dict(arrays, convention)


def test_no_running_statistics(convention):
    state = anybn.BatchNormState(3, track_running_stats=False)
    if convention in ("torch", "mlx"):
        back = interop.from_state_dict(state.state_dict(convention), convention)
        assert not back.track_running_stats
        assert interop.settings(state, convention)["track_running_stats"] is False
        return
    for call in (state.state_dict, lambda c: interop.settings(state, c), lambda c: state.load_state_dict({}, c)):
        with pytest.raises(ValueError, match=f"track_running_stats=False, but {convention} always has running stat"):
            call(convention)


def test_a_cumulative_average_has_a_setting_in_torch_only(convention):
    state = anybn.BatchNormState(3, momentum=None)
    if convention == "torch":
        assert interop.settings(state, convention)["momentum"] is None
        return
    with pytest.raises(ValueError, match="momentum is None, the average over all batches, which this convention has"):
        interop.settings(state, convention)


def test_fixed_gamma():
    state = frameworks.start("mxnet")
    with pytest.raises(ValueError, match="weight is not 1 everywhere"):
        state.state_dict("mxnet-fix-gamma")
    arrays = arrays_of("mxnet-fix-gamma", gamma=np.array([7, 8, 9], np.float32))
    assert np.array_equal(interop.from_state_dict(arrays, "mxnet-fix-gamma").weight, [1, 1, 1])
    assert np.array_equal(interop.from_state_dict(arrays, "mxnet").weight, [7, 8, 9])


def test_debiasing_by_hand():
    """One batch of mean 8 and variance 4 with decay 0.75: hidden 2 and 1, which stand for 8 and 4."""
    hidden = {f"batch_state_index/{i}": np.array([v]) for i, v in enumerate((2.0, 1.0))}
    arrays = {"batch_counter": 1, **hidden}
    state = interop.from_state_dict(arrays, "equinox", momentum=0.75)
    assert (state.running_mean, state.running_var, state.num_batches_tracked) == ([8], [4], 1)
    assert {name: float(a.squeeze()) for name, a in state.state_dict("haiku").items()} == {
        "~/mean_ema/average": 8,
        "~/mean_ema/counter": 1,
        "~/mean_ema/hidden": 2,
        "~/var_ema/average": 4,
        "~/var_ema/counter": 1,
        "~/var_ema/hidden": 1,
    }
    for momentum in (None, 0.0, 1e-9):
        state.momentum = momentum
        with pytest.raises(ValueError, match="averages that are divided by 1 - decay"):
            state.state_dict("haiku")
    state.momentum = 0.0
    with pytest.raises(anybn.CheckpointError, match=r"momentum is 0\.0, so averages cannot be divided"):
        state.load_state_dict(arrays, "equinox")
    young = arrays | {"batch_counter": 0}
    assert interop.from_state_dict(young, "equinox").running_mean == [2]  # as Equinox evaluates it
    assert math.isclose(interop.from_state_dict(arrays, "equinox").running_mean[0], 200)  # its default is 0.99


def test_an_average_that_waits_for_its_first_batch():
    garbage = np.array([np.nan, -3.0, 0.0], np.float32)  # what Equinox allocates
    arrays = {"ema_first_time_index": True, "ema_state_index/0": garbage, "ema_state_index/1": garbage}
    state = interop.from_state_dict(arrays, "equinox-ema")
    assert np.array_equal(state.running_mean, np.zeros(3))
    assert np.array_equal(state.running_var, np.ones(3))


def test_counters_that_may_be_missing():
    torch = arrays_of("torch")
    del torch["num_batches_tracked"]  # before torch 0.4.1
    assert interop.from_state_dict(torch).num_batches_tracked == 0
    haiku = {name: a for name, a in arrays_of("haiku").items() if "counter" not in name and "hidden" not in name}
    assert np.array_equal(interop.from_state_dict(haiku, "haiku").running_var, [0.125, 4, 16])
    state = anybn.BatchNormState(3)
    state.num_batches_tracked = 7
    with pytest.raises(anybn.CheckpointError, match="missing key 'num_batches_tracked'"):
        state.load_state_dict(torch)
    state.load_state_dict(arrays_of("keras"), "keras")
    assert state.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("convention", "change", "message"),
    [
        ("keras", {"moving_variance": None}, "missing key 'moving_variance'"),
        ("keras", {"gamma": np.ones(4)}, r"has shape \(3,\); the state has 4 channels"),
        ("keras", {"kernel": np.ones(3)}, "extra key 'kernel'"),
        ("keras", {"bn/gamma": np.ones(3)}, "extra key 'bn/gamma'"),
        ("keras", {"moving_variance": np.array([1, -1, 1.0])}, "moving_variance: running_var is -1.0 in channel 1"),
        ("keras", {"moving_mean": np.array([1, 1, np.nan])}, "moving_mean: running_mean is nan in channel 2"),
        ("keras", {"beta": [0.0, 0.0, 0.0]}, "beta is a list"),
        ("flax", {"mean": np.zeros(3, int)}, "mean has dtype int64: cast to float32"),
        ("flax", {"params/scale": np.ones(3)}, "key '.*scale' is there twice"),
        ("haiku", {"~/mean_ema/counter": 5}, "counter is 131, but the other average has counted 5 batches"),
        ("haiku", {"~/mean_ema/counter": -1}, "num_batches_tracked is -1"),
        ("haiku", {"scale": np.ones((3, 3))}, "scale has shape"),
        ("haiku", {"~/var_ema/average": -np.ones((1, 3))}, "~/var_ema/average: running_var is -1.0 in channel 0"),
        ("equinox", {"batch_state_index/1": -np.ones(3)}, "batch_state_index/1: running_var is -"),
        ("equinox", {"batch_counter": None}, "missing key 'batch_counter'"),
        ("equinox", {"batch_counter": np.ones(2)}, r"batch_counter has shape \(2,\) and dtype float64; it must be one"),
        ("chainer", {"avg_mean": None, "N": "x"}, "missing key 'avg_mean'"),
    ],
)
def test_what_cannot_be_loaded_is_named_and_nothing_changes(convention, change, message):
    arrays = {name: a for name, a in arrays_of(convention, **change).items() if a is not None}
    with pytest.raises(anybn.CheckpointError, match=f"nothing was loaded: .*{message}"):
        interop.from_state_dict(arrays, convention)
    state = anybn.BatchNormState(4 if "4 channels" in message else 3)
    before = inputs.state_values(state)
    with pytest.raises(anybn.CheckpointError, match=f"nothing was loaded: .*{message}"):
        state.load_state_dict(arrays, convention)
    assert inputs.state_values(state) == before


def test_wrong_calls():
    with pytest.raises(ValueError, match="convention is 'caffe'; it must be one of 'torch', 'keras', 'flax'"):
        interop.from_state_dict({}, "caffe")
    with pytest.raises(TypeError, match="'eps' is no setting of this convention: it has 'epsilon' and 'mom"):
        interop.from_state_dict(arrays_of("keras"), "keras", eps=1e-3)
    with pytest.raises(ValueError, match=r"momentum is 1\.5; it must lie in"):
        interop.from_state_dict(arrays_of("keras"), "keras", momentum=1.5)
    with pytest.raises(anybn.CheckpointError, match="there is no array of a batch norm"):
        interop.from_state_dict({}, "keras")
    with pytest.raises(TypeError, match="mapping is a list"):
        interop.from_state_dict([np.ones(3)], "keras")
    with pytest.raises(TypeError, match="mapping is a list"):
        anybn.BatchNormState(3).load_state_dict([np.ones(3)], "keras")


def test_dtypes():
    half = {name: a.astype(np.float16) for name, a in arrays_of("keras").items()}
    state = interop.from_state_dict(half, "keras")
    assert (state.dtype, state.running_mean.dtype) == ("float16", "float64")
    del half["gamma"], half["beta"]
    assert interop.from_state_dict(half, "keras").dtype == "float32"
