"""What ``group=`` takes, in one process; JAX's devices; and the programs in docs/. Processes: the folder groups."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from groups.processes import ENVIRONMENT, LIMIT, finished, mpiexec

import anybn
from anybn.conformance import inputs

HERE = Path(__file__).parent


@pytest.mark.parametrize("x64", ["0", "1"])
def test_jax(jax, x64):
    tests = HERE / "groups" / "jax_axis.py"
    member = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", tests]
    printed = finished(
        [[*member, "-k", "shard_map" if x64 == "1" else "test"]],  # what else there is knows no precision
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_ENABLE_X64=x64,
    )
    assert re.fullmatch(r"=+ \d+ passed(, \d+ deselected)? in .*", printed.strip().splitlines()[-1]), printed


# -- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [3, 1.5, (), [], object(), ("a", 2)])
def test_what_is_no_group(group):
    state = anybn.BatchNormState(3)
    with pytest.raises(TypeError, match=r"group is .*; it must be a torch.distributed process group that this process"):
        anybn.batch_norm(inputs.normal((4, 3)), state, training=True, group=group)
    assert state.num_batches_tracked == 0


def test_an_axis_is_jax_s_alone():
    with pytest.raises(TypeError, match="group is the name of a JAX axis, 'devices', but x is a numpy array"):
        anybn.batch_norm(inputs.normal((4, 3)), anybn.BatchNormState(3), training=True, group="devices")


def test_torch_s_processes_sum_tensors():
    group, state = anybn.distributed.TorchGroup(), anybn.BatchNormState(3)
    message = "group is a torch.distributed process group, but x is a numpy array: pass what sums its arrays"
    with pytest.raises(TypeError, match=message):
        anybn.batch_norm(inputs.normal((4, 3)), state, training=True, group=group)
    torch = pytest.importorskip("torch", reason="torch: not installed")
    x = torch.ones(4, 3)
    for call in (
        lambda: anybn.batch_norm(x, state, training=True, group=group),
        lambda: anybn.recalibrate(state, [x], group=group),
    ):
        with pytest.raises(RuntimeError, match="default process group and there is none: call init_process_group"):
            call()
    assert state.num_batches_tracked == 0


def test_recalibrate_takes_a_group_of_processes():
    state = anybn.BatchNormState(3)
    with pytest.raises(TypeError, match="group is the name of a JAX axis, 'devices', but recalibrate is not traced"):
        anybn.recalibrate(state, [inputs.normal((4, 3))], group="devices")
    with pytest.raises(TypeError, match="group is 3, a int; it must be a torch"):
        anybn.recalibrate(state, [inputs.normal((4, 3))], group=3)
    whole = anybn.recalibrate(anybn.BatchNormState(3), [inputs.normal((4, 3))])
    anybn.recalibrate(state, [inputs.normal((4, 3))], group=Alone())
    assert inputs.state_values(state) == inputs.state_values(whole)


@pytest.mark.parametrize("with_to_numpy", [False, True])
def test_a_group_that_sums_another_library_s_arrays(with_to_numpy):
    """Where there is no x, a group may make the arrays that it sums, and need not bring their sum back."""
    xp, received = pytest.importorskip("array_api_strict", reason="array_api_strict: not installed"), []

    class Strict(Alone):
        def from_numpy(self, values):
            return xp.asarray(values)

    def to_numpy(self, array):
        received.append(array)
        return np.from_dlpack(array)

    if with_to_numpy:
        Strict.to_numpy = to_numpy
    whole, state = anybn.BatchNormState(3), anybn.BatchNormState(3)
    anybn.recalibrate(whole, [inputs.normal((4, 3))])
    anybn.recalibrate(state, [inputs.normal((4, 3))], group=Strict())
    assert inputs.state_values(state) == inputs.state_values(whole)
    assert len(received) == 2 * with_to_numpy


@pytest.mark.parametrize(("training", "told"), [(True, 1), (None, 1), (False, 0), (np.False_, 0)])
def test_the_members_that_wait_are_told(training, told):
    """Of an error in what may be training, and never of one in evaluation, which nobody waits for."""
    calls = []

    class Watched(Alone):
        def all_reduce_sum(self, array):
            calls.append(array)
            return array

    state = anybn.BatchNormState(3)
    with pytest.raises(TypeError, match=r"mask|training"):
        anybn.batch_norm(inputs.normal((4, 3)), state, training=training, mask=np.ones(4), group=Watched())
    assert len(calls) == told


def test_evaluation_calls_no_group_and_takes_any_array():
    """A layer trained over a group of one library serves the arrays of another."""
    x = inputs.normal((4, 3))
    with_group, without = anybn.BatchNorm(3, group="devices").eval(), anybn.BatchNorm(3).eval()
    assert np.array_equal(with_group(x), without(x))


class Broken:
    rank, size = 0, 2

    def all_reduce_sum(self, array):
        raise ConnectionError("the wire was cut")


def test_the_engine_s_error_comes_through():
    state = anybn.BatchNormState(3)
    before = inputs.state_values(state)
    for kind in (Broken, type("Nameless", (), {"all_reduce_sum": Broken.all_reduce_sum})):
        with pytest.raises(ConnectionError, match="the wire was cut"):
            anybn.batch_norm(inputs.normal((4, 3)), state, training=True, group=kind())
        assert inputs.state_values(state) == before


class Alone:
    rank, size = 0, 1

    def all_reduce_sum(self, array):
        return array


class Same:
    """Members that all bring the same, one of them here. They may have ranks."""

    def __init__(self, members, ranked):
        self.members = members
        if ranked:
            self.rank, self.size = 0, members

    def all_reduce_sum(self, array):
        total = array
        for _ in range(self.members - 1):
            total = total + array
        return total


@pytest.mark.parametrize(("members", "ranked"), [(3, False), (7, False), (65, True)])
@pytest.mark.parametrize("eps", [1e-5, 0.25])
def test_members_that_agree(target, members, ranked, eps, monkeypatch):
    """Whatever the device's dtype: the numbers that they compare are summed exactly."""
    if ranked:  # rows of settings, of which here is one alone, are not what this is about
        monkeypatch.setattr("anybn.groups.exchange._agreed_vectors", lambda *_: 0)
    x = target.array(inputs.exact((16, 4, 9)), "float32")
    alone, state = (anybn.BatchNormState(4, ddof=0, eps=eps) for _ in range(2))
    anybn.batch_norm(x, alone, training=True)
    anybn.batch_norm(x, state, training=True, group=Same(members, ranked))
    assert np.allclose(target.numpy(state.running_var), target.numpy(alone.running_var), rtol=1e-5, atol=0)


