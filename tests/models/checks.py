"""What a converted model has to do as the original does, one check a column of the table.

Each takes a function that builds the model and an input; what it raises is what went wrong.
"""

from __future__ import annotations

import copy
import io
from collections import Counter

import torch

import anybn.torch

LAYER = torch.nn.modules.batchnorm._BatchNorm


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, LAYER)]


def convert_and_revert(model):
    """Every batch norm becomes ours, where it is, and what it was again, with the same values; checkpoints fit."""
    kinds = [type(module) for module in model.modules()]
    modules, names = list(model.modules()), list(model.state_dict())
    before = model.state_dict()  # with its metadata, which MNASNet asks for
    for name, value in list(before.items()):
        if value.is_meta:
            del before[name]
        else:
            before[name] = value.clone()
    text = repr(model)
    assert anybn.torch.convert(model) is model
    assert all(isinstance(module, anybn.torch.module._BatchNorm) for module in batch_norms(model))
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == names
    assert repr(model) == text
    if before:
        model.load_state_dict(before)
    anybn.torch.revert(model)
    assert [type(module) for module in model.modules()] == kinds
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def evaluation(model, x):
    """To the roundings of float32 that follow one another, of outputs around 1; anybn's own are fewer."""
    ours = anybn.torch.convert(copy.deepcopy(model.eval()))
    with torch.no_grad():
        expected, ours = outputs(model, x), outputs(ours, x)
    for a, b in zip(ours, expected, strict=True):
        scale = max(1.0, float(b.abs().max()))
        assert torch.isfinite(b).all()
        assert float((a - b).abs().max()) <= 2e-5 * scale


def training(model, x):
    """A step in float64: outputs, the gradients of all parameters, and all statistics."""
    theirs, x = model.double().train(), x.double()
    ours = anybn.torch.convert(copy.deepcopy(theirs))
    for m in (ours, theirs):
        torch.manual_seed(0)  # of dropout
        sum((y**2).mean() for y in outputs(m, x)).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            # sums of up to 1e5 terms that cancel, through a hundred layers
            assert float((a.grad - b.grad).abs().max()) <= 1e-7 * max(1.0, float(b.grad.abs().max())), name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert a.dtype == b.dtype, name
        if a.is_floating_point():
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), name
        else:
            assert torch.equal(a, b), name


def trace(model):
    """torch.fx gives a graph if it does of the original, with a call of each of our modules that is called there."""
    try:
        expected = torch.fx.symbolic_trace(model.eval())
    except Exception:
        return "not traced, nor is the original"
    traced = torch.fx.symbolic_trace(anybn.torch.convert(copy.deepcopy(model)))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {name for name, m in traced.named_modules() if isinstance(m, LAYER)} <= set(called)
    assert expected is not None
    return "yes"


def onnx_kinds(model, x):
    """The kinds of nodes of the model that the exporter to ONNX which traces makes, and how many of each."""
    import onnx

    file = io.BytesIO()
    torch.onnx.export(model.eval(), (x,), file, dynamo=False)
    return Counter(node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node)


def onnx(model, x):
    """The kinds of ONNX nodes and how many of each."""
    return exports_alike(onnx_kinds, model, x)


def export(model, x):
    """torch.export's operations and how many of each."""
    return exports_alike(operations, model, x)


def exports_alike(counted, model, x):
    try:
        expected = counted(model, x)
    except Exception:
        return "not exported, nor is the original"
    assert counted(anybn.torch.convert(copy.deepcopy(model)), x) == expected
    return "yes"


def operations(model, x):
    program = torch.export.export(model.eval(), (x,))
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def outputs(model, x):
    y = model(x)
    y = y.values() if isinstance(y, dict) else y
    return [y] if isinstance(y, torch.Tensor) else [a for a in y if isinstance(a, torch.Tensor)]
