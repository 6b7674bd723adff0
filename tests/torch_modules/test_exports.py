"""torch.fx, torch.export and both exporters to ONNX see of our modules what they see of torch's."""

import copy
import io
import shutil
from collections import Counter

import pytest

import anybn

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")

from torch_modules.pairs import PAIRS, X, assert_close, buffers_of, nn  # noqa: E402

import anybn.torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about what its exporters use

#: What float32 statistics allow, of values around 1 to 10: mean, variance, scale and shift are rounded, and y.
UNIT = 4 * 2**-20


class WithResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = anybn.torch.BatchNorm2d(3, activation="relu")

    def forward(self, x):
        return self.bn(x, x)


def net(training=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    )
    for _ in range(3):
        model(X)
    return model.train(training)


def both(training=False):
    return anybn.torch.convert(net(training)), net(training)


def operations(program):
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


DYNAMIC = [None, {0: "n"}, {0: "n", 2: "h", 3: "w"}]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_exports_one_batch_norm_each(training, dynamic):
    ours, theirs = both(training)
    shapes = dynamic and {"input": {i: torch.export.Dim(name, min=4, max=64) for i, name in dynamic.items()}}
    before = buffers_of(ours)
    programs = [torch.export.export(m, (X,), dynamic_shapes=shapes) for m in (ours, theirs)]
    assert operations(programs[0]) == operations(programs[1])
    assert operations(programs[0])["aten.batch_norm.default"] == 2
    assert all(map(torch.equal, buffers_of(ours), before))
    assert ours[1].running_var.dtype == torch.float64
    decomposed = [program.run_decompositions() for program in programs]
    assert operations(decomposed[0]) == operations(decomposed[1])
    module, x = programs[0].module(), X * 2 if dynamic is None else torch.cat((X, X * 2))
    for _ in range(2):
        assert torch.allclose(module(x), ours(x), rtol=0, atol=UNIT)
    for name, value in ours.named_buffers():
        assert torch.allclose(dict(module.named_buffers())[name].to(value.dtype), value, rtol=2**-21, atol=2**-22)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"momentum": None}, {"affine": False}])
@pytest.mark.parametrize("dimensions", PAIRS)
def test_exports_every_kind(options, dimensions):
    x = X[:, :, :2] if dimensions == 2 else X[..., 0] if dimensions == 1 else X[..., None]
    for training in (True, False):
        ours = PAIRS[dimensions][0](3, **options).train(training)
        expected = copy.deepcopy(ours)
        program = torch.export.export(ours, (x,), dynamic_shapes={"input": {0: torch.export.Dim("n", min=2)}})
        assert operations(program)["aten.batch_norm.default"] == 1
        module = program.module()
        for step in range(3):
            y = torch.cat((x, x + step))
            assert torch.allclose(module(y), expected(y), rtol=0, atol=UNIT)
        for name, value in expected.named_buffers():
            assert torch.allclose(dict(module.named_buffers())[name].to(value.dtype), value, rtol=2**-21, atol=2**-21)


def test_exports_dtypes_residuals_and_activations():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        bn = PAIRS[2][0](3).to(dtype).eval()
        x = X.to(dtype)
        exported = torch.export.export(bn, (x,)).module()
        assert exported(x).dtype == dtype
        assert torch.allclose(exported(x).double(), bn(x).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-12)
    model = WithResidual()
    for training in (True, False):
        program = torch.export.export(model.train(training), (X,))
        counted = operations(program)
        assert (counted["aten.batch_norm.default"], counted["aten.relu.default"]) == (1, 1)
        assert torch.allclose(program.module()(X), copy.deepcopy(model)(X), rtol=0, atol=UNIT)


def test_what_export_refuses():
    bn = anybn.torch.BatchNorm2d(3)
    with pytest.raises(ValueError, match="training needs more than 1 value per channel"):
        torch.export.export(bn, (X[:1, :, :1, :1],))
    model = anybn.torch.convert(nn.Sequential(bn).train(), group=anybn.distributed.TorchGroup())
    with pytest.raises(NotImplementedError, match=r"torch\.export cannot take a group"):
        torch.export.export(model, (X,))


def test_exported_programs_take_checkpoints():
    ours, _ = both()
    fixed = torch.export.export(ours, (X,)).module()
    other, _ = both(True)
    other(X + 1)
    fixed.load_state_dict(other.state_dict())
    assert torch.allclose(fixed(X), other.eval()(X), rtol=0, atol=UNIT)
    strict = torch.export.export(ours, (X,), strict=True)
    assert torch.allclose(strict.module()(X), ours(X), rtol=0, atol=UNIT)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.slow
def test_packages_of_aotinductor_run(tmp_path):
    ours, theirs = both()
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(ours, (X,)), package_path=str(tmp_path / "model.pt2")
    )
    assert torch.allclose(torch._inductor.aoti_load_package(path)(X), theirs(X), rtol=0, atol=UNIT)


def onnx_model(model, dynamo, training):
    onnx = pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx")
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript: not installed, pip install onnxscript")
        return torch.onnx.export(model, (X,), dynamo=True, verbose=False).model_proto
    file = io.BytesIO()
    torch.onnx.export(model, (X,), file, dynamo=False, training=mode, do_constant_folding=not training)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_has_the_nodes_of_the_original(dynamo, training):
    ours, theirs = both(training)
    batches = int(ours[1].num_batches_tracked)
    models = [onnx_model(model, dynamo, training) for model in (ours, theirs)]
    kinds = [Counter(node.op_type for node in model.graph.node) for model in models]
    assert kinds[0] == kinds[1]
    assert set(kinds[0]) <= {"Conv", "Relu", "BatchNormalization"}
    assert ours[1].running_mean.dtype == torch.float64
    assert int(ours[1].num_batches_tracked) == int(theirs[1].num_batches_tracked) >= batches
    if training:
        return
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime: not installed, pip install onnxruntime")
    session = runtime.InferenceSession(models[0].SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert torch.allclose(torch.from_numpy(y), ours(X), rtol=0, atol=UNIT)


# -- torch.fx --------------------------------------------------------------------------------------------------------


class Tracer(torch.fx.Tracer):
    """One that takes nothing for a leaf, as some extractors of features do."""

    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, nn.Conv2d)


def test_a_call_is_one_node_of_a_graph():
    ours, theirs = both()
    for tracer in (torch.fx.Tracer(), Tracer()):
        graph = tracer.trace(nn.Sequential(ours, nn.ReLU()))
        targets = [node.target for node in graph.nodes if node.op == "call_module"]
        assert targets[:2] == ["0.0", "0.1"]
        assert "0.4" in targets
    traced = torch.fx.symbolic_trace(ours)
    assert str(traced.graph) == str(torch.fx.symbolic_trace(theirs).graph)
    for training in (True, False):
        assert torch.equal(traced.train(training)(X), copy.deepcopy(ours).train(training)(X))
    model = WithResidual()
    traced = torch.fx.symbolic_trace(model)
    assert [sorted(node.kwargs) for node in traced.graph.nodes if node.op == "call_module"] == [["residual"]]
    assert torch.equal(traced.eval()(X), model.eval()(X))
    assert_close(torch.fx.Transformer(traced).transform()(X), model(X))
    with pytest.raises(TypeError, match="whose tracer knows no modules"):
        model.bn(torch.fx.Proxy(next(iter(traced.graph.nodes))))