def test_any_backend_can_be_in_a_group(target):
    """A group of one is no group."""
    values = inputs.ROWS["mean 1e3, std 1"](inputs.normal((16, 4, 9))).astype(np.float32)
    alone, state = anybn.BatchNormState(4), anybn.BatchNormState(4)
    expected, pullback = anybn.batch_norm_vjp(target.array(values), alone, training=True)
    y, pullback_of_group = anybn.batch_norm_vjp(target.array(values), state, training=True, group=Alone())
    dy = target.array(inputs.normal(values.shape, 1).astype(np.float32))
    a, b = pullback(dy), pullback_of_group(dy)
    # Where y is rounded once, from float64, to the bit; else within what such backends may differ by.
    limit = 0 if target.has_float64 else 4 * 2.0**-23
    # by the size of what was added up, 144 values for the parameters
    for one, other, size in ((y, expected, 4), (b.x, a.x, 4), (b.weight, a.weight, 144), (b.bias, a.bias, 144)):
        assert np.abs(target.numpy(one) - target.numpy(other)).max() <= limit * size
    assert np.allclose(target.numpy(state.running_var), target.numpy(alone.running_var), rtol=1e-6, atol=0)


def test_layers_and_modules_take_a_group():
    x = inputs.normal((6, 3))
    group = Broken()
    for bn in (anybn.BatchNorm(3, group=group), anybn.BatchNorm1d(3, group=group)):
        with pytest.raises(ConnectionError):
            bn(x)
        with pytest.raises(ConnectionError):
            bn.vjp(x)
        bn.eval()(x)


