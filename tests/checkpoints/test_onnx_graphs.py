"""Batch norms of ONNX models: in graphs within the graph, in functions, and those that an exporter has folded."""

import warnings

import numpy as np
import pytest

import anybn

pytestmark = pytest.mark.filterwarnings("ignore:::(onnx|torch)", "ignore::DeprecationWarning")
onnx = pytest.importorskip("onnx", reason="onnx: not installed, pip install onnx")
FIELDS = "weight", "bias", "running_mean", "running_var"


def tensors(prefix, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=3), rng.normal(size=3), rng.normal(size=3), rng.uniform(0.1, 1, 3)]
    named = zip(FIELDS, arrays, strict=True)
    return [onnx.numpy_helper.from_array(a.astype(np.float32), f"{prefix}{n}") for n, a in named]


def node(prefix, x="x", y="y", **attributes):
    return onnx.helper.make_node("BatchNormalization", [x, *(f"{prefix}{n}" for n in FIELDS)], [y], **attributes)


def value(name, *shape):
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape or (2, 3))


def states_of(tmp_path, model, **settings):
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "model.onnx")
    return anybn.load_batch_norms(tmp_path / "model.onnx", **settings)


def assert_is(state, prefix, seed):
    for field, tensor in zip(FIELDS, tensors(prefix, seed), strict=True):
        assert np.array_equal(getattr(state, field), onnx.numpy_helper.to_array(tensor))


def test_graphs_within_the_graph(tmp_path):
    h = onnx.helper
    one = h.make_graph([node("bn.", y="a", epsilon=0.5)], "then", [], [value("a")], tensors("bn.", 1))
    other = h.make_graph([node("bn.", y="b"), node("outer.", "b", "c")], "else", [], [value("c")], tensors("bn.", 2))
    graph = h.make_graph(
        [h.make_node("If", ["which"], ["y"], name="choice", then_branch=one, else_branch=other)],
        "g",
        [value("x"), h.make_tensor_value_info("which", onnx.TensorProto.BOOL, ())],
        [value("y")],
        tensors("outer.", 3),
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 15)], ir_version=10)
    states = states_of(tmp_path, model)
    assert {name: state.eps for name, state in states.items()} == {
        "choice/then_branch/bn": 0.5,
        "choice/else_branch/bn": 1e-5,
        "outer": 1e-5,
    }
    assert_is(states["choice/then_branch/bn"], "bn.", 1)
    assert_is(states["choice/else_branch/bn"], "bn.", 2)
    assert_is(states["outer"], "outer.", 3)


def test_functions(tmp_path):
    """A function's batch norm is one of its own for every call, with the arrays and the eps of the call."""
    h = onnx.helper
    inner = node("")
    inner.attribute.add(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT)
    norm = h.make_function("mine", "Norm", ["x", *FIELDS], ["y"], [inner], [h.make_opsetid("", 15)], ["eps"])
    constant = h.make_node("Constant", [], ["running_mean"], value=tensors("", 9)[2])
    wrapped = [constant, h.make_node("Norm", ["x", *FIELDS], ["y"], domain="mine", eps=0.25, name="inner")]
    imports = [h.make_opsetid("", 15), h.make_opsetid("mine", 1)]
    outer = h.make_function("mine", "Outer", ["x", "weight", "bias", "running_var"], ["y"], wrapped, imports)
    calls = [
        h.make_node("Norm", ["x", *(f"a.{n}" for n in FIELDS)], ["p"], domain="mine", eps=0.5, name="first"),
        h.make_node("Outer", ["p", "b.weight", "b.bias", "b.running_var"], ["q"], domain="mine", name="second"),
        h.make_node("Outer", ["q", "a.weight", "a.bias", "a.running_var"], ["y"], domain="mine", name="third"),
    ]
    graph = h.make_graph(calls, "g", [value("x")], [value("y")], tensors("a.", 1) + tensors("b.", 2))
    model = h.make_model(graph, opset_imports=imports, ir_version=10, functions=[norm, outer])
    states = states_of(tmp_path, model)
    assert list(states) == ["a", "second/inner/y", "third/inner/y"]
    assert [state.eps for state in states.values()] == [0.5, 0.25, 0.25]
    assert_is(states["a"], "a.", 1)
    for name, prefix, seed in (("second/inner/y", "b.", 2), ("third/inner/y", "a.", 1)):
        expected = dict(zip(FIELDS, map(onnx.numpy_helper.to_array, tensors(prefix, seed)), strict=True))
        expected["running_mean"] = onnx.numpy_helper.to_array(tensors("", 9)[2])
        for field, array in expected.items():
            assert np.array_equal(getattr(states[name], field), array)


def test_functions_that_call_each_other_without_end(tmp_path):
    h = onnx.helper
    opsets = [h.make_opsetid("", 15), h.make_opsetid("mine", 1)]
    functions = [
        h.make_function(
            "mine", f"F{i}", ["x"], ["y"], [h.make_node(f"F{i + 1}", ["x"], ["y"], domain="mine")] * 2, opsets
        )
        for i in range(40)
    ]
    call = h.make_node("F0", ["x"], ["y"], domain="mine")
    graph = h.make_graph([call], "g", [value("x")], [value("y")])
    for last in ([], [h.make_function("mine", "F40", ["x"], ["y"], [call], opsets)]):
        model = h.make_model(graph, opset_imports=opsets, ir_version=10, functions=[*functions, *last])
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(anybn.CheckpointError, match="nothing was loaded"):
            anybn.load_batch_norms(tmp_path / "model.onnx")


def test_a_model_whose_batch_norms_are_folded(torch, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript: not installed, pip install onnxscript")
    nn = torch.nn
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "model.onnx"
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model(x)  # statistics that a folded bias shows
    model.eval()

    def export(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            torch.onnx.export(model, (x,), path, dynamo=True)

    export(model)
    with pytest.warns(UserWarning, match="fewer batch norms than the model had, since 'node_Conv_.*export it as it is"):
        assert list(anybn.load_batch_norms(path)) == ["3"]
    export(model[:2])
    with pytest.raises(anybn.CheckpointError, match="has no batch norm: there are 1 Conv with bias; exporters fold"):
        anybn.load_batch_norms(path)
