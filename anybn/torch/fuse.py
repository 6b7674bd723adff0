"""BN -> ReLU and BN -> add -> ReLU of a torch model as one call each, where torch.fx shows that it is the same."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Tracer(torch.fx.Tracer):
    """Pickled GraphModules make one without arguments."""

    def is_leaf_module(self, module: torch.nn.Module, qualified_name: str) -> bool:
        return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(
            module, qualified_name
        )


def fused(model: torch.nn.Module, example_inputs: tuple[Any, ...], batch_norm: Any) -> torch.fx.GraphModule:
    """model as a GraphModule over the same submodules, with what can be fused passed to its batch norms' calls."""
    graph = _traced(model)
    module = torch.fx.GraphModule(model, graph, type(model).__name__)
    modes = {name: m.training for name, m in model.named_modules()}
    for name, m in module.named_modules():  # those that hold others are new
        m.training = modes.get(name, model.training)
    try:
        _propagate(module, example_inputs)
    except Exception as error:
        raise ValueError(
            f"fuse has {len(example_inputs)} arguments, and model(...) does not run with them ({error}): give those of "
            "a call"
        ) from error
    for node in list(graph.nodes):
        if _is_relu(node, module):
            _fuse_into(node, module, batch_norm)
    for node in graph.nodes:
        node.meta.clear()  # tensors without values, which cannot be copied or pickled
    graph.lint()
    module.recompile()
    return module


def _traced(model: torch.nn.Module) -> torch.fx.Graph:
    """The graph of model, which must be the same in both modes and hide no hooks."""
    training = {module: module.training for module in model.modules()}
    graphs = []
    try:
        for mode in (False, True):
            model.train(mode)
            graphs.append(_Tracer().trace(model))
    except Exception as error:
        raise ValueError(
            f"model cannot be fused, because torch.fx cannot trace it ({error}): convert without fuse"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError(
            "model cannot be fused, because its forward does something else in training than in evaluation (such as "
            "F.dropout(training=self.training); nn.Dropout is fine): convert without fuse"
        )
    called = {node.target for node in graphs[1].nodes if node.op == "call_module"}
    for name, module in model.named_modules():
        if name not in called and not any(name.startswith(f"{leaf}.") for leaf in called) and has_hooks(module):
            raise ValueError(
                f"model cannot be fused, because {name or 'it'} has hooks, which its graph would not call: convert "
                "without fuse, or add them later"
            )
    return graphs[1]


def has_hooks(module: torch.nn.Module | None) -> bool:
    return module is not None and any(getattr(module, hooks) for hooks in _HOOKS)


def _propagate(module: torch.fx.GraphModule, example_inputs: tuple[Any, ...]) -> None:
    """Note the shape and dtype of every node, on tensors without values, so that nothing is computed or learnt."""
    modules = list(module.modules())
    training = [m.training for m in modules]
    try:
        module.eval()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(module, mode).propagate(*example_inputs)
    finally:
        for m, was in zip(modules, training, strict=True):
            m.training = was


def _is_relu(node: torch.fx.Node, module: torch.fx.GraphModule) -> bool:
    if node.op == "call_module":
        target = module.get_submodule(node.target)
        return type(target) is torch.nn.ReLU and not has_hooks(target)
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _writes(node: torch.fx.Node, module: torch.fx.GraphModule) -> bool:
    """Whether this operation may change one of its arguments."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(node.target), "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    in_place = name.endswith("_") or (name.startswith("i") and hasattr(operator, name))
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _alike(a: torch.fx.Node, b: torch.fx.Node) -> bool:
    one, other = (node.meta.get("val") for node in (a, b))
    return (
        isinstance(one, torch.Tensor)
        and isinstance(other, torch.Tensor)
        and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    )


def _calls(node: torch.fx.Node, target: torch.nn.Module, module: torch.fx.GraphModule) -> bool:
    return node.op == "call_module" and module.get_submodule(str(node.target)) is target


def _fuse_into(relu: torch.fx.Node, module: torch.fx.GraphModule, batch_norm: Any) -> None:
    """Let the batch norm before this relu do it, and the addition between them."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}

    def is_batch_norm(node: Any) -> bool:
        if not (isinstance(node, torch.fx.Node) and node.op == "call_module" and len(node.args) == 1):
            return False
        target: Any = module.get_submodule(node.target)
        takes_them = isinstance(target, batch_norm) and type(target).forward is batch_norm.forward
        alone = takes_them and not has_hooks(target)
        unfused = getattr(target, "activation", None) is None and not node.kwargs
        return alone and unfused and len(node.users) == 1

    last: Any = relu.args[0] if relu.args else None
    if is_batch_norm(last):
        last.kwargs = {"activation": "relu"}
        relu.replace_all_uses_with(last)
        module.graph.erase_node(relu)
        return
    if not (isinstance(last, torch.fx.Node) and last.target in _ADDS and len(last.args) == 2 and not last.kwargs):
        return
    pairs = [last.args] if _writes(last, module) else [last.args, last.args[::-1]]
    pairs = [(a, b) for a, b in pairs if is_batch_norm(a) and isinstance(b, torch.fx.Node) and _alike(a, b)]
    if len(last.users) != 1 or not pairs or last.args[0] is last.args[1]:
        return
    bn, residual = max(pairs, key=lambda pair: order[pair[0]])
    # The call moves to where the residual is there, not past what could change its input, or calls the same batch norm.
    target = module.get_submodule(bn.target)
    between = [node for node, i in order.items() if order[bn] < i < order[last]]
    if any(_writes(node, module) or _calls(node, target, module) for node in between):
        return
    last.prepend(bn)
    bn.kwargs = {"residual": residual, "activation": "relu"}
    relu.replace_all_uses_with(bn)
    module.graph.erase_node(relu)
    module.graph.erase_node(last)


def unfused(module: torch.fx.GraphModule, batch_norm: Any) -> None:
    """Addition and relu as operations of their own again."""
    for node in list(module.graph.nodes):
        if node.op != "call_module" or not isinstance(module.get_submodule(node.target), batch_norm) or not node.kwargs:
            continue
        residual, node.kwargs, last = node.kwargs.get("residual"), {}, node
        users = list(node.users)
        with module.graph.inserting_after(node):
            if residual is not None:
                last = module.graph.call_function(operator.add, (node, residual))
        with module.graph.inserting_after(last):
            relu = module.graph.call_function(torch.relu, (last,))
        for user in users:
            user.replace_input_with(node, relu)
    module.recompile()