def test_torch_modules_take_a_group(torch):
    import anybn.torch

    x, group = torch.ones(4, 3), Broken()
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), anybn.torch.BatchNorm1d(3))
    assert anybn.torch.convert(model, group=group) is model
    assert [module.group for module in model] == [group, group]
    with pytest.raises(ConnectionError):
        model(x)
    assert [int(module.num_batches_tracked) for module in model] == [0, 0]
    model.eval()(x)
    assert "group=" in repr(anybn.torch.BatchNorm1d(3, group=group))
    with pytest.raises(TypeError, match="group is 3"):
        anybn.torch.convert(torch.nn.BatchNorm1d(3), group=3)
    anybn.torch.revert(model)
    assert not hasattr(model[0], "group")


def test_a_model_with_a_subgroup_is_saved(torch, tmp_path):
    """In a process of its own, which has a group. What is loaded evaluates, and says what it lacks to train."""
    path = tmp_path / "model.pt"
    code = f"""
import torch, torch.distributed as dist, anybn.torch
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(anybn.torch.BatchNorm1d(3, group=dist.new_group([0])))
model(torch.arange(12.0).reshape(4, 3))
torch.save(model, {str(path)!r})
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    model = torch.load(path, weights_only=False)
    assert int(model[0].num_batches_tracked) == 1
    x = torch.ones(4, 3)
    model.eval()(x)
    with pytest.raises(RuntimeError, match=r"group comes from a file.* of the ranks \[0\]"):
        model.train()(x)
    torch.save(model, path)
    assert "ranks [0], lost" in repr(torch.load(path, weights_only=False))
    model[0].group = None
    model(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it looks at what a graph begins with
def test_torch_compile_ends_its_graph_at_a_group(torch):
    from torch._dynamo.testing import CompileCounter

    import anybn.torch

    def step(net, state, group, x):
        y = anybn.batch_norm(net(x), state, training=True, group=group)
        y.square().sum().backward()
        return y, net[0].weight.grad, net[1].running_var, state.running_var

    class Counted(Alone):
        calls = 0

        def all_reduce_sum(self, array):
            self.calls += 1
            return array

    results, counter, x = [], CompileCounter(), torch.from_numpy(inputs.normal((6, 3)))
    for call in step, torch.compile(step, backend=counter):
        torch.manual_seed(0)
        group, net = Counted(), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).double()
        anybn.torch.convert(net, group=group)
        results.append(call(net, anybn.BatchNormState(3, like=x), group, x))
        assert group.calls == 1 + 2 + 2  # of one length of rows, so introduced once
    assert counter.frame_count >= 1
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    with pytest.raises(Exception, match="disable"):
        torch.compile(net, backend="eager", fullgraph=True)(x)
    state = anybn.BatchNormState(3, like=x)
    whole = torch.compile(lambda x: anybn.batch_norm(x, state, group=group), backend="eager", fullgraph=True)
    assert torch.equal(whole(x), anybn.batch_norm(x, state))  # which needs no other member
    with pytest.raises(Exception, match=r"torch\.export cannot take a group or accumulate"):
        torch.export.export(net, (x,))


# -- what the pages show ---------------------------------------------------------------------------------------


def snippet(launcher, tmp_path):
    page = (HERE.parent / "docs" / "processes.md").read_text()
    (code,) = re.findall(rf"```python {launcher}\n(.*?)```", page, re.S)
    script = tmp_path / "train.py"
    script.write_text(code)
    return str(script)


def test_the_page_s_torchrun(torch, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    printed = []
    for n in ("1", "2"):
        done = subprocess.run(
            [*command, n, snippet("torchrun", tmp_path)],
            env=ENVIRONMENT | {"PYTHONWARNINGS": "ignore"},  # torchrun itself warns
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    assert printed[0].startswith("running_mean[0] = ")
    assert printed[0] == printed[1]


def test_the_page_s_mpiexec(tmp_path):
    printed = finished([[*mpiexec(2), sys.executable, snippet("mpiexec", tmp_path)]])
    assert printed.splitlines()[-1] == "[2.2 2.3 2.4 2.5]"


def test_the_page_shows_what_was_measured(torch):
    spec = importlib.util.spec_from_file_location("collectives", HERE.parent / "benchmarks" / "collectives.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.tables(json.loads(module.RESULTS.read_text())) in (HERE.parent / "docs" / "groups.md").read_text()
