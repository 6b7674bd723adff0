"""A state has a home: evaluation elsewhere reads it, training moves it, and nothing that it knows is lost."""

import copy
import doctest
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anybn
from anybn.backends import registry
from anybn.conformance import inputs, oracle
from anybn.conformance.targets import Target

EPS64 = 2.0**-52


def batch(seed=0):
    return (inputs.normal((8, 3), seed) * 2 + 5).astype(np.float32)


def trained(**options):
    state = anybn.BatchNormState(3, **options)
    for seed in range(2):
        anybn.batch_norm(batch(seed), state, training=True)
    return state


# -- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_evaluation_elsewhere_moves_nothing(target, dtype):
    state = trained(dtype=dtype)
    state.weight = inputs.normal((3,)).astype(dtype)
    arrays, moved = state._arrays, state.copy().to(target.array(batch()))
    for _ in range(2):
        y = anybn.batch_norm(target.array(batch(7)), state)
        assert state._arrays is arrays
        assert np.array_equal(target.numpy(y), target.numpy(anybn.batch_norm(target.array(batch(7)), moved)))
    assert state.dtype == dtype
    _, pullback = anybn.batch_norm_vjp(target.array(batch()), state)
    pullback(target.array(batch()))
    with anybn.accumulate(state):
        anybn.batch_norm(target.array(batch()), state)
    anybn.fold(state, target.array(inputs.normal((3, 2)), "float32"))
    assert state._arrays is arrays


def test_home_elsewhere_stays_there(target):
    """And a library without float64 is read with all digits that the state has."""
    state = trained(dtype="float64")
    state.weight = inputs.normal((3,))
    expected = anybn.batch_norm(batch(7), state)
    state.to(target.array(batch()))
    arrays = state._arrays
    y = anybn.batch_norm(batch(7), state)
    assert state._arrays is arrays
    assert np.array_equal(y, expected)


def test_empty_batches_move_nothing(target):
    state = trained()
    arrays = state._arrays
    anybn.batch_norm(target.array(batch()[:0]), state, training=True)
    assert state._arrays is arrays


