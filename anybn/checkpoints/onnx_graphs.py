"""The batch norms of an ONNX model, with their attributes: in its graph, the graphs within that, and its functions."""

from __future__ import annotations

import math
import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from anybn.checkpoints.budget import Budget
from anybn.checkpoints.conventions import CONVENTIONS, Layer
from anybn.errors import required

_RULES = CONVENTIONS["onnx"]
_NODE = 64
"""bytes that a node is taken for: functions that call each other twice double with every one of them"""

Constants = MutableMapping[str, tuple[str, Any]]
"""{a value's name where it is used: (its name where it is made, after those of the nodes around it; its tensor)}"""


_FOLDING = (
    "; exporters fold a batch norm into the layer before it, and then it is gone: load the model itself or its "
    "weights, or export it as it is in training (torch.onnx: training=TrainingMode.TRAINING)"
)


class Contents:
    """What a walk through the graphs has found.

    Attributes:
        layers: by the names of their statistics, "layer1.0.bn1" in torch's models, or of their nodes.
        operators: how many nodes there are of each kind, "Conv with bias" apart from "Conv".
        folded: nodes into which an exporter has folded a batch norm, by the names that it has given.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self.operators: Counter[str] = Counter()
        self.folded: list[str] = []

    def instead(self) -> str:
        """What there is where there is no batch norm."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.operators.most_common(8))
        folded = any(kind.endswith(" with bias") for kind in self.operators)
        return f"there are {counts or 'no nodes'}{_FOLDING if folded else ''}"

    def remark(self, path: Path) -> str:
        """What there is beside the batch norms that the owner may not know of."""
        if not self.folded:
            return ""
        return f"{path} has fewer batch norms than the model had, since {_some(self.folded)} took them in{_FOLDING}"


def contents_of(path: Path) -> Contents:
    """Raises BackendNotInstalled; what onnx and NumPy raise of a damaged file."""
    with required(f"{path} takes onnx to read", "onnx"):
        import onnx
    model = onnx.load(path, load_external_data=False)
    if not model.HasField("graph"):
        raise ValueError("it has no graph")
    walk = _Walk(path, model.functions)
    walk.graph(model.graph, {}, "")
    return walk.contents


class _Walk:
    def __init__(self, path: Path, functions: Iterable[Any]):
        self.path = path
        self.budget = Budget(path)
        self.functions = {_key(f.domain, f.name, f): f for f in functions}
        self.contents = Contents()

    def graph(self, graph: Any, outside: Constants, prefix: str) -> None:
        """A graph sees what is outside of it, where it was made before it."""
        inside: Constants = {tensor.name: (prefix + tensor.name, tensor) for tensor in graph.initializer}
        self.nodes(graph.node, ChainMap(inside, outside), {}, prefix)

    def nodes(self, nodes: Iterable[Any], constants: Constants, arguments: Mapping[str, Any], prefix: str) -> None:
        """arguments: the attributes with which a function was called, to which those of its nodes can refer."""
        from onnx import helper

        for node in nodes:
            self.budget.take(node.name, _NODE)
            attributes = {a.name: arguments.get(a.ref_attr_name, a) if a.ref_attr_name else a for a in node.attribute}
            standard = node.domain in ("", "ai.onnx")
            if standard and node.op_type == "Constant":
                made = prefix + node.output[0]
                constants.update((node.output[0], (made, a.t)) for a in node.attribute if a.name == "value")
            if standard and node.op_type == "Identity" and node.input[0] in constants:
                # torch's exporter keeps equal arrays once, and names the others by this
                constants[node.output[0]] = prefix + node.output[0], constants[node.input[0]][1]
            if standard and node.op_type == "BatchNormalization":
                values = {n: helper.get_attribute_value(a) for n, a in attributes.items() if not a.ref_attr_name}
                self.batch_norm(node, values, constants, prefix)
            self.count(node)
            for attribute in attributes.values():
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self.graph(inner, constants, f"{prefix}{_name(node)}/{attribute.name}/")
            if (function := self.functions.get(_key(node.domain, node.op_type, node))) is not None:
                defaults = {a.name: a for a in function.attribute_proto}
                pairs = zip(function.input, node.input, strict=False)
                given = {formal: constants[name] for formal, name in pairs if name in constants}
                self.nodes(function.node, given, {**defaults, **attributes}, f"{prefix}{_name(node)}/")

    def count(self, node: Any) -> None:
        is_linear = node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2 and node.input[2] != ""
        self.contents.operators[f"{node.op_type} with bias" if is_linear else node.op_type] += 1
        if is_linear and re.fullmatch(rf"onnx::Conv_\d+|{re.escape(node.input[1])}_bias", node.input[2]):
            # what torch's two exporters call the bias of a convolution that had none
            self.contents.folded.append(_name(node))

    def batch_norm(self, node: Any, attributes: Mapping[str, Any], constants: Constants, prefix: str) -> None:
        inputs = dict(zip(_RULES.names, node.input[1:], strict=False))
        found = {n: self.array(constants[i][1]) for n, i in inputs.items() if i in constants}
        problems = [
            f"its {n} is {i!r}, which is computed in the graph" for n, i in inputs.items() if i not in constants
        ]
        if attributes.get("spatial", 1) == 0:
            problems.append("it has spatial=0, statistics for each position, which is no batch norm of channels")
        told = {_RULES.eps[0]: 1e-5, _RULES.momentum[0]: 0.9}  # where the node has none, by ONNX's specification
        # ONNX keeps float32: 1e-5 for what float64 would take for 9.99999974e-06.
        told |= {name: float(str(np.float32(attributes[name]))) for name in told if name in attributes}
        made = [constants[i][0] if i in constants else prefix + i for i in node.input[3:5]]
        shared = {name.rpartition(".")[0] for name in made}
        name = shared.pop() if len(shared) == 1 and "" not in shared else prefix + _name(node)
        if name in self.contents.layers:
            problems.append("another one has this name")
        self.contents.layers[name] = Layer(_RULES, found, told, problems, axis=1)

    def array(self, tensor: Any) -> np.ndarray:
        """The array of a tensor. Of a file beside the model's no more is read than the tensor's shape asks for."""
        from onnx import external_data_helper, helper, numpy_helper

        if external_data_helper.uses_external_data(tensor):
            size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            lengths = [entry.value for entry in tensor.external_data if entry.key == "length"]
            if lengths not in ([], [str(size)]):
                raise ValueError(f"{tensor.name} has {size} bytes by its shape, but {', '.join(lengths)} in its file")
            if not lengths:  # up to the file's end
                tensor.external_data.add(key="length", value=str(size))
            self.budget.take(tensor.name, size)
            external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            return numpy_helper.to_array(tensor)
        array = numpy_helper.to_array(tensor)
        self.budget.take(tensor.name, array.nbytes)  # each time that a layer has it
        return array


def _key(domain: str, name: str, holder: Any) -> tuple[str, str, str]:
    return domain, name, getattr(holder, "overload", "")  # since ONNX 1.16


def _name(node: Any) -> str:
    return node.name or node.output[0]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
