"""Whole models folded for serving: batch norms put into the layers beside them, where torch.fx shows that it can be."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import nn

from anybn._fold import fold as fold_arrays
from anybn.torch import classes, fuse
from anybn.torch.module import _BatchNorm
from anybn.torch.state import state_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: What has `weight`, `bias`, and computes nothing with them but a sum of products.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_KNOWN_LAYERS = ("timm.layers.conv2d_same.Conv2dSame",)
_FORWARDS = (_BatchNorm.forward, nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
#: What does nothing in evaluation.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Tracer(torch.fx.Tracer):
    """Batch norms and layers are leaves, whoever derived them."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = isinstance(module, (nn.modules.batchnorm._BatchNorm, *_LAYERS))
        return leaf or super().is_leaf_module(module, qualified_name)


def fold(model: nn.Module) -> torch.fx.GraphModule:
    """A model for serving: evaluation with its batch norms folded into the layers before or behind them.

    A linear layer or a convolution before batch norm takes it, or one behind it whose borders allow that, where
    torch.fx, which traces the model, shows that nothing else reads what lies between. Dropout and Identity are left
    out. Weights keep their dtype and are rounded once; see `anybn.fold`.

    Args:
        model: any module that torch.fx can trace, with batch norms of torch's or anybn's; it stays as it is.

    Returns:
        a ``torch.fx.GraphModule`` in evaluation mode over copies of the modules. Its attribute ``left`` maps the names
        of the batch norms that are still there to the reasons.

    Raises TypeError for what is no module, ValueError for a model that torch.fx cannot trace.

    >>> import torch, anybn.torch
    >>> norms = [torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)]
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), norms[0], torch.nn.ReLU(), norms[1]).eval()
    >>> folded = anybn.torch.fold(model)
    >>> folded.left
    {'3': 'before it is 2, a ReLU; behind it is the end'}
    >>> x = torch.ones(1, 1, 5, 5)
    >>> torch.allclose(folded(x), model(x), atol=1e-6)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, torch.fx.GraphModule):
            fuse.unfused(module, _BatchNorm)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"model cannot be folded, because torch.fx cannot trace it: {error}") from error
    folded = torch.fx.GraphModule(model, graph, type(model).__name__)
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(folded.get_submodule(node.target), _NOTHING):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    left = {}
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        is_norm = isinstance(folded.get_submodule(node.target), nn.modules.batchnorm._BatchNorm)
        if is_norm and (problem := _fold_away(node, folded)):
            left[node.target] = problem
    graph.lint()
    folded.recompile()
    folded.delete_all_unused_submodules()
    folded.left = left  # type: ignore[assignment]
    return folded


def _fold_away(node: Any, model: torch.fx.GraphModule) -> str:
    """Fold the batch norm that this node calls into a layer; or return why not, with nothing changed."""
    norm: Any = model.get_submodule(node.target)
    follows = _what_follows(norm)
    if follows is None:
        return f"it is a {type(norm).__name__}, whose forward may do anything"
    if len(node.args) != 1 or node.kwargs or fuse.has_hooks(norm) or _calls(node, model) != 1:
        return "it has hooks, or is called more than once"
    x = node.args[0]
    layer, before = _layer(x, model, reads=x, users=[node])
    if layer is not None:
        groups, channel_axis = getattr(layer, "groups", 1), int(isinstance(layer, _TRANSPOSED))
        before = _fold_into(layer, norm, groups=groups, channel_axis=channel_axis)
        if not before:
            _assert_rank(x, layer, model)
            _leave(node, x, model, follows)
            return ""
    user = next(iter(node.users))
    layer, behind = _layer(user, model, reads=node, users=list(node.users))
    if layer is None or follows:
        return f"before it is {before}; behind it is {'its activation' if follows else behind}"
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"  # others pad with what they find
    padding = getattr(layer, "padding", 0) if type(layer) in _LAYERS else "of its own"
    channel_axis = int(not isinstance(layer, _TRANSPOSED))
    options = {"groups": getattr(layer, "groups", 1), "channel_axis": channel_axis, "padding": padding if zeros else 0}
    if behind := _fold_into(layer, norm, after=True, **options):
        return f"before it is {before}; behind it, {behind}"
    _assert_rank(user, layer, model)
    _leave(node, x, model, [])
    return ""


def _what_follows(norm: Any) -> list[nn.Module] | None:
    """The modules that this class calls after batch norm; None if nobody knows."""
    ours = type(norm) if isinstance(norm, _BatchNorm) else classes.ours_for(classes.base_of(norm), {})
    if ours is not None and issubclass(ours, classes.ThenDropAndAct):
        behind = (norm._modules.get(name) for name in ("drop", "act"))
        return [module for module in behind if module is not None and type(module) is not nn.Identity]
    if type(norm).forward not in _FORWARDS:
        return None
    return [nn.ReLU()] if getattr(norm, "activation", None) else []


def _layer(node: Any, model: torch.fx.GraphModule, reads: Any, users: list[Any]) -> tuple[Any, str]:
    """The linear layer or convolution that this node calls, if it can take a batch norm in; else None, and what is
    there. Between the two only ``reads`` lies, which only ``users`` read."""
    if not isinstance(node, torch.fx.Node) or node.op == "output":
        return None, "the end"
    if node.op != "call_module":
        return None, str(node)
    layer = model.get_submodule(str(node.target))
    what = f"{node.target}, a {type(layer).__name__}"
    if not isinstance(layer, _LAYERS):
        return None, what
    if type(layer) not in _LAYERS and f"{type(layer).__module__}.{type(layer).__qualname__}" not in _KNOWN_LAYERS:
        return None, f"{what}, which may do anything with its weight"
    if fuse.has_hooks(layer) or _calls(node, model) != 1 or len(node.args) != 1 or node.kwargs:
        return None, f"{what}, which has hooks or is called more than once"
    if list(reads.users) != users or len(users) != 1:
        return None, f"{what}, but what lies between is read elsewhere too"
    attributes = [operator.attrgetter(str(n.target))(model) for n in model.graph.nodes if n.op == "get_attr"]
    if any(a is layer.weight or a is layer.bias for a in attributes if a is not None):
        return None, f"{what}, but its weight or bias is read elsewhere too"
    return layer, what


def _calls(node: torch.fx.Node, model: torch.fx.GraphModule) -> int:
    module = model.get_submodule(str(node.target))
    called = [n for n in model.graph.nodes if n.op == "call_module"]
    return sum(model.get_submodule(n.target) is module for n in called)


def _fold_into(layer: Any, norm: Any, **options: Any) -> str:
    """Why not, or "": the layer has other Parameters then."""
    try:
        with torch.no_grad():
            weight, bias = fold_arrays(state_of(norm), layer.weight, layer.bias, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return ""


def _assert_rank(node: torch.fx.Node, layer: nn.Module, model: torch.fx.GraphModule) -> None:
    """What has more axes, or less, has batch norm's channels on another axis than the layer's, but may have as many."""
    rank = 2 if isinstance(layer, nn.Linear) else 3 if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)) else None
    if rank is not None:
        with model.graph.inserting_before(node):
            found = model.graph.call_function(getattr, (node.args[0], "ndim"))
            fits = model.graph.call_function(operator.eq, (found, rank))
            message = f"{node.target} has been folded with a batch norm, for inputs of {rank} dimensions"
            model.graph.call_function(torch._assert, (fits, message))


def _leave(node: torch.fx.Node, x: torch.fx.Node, model: torch.fx.GraphModule, follows: list[nn.Module]) -> None:
    """In the place of batch norm, what follows it."""
    if follows:
        parent, _, name = str(node.target).rpartition(".")
        setattr(model.get_submodule(parent), name, follows[0] if len(follows) == 1 else nn.Sequential(*follows))
    else:
        node.replace_all_uses_with(x)
        model.graph.erase_node(node)