def test_replicas_are_made_once_for_each_change(target, monkeypatch):
    if target.name == "numpy":
        return
    state, made = trained(), []
    x, original = target.array(batch()), target.backend.from_numpy
    monkeypatch.setattr(target.backend, "from_numpy", lambda *given: made.append(given) or original(*given))

    def evaluate():
        made.clear()
        for _ in range(3):
            anybn.batch_norm(x, state)
        return len(made)

    assert evaluate() == 4
    assert evaluate() == 0
    state.weight = np.full(3, 2, np.float32)
    assert not state._store.replicas  # nothing is kept for a library that may not come back
    assert evaluate() == 4
    anybn.batch_norm(batch(), state, training=True)
    assert not state._store.replicas
    assert evaluate() == 4
    for twin in (state.copy(), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert not twin._store.replicas


def test_so_many_replicas_and_no_more():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict: not installed")
    state = trained()

    class Copy(type(registry.backend_for(strict.asarray(1.0)))):
        def __init__(self, name):
            self.name = name

    try:
        for i in range(state._store.replicas.MOST + 3):
            anybn.register_backend(Copy(f"copy {i}"))
            anybn.batch_norm(strict.asarray(batch()), state)
            anybn.unregister_backend(f"copy {i}")
    finally:
        registry._registered.clear()
    assert len(state._store.replicas) == state._store.replicas.MOST


@pytest.mark.parametrize("how", ["item", "in place", "optimizer", "data", "fill"])
def test_weights_written_in_place_reach_the_replicas(torch, target, how):
    state = anybn.BatchNormState(3, like="torch" if how in ("optimizer", "data") else "numpy")
    if how == "optimizer":
        state.weight = torch.nn.Parameter(state.weight)
        optimizer = torch.optim.SGD([state.weight], lr=1.0)
    x = target.array(batch())
    before = target.numpy(anybn.batch_norm(x, state))
    if how == "item":
        state.weight[...] = 3
    elif how == "in place":
        state.weight += 2
    elif how == "optimizer":
        state.weight.grad = torch.full((3,), -2.0)
        optimizer.step()
    elif how == "data":
        state.weight.data.mul_(3)
    else:
        state.load_state_dict(state.state_dict() | {"weight": np.full(3, 3.0)})
    found = target.numpy(anybn.batch_norm(x, state))
    assert oracle.error(found, 3 * before.astype(oracle.LONG), "float32", np.abs(found).max()) <= 4


def test_statistics_written_in_place_reach_the_replicas(target):
    """What the state made in NumPy is read-only; what it was given is not."""
    state, mean = anybn.BatchNormState(3), np.zeros(3)
    state.running_mean = mean
    x = target.array(batch())
    before = target.numpy(anybn.batch_norm(x, state))
    mean += 1
    assert np.abs(before - target.numpy(anybn.batch_norm(x, state)) - 1).max() < 1e-4


def test_a_home_written_in_place_reaches_numpy(target):
    state = anybn.BatchNormState(3, like=target.array(batch()))
    before = anybn.batch_norm(batch(), state)
    if not hasattr(type(state.weight), "__setitem__") or target.name == "jax":
        return
    state.weight[...] = 3
    assert oracle.error(anybn.batch_norm(batch(), state), 3 * before.astype(oracle.LONG), "float32", 10) <= 4


def test_a_trainer_and_an_evaluator_in_another_library(target):
    state, x = anybn.BatchNormState(3), target.array(batch())

    def train():
        for seed in range(100):
            y, pullback = anybn.batch_norm_vjp(batch(seed), state, training=True)
            for name, gradient in pullback(y).items():
                if name != "x":
                    setattr(state, name, getattr(state, name) - 0.01 * gradient)

    def evaluate():
        while not training.done():
            anybn.batch_norm(x, state)

    alone = anybn.BatchNormState(3)
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(train)
        evaluation = pool.submit(evaluate)
        training.result()
        evaluation.result()
    state, alone = alone, state
    train()
    assert state == alone


def test_evaluation_under_jit_leaves_no_tracer_behind(jax):
    state, x = trained(), jax.numpy.asarray(batch())
    expected = np.asarray(anybn.batch_norm(x, state.copy()))
    assert np.allclose(jax.jit(lambda x: anybn.batch_norm(x, state))(x), expected, rtol=1e-6)
    assert np.allclose(anybn.batch_norm(x, state), expected, rtol=1e-6)
    assert np.allclose(jax.vmap(lambda x: anybn.batch_norm(x, state))(x[None])[0], expected, rtol=1e-6)
    assert np.allclose(anybn.batch_norm(x, state), expected, rtol=1e-6)


# -- training --------------------------------------------------------------------------------------------------


def test_training_elsewhere_moves_the_home(target):
    state, x = anybn.BatchNormState(3), target.array(batch())
    anybn.batch_norm(x, state, training=True)
    assert state.backend == target.backend.name
    assert target.backend.holds(state.weight, target.device)
    bare = anybn.BatchNormState(3, track_running_stats=False)
    anybn.batch_norm(x, bare)
    assert bare.backend == "numpy"
    anybn.batch_norm(x, bare, training=True)
    assert bare.backend == target.backend.name


def test_training_without_float64_loses_nothing_that_the_state_knows(target):
    """The batch is of small integers, whose statistics are exact everywhere, and so is what they are added to."""
    state = trained()
    mean, var = state.running_mean, state.running_var
    for seed in range(3):
        x = inputs.exact((8, 3), seed=seed)
        anybn.batch_norm(target.array(x, "float32"), state, training=True)
        mean, var = (0.9 * old + 0.1 * new for old, new in ((mean, x.mean(0)), (var, x.var(0, ddof=1))))
        assert np.abs(target.numpy(state.running_mean) - mean).max() < 1e-5
    state.to("numpy")
    assert oracle.error(state.running_mean, mean, "float64", 10) <= 4
    assert oracle.error(state.running_var, var, "float64", 10) <= 4


def test_dtype_tells_the_truth(target):
    state = anybn.BatchNormState(3, dtype="float64")
    weight = state.weight = inputs.normal((3,))
    kept = "float64" if target.has_float64 else "float32"
    state.to(target.array(batch()))
    assert state.dtype == kept
    assert state.weight.dtype == target.backend.dtype(kept)
    assert np.array_equal(state.to("numpy").weight, weight)
    assert state.dtype == "float64"


def test_a_value_without_float64_replaces_what_was_known(target):
    state = trained()
    state.to(target.array(batch()))
    state.running_mean = target.array(np.full(3, 0.1, np.float32))
    assert np.array_equal(state.to("numpy").running_mean, np.full(3, np.float32(0.1), np.float64))


def test_all_digits_in_files_and_copies(target, tmp_path):
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
    state = trained()
    before = inputs.state_values(state)
    state.to(target.array(batch()))
    state.save(tmp_path / "state")
    for other in (state.copy(), copy.deepcopy(state), anybn.BatchNormState.load(tmp_path / "state")):
        assert inputs.state_values(other) == before
        assert other == state


def test_accumulate_moves_once_it_is_over(target):
    state, x = anybn.BatchNormState(3), target.array(batch())
    with anybn.accumulate(state):
        anybn.batch_norm(x, state, training=True)
        assert state.backend == "numpy"
    assert state.backend == target.backend.name


# -- torch's Parameters ----------------------------------------------------------------------------------------


@pytest.fixture
def with_parameters(torch):
    state = anybn.BatchNormState(3, like=torch)
    state.weight, state.bias = (torch.nn.Parameter(a) for a in (state.weight, state.bias))
    return state, torch.optim.SGD([state.weight, state.bias], lr=0.5), torch


def test_parameters_stay_the_optimizers(target, with_parameters):
    state, optimizer, torch = with_parameters
    held = state.weight, state.bias
    x = torch.from_numpy(batch())

    def step():
        optimizer.zero_grad()
        anybn.batch_norm(x, state, training=True).square().sum().backward()
        optimizer.step()

    step()
    before = state.weight.detach().clone()
    anybn.batch_norm(target.array(batch()), state)
    anybn.batch_norm(target.array(batch(5)), state, training=True)
    anybn.batch_norm_vjp(target.array(batch()), state, training=True)[1](target.array(batch()))
    assert state.weight is held[0]
    assert state.bias is held[1]
    assert state.num_batches_tracked == 3
    step()
    assert not torch.equal(state.weight, before)
    y = target.numpy(anybn.batch_norm(target.array(batch()), state))
    expected = anybn.batch_norm(x, state).detach().numpy().astype(oracle.LONG)
    assert oracle.error(y, expected, "float32", np.abs(expected).max()) <= 4


def test_training_elsewhere_brings_the_statistics_home(target, with_parameters):
    state, _, _ = with_parameters
    alone = anybn.BatchNormState(3)
    for seed in range(3):
        x = inputs.exact((8, 3), seed=seed).astype(np.float32)
        for one in (state, alone):
            anybn.batch_norm(target.array(x) if one is state else x, one, training=True)
    assert state.backend == "torch"
    assert np.abs(state.running_mean.numpy() - alone.running_mean).max() <= 8 * EPS64
    assert np.abs(state.running_var.numpy() - alone.running_var).max() <= 4e-7 * alone.running_var.max()


def test_parameters_are_not_left_behind(with_parameters):
    state, _, torch = with_parameters
    arrays = state._arrays
    message = r"weight requires grad, and whoever trains it, .* would keep the old one if the state moved to numpy"
    for move in (
        lambda: state.to("numpy"),
        lambda: setattr(state, "weight", np.ones(3, np.float32)),
        lambda: setattr(state, "running_mean", np.ones(3)),
    ):
        with pytest.raises(anybn.StateError, match=message):
            move()
        assert state._arrays is arrays
    for place in PLACES:
        if place.backend.name != "torch":
            with pytest.raises(anybn.StateError, match="requires grad, and whoever trains it"):
                state.weight = place.array(np.ones(3, np.float32))
            assert state._arrays is arrays
    assert state.copy().to("numpy").backend == "numpy"  # nobody can hold what nobody was given
    twin = state.copy()
    held = twin.parameters()
    with pytest.raises(anybn.StateError, match=message):
        twin.to("numpy")
    for parameter in held.values():
        parameter.requires_grad_(False)
    assert twin.to("numpy").backend == "numpy"
    state.weight = torch.nn.Parameter(torch.zeros(3))  # within the library, what replaces it is what was asked for
    assert state.to("torch") is state
    assert state.weight.requires_grad


def test_reset_fills_parameters(with_parameters):
    state, _, torch = with_parameters
    weight = state.weight
    anybn.batch_norm(torch.from_numpy(batch()), state, training=True)
    with torch.no_grad():
        weight += 4
    state.reset()
    assert state.weight is weight
    assert state.copy().to("numpy") == anybn.BatchNormState(3)


@pytest.fixture
def two_places(torch):
    """torch with a second device, which is the first under another name."""
    from anybn.backends.torch import TorchBackend, cpu

    class TwoPlaces(TorchBackend):
        name = "two-places"

        def device_of(self, x):
            return getattr(x, "place", "here")

        def holds(self, array, device):
            return isinstance(array, torch.Tensor) and self.device_of(array) == device

        def device(self, name):
            return name or "here"

        def has_float64(self, device):
            return True

        def _from_numpy(self, array, device):
            return self.relocated(super()._from_numpy(array, "cpu"), device)

        def moved(self, x, device):
            return self.relocated(x.clone(), device)

        def relocated(self, x, device):
            x.place = device
            return x

        def _kernels_on(self, device):
            return cpu

    anybn.register_backend(TwoPlaces)
    yield lambda values: registry.backend_for(torch.ones(1)).from_numpy(values, "there")
    anybn.unregister_backend("two-places")


@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_parameters_on_another_device(two_places, with_parameters, training):
    state, optimizer, torch = with_parameters
    weight, twin = state.weight, state.copy()
    x, elsewhere = torch.from_numpy(batch()), two_places(batch())
    with torch.no_grad():
        anybn.batch_norm(elsewhere, state)  # leaves a replica without a graph
    for one, there in ((state, elsewhere), (twin, x)):
        anybn.batch_norm(there, one, training=training).square().sum().backward()
    assert torch.equal(weight.grad, twin.weight.grad)
    assert torch.equal(state.running_var, twin.running_var)
    assert state.weight is weight
    assert registry.backend_for(weight).device_of(weight) == "here"
    optimizer.step()
    with torch.no_grad():
        first, second = (anybn.batch_norm(a, state) for a in (x, elsewhere))
    assert torch.equal(first, second)


def test_a_move_within_the_library_takes_parameters_along(two_places, with_parameters):
    state, _, _ = with_parameters
    weight, copied = state.weight, state.copy()
    for moved in (state, copied):
        moved.to(two_places(batch()))
        assert moved.weight.is_leaf
        assert moved.weight.requires_grad
        assert registry.backend_for(moved.weight).device_of(moved.weight) == "there"
    assert state.weight is weight


# -- any sequence ----------------------------------------------------------------------------------------------


def places():
    found = []
    for name, info in registry.installed_backends().items():
        for device in info.devices if len(info.devices) > 1 else ("",):
            place = f"{name}:{device}" if device else name
            found.append(Target(place, *registry.resolve_target(place)))
    by_ability = {(place.backend.name, place.has_float64): place for place in found}
    return sorted(by_ability.values(), key=lambda place: place.name)


PLACES = places()
PLACE = st.sampled_from(PLACES)
SEED = st.integers(0, 5)
NAMES = st.sampled_from(["weight", "bias", "running_mean", "running_var"])
CHANGES = st.one_of(
    st.tuples(st.just("train"), PLACE, SEED),
    st.tuples(st.just("assign"), PLACE, SEED, NAMES),
    st.tuples(st.just("load"), SEED),
)
NO_CHANGES = st.one_of(
    st.tuples(st.just("evaluate"), PLACE, SEED),
    st.tuples(st.just("move"), PLACE),
    st.tuples(st.just("copy")),
    st.tuples(st.just("pickle")),
)


def do(state, step):
    what, *given = step
    if what in ("train", "evaluate"):
        place, seed = given
        anybn.batch_norm(place.array(batch(seed)), state, training=what == "train")
    elif what == "assign":
        place, seed, name = given
        dtype = state._store.dtype if name in ("weight", "bias") else "float64"
        value = np.abs(inputs.normal((3,), seed)).astype(dtype)
        setattr(state, name, place.array(value if place.has_float64 else value.astype(np.float32)))
    elif what == "load":
        values = {"weight": np.ones(3), "bias": np.zeros(3), "running_mean": inputs.normal((3,), *given)}
        state.load_state_dict(values | {"running_var": np.ones(3) / 3, "num_batches_tracked": 4})
    elif what == "move":
        state.to(given[0].name)
    elif what == "copy":
        return state.copy()
    elif what == "pickle":
        return state if state.backend == "dask" else pickle.loads(pickle.dumps(state))
    return state


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.one_of(CHANGES, NO_CHANGES), max_size=8),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([0.1, None]),
)
def test_any_sequence_leaves_what_its_changes_alone_would(steps, dtype, momentum):
    """Bit for bit, also where a library without float64 was among them."""
    state, alone = (anybn.BatchNormState(3, dtype=dtype, momentum=momentum) for _ in range(2))
    for step in steps:
        state = do(state, step)
        if step[0] in ("train", "assign", "load"):
            alone = do(alone, step)
        assert inputs.state_values(state) == inputs.state_values(alone)
    assert state == alone


def test_the_page_about_it(jax, torch):
    page = str(Path(__file__).parents[2] / "docs" / "state.md")
    failed, tried = doctest.testfile(page, module_relative=False, optionflags=doctest.ELLIPSIS)
    assert tried > 10
    assert not failed
