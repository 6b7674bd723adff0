"""The batch norms of a model in memory, each with its own settings, and values put back into them.

Nothing is imported: who has a model of a framework has imported it. Layers are told by their class, so that a layer
norm or torch's ``InstanceNorm`` is none, whatever its arrays are called.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from anybn.backends.registry import backend_for, unwrapped
from anybn.checkpoints.conventions import CONVENTIONS, Convention, Layer, one_axis

Values = Mapping[str, tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
"""{layer: (arrays, settings)}, by its convention's names"""


class Model(ABC):
    """A model, and where its batch norms are."""

    def __init__(self, model: Any):
        self.model = model
        self.modules = dict(self.batch_norms(model))

    @abstractmethod
    def batch_norms(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The framework's layers by name."""

    @abstractmethod
    def layer(self, module: Any) -> Layer: ...

    @abstractmethod
    def written(self, values: Values) -> Any:
        """The model with these values: itself, or a copy where models do not change. All of them or none."""

    def layers(self) -> dict[str, Layer]:
        return {name: self.layer(module) for name, module in self.modules.items()}

    def contents(self) -> str:
        """What a model without any batch norm has."""
        return f"it is a {type(self.model).__name__}"


class _ByAttributes(Model):
    """Of a framework whose layers have their arrays and settings as attributes, and change in place."""

    convention: Convention

    @abstractmethod
    def assign(self, variable: Any, value: np.ndarray) -> None: ...

    def layer(self, module: Any) -> Layer:
        rules = self.convention
        variables = {name: getattr(module, name, None) for name in (*rules.names, *rules.extras)}
        arrays = {name: unwrapped(a) for name, a in variables.items() if a is not None}
        settings = {name: getattr(module, name) for name, _ in (rules.eps, rules.momentum) if hasattr(module, name)}
        return Layer(rules, arrays, settings, [], one_axis(getattr(module, "axis", None)))

    def written(self, values: Values) -> Any:
        done: list[Callable[[], None]] = []

        def change(old: Any, new: Any, put: Callable[[Any], None]) -> None:
            done.append(lambda: put(old))
            put(new)

        try:
            for name, (arrays, settings) in values.items():
                module = self.modules[name]
                for attribute, array in arrays.items():
                    variable = getattr(module, attribute)
                    present = unwrapped(variable)
                    old = np.array(backend_for(present).to_numpy(present))
                    change(old, array, lambda a, variable=variable: self.assign(variable, a))  # type: ignore[misc]
                for attribute, value in settings.items():
                    old = getattr(module, attribute)
                    change(old, value, lambda v, m=module, a=attribute: setattr(m, a, v))  # type: ignore[misc]
        except BaseException:
            for undo in reversed(done):
                with suppress(Exception):  # of the one that failed
                    undo()
            raise
        return self.model


class Torch(_ByAttributes):
    convention = CONVENTIONS["torch"]

    def batch_norms(self, model: Any) -> Iterator[tuple[str, Any]]:
        modules = sys.modules["torch"].nn.modules
        for name, module in model.named_modules():
            # torchvision's FrozenBatchNorm2d is no subclass
            frozen = hasattr(module, "running_var") and hasattr(module, "eps")
            is_instance_norm = isinstance(module, modules.instancenorm._InstanceNorm)
            if isinstance(module, modules.batchnorm._BatchNorm) or (frozen and not is_instance_norm):
                yield name, module

    def assign(self, variable: Any, value: np.ndarray) -> None:
        torch = sys.modules["torch"]
        if not variable.is_leaf:
            raise ValueError(
                "model has a batch norm whose weight or bias a parametrization computes, and a value written to it "
                "would be lost: remove the parametrization"
            )
        with torch.no_grad():
            variable.copy_(torch.from_numpy(np.asarray(value, None if value.dtype.kind in "iub" else np.float64)))


class Keras(_ByAttributes):
    convention = CONVENTIONS["keras"]

    def batch_norms(self, model: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        if isinstance(model, sys.modules["keras"].layers.BatchNormalization):
            yield "/".join(path), model
        for layer in model._flatten_layers(include_self=False, recursive=False):
            yield from self.batch_norms(layer, (*path, layer.name))

    def assign(self, variable: Any, value: np.ndarray) -> None:
        variable.assign(value)


class NNX(_ByAttributes):
    convention = CONVENTIONS["flax"]

    def batch_norms(self, model: Any) -> Iterator[tuple[str, Any]]:
        nnx = sys.modules["flax.nnx"]
        found = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)}
        for path in sorted(found, key=lambda path: [(isinstance(p, str), p) for p in path]):
            yield "/".join(map(str, path)), found[path]

    def assign(self, variable: Any, value: np.ndarray) -> None:
        variable[...] = sys.modules["jax"].numpy.asarray(value)


class Equinox(Model):
    """Of ``(model, state)``, since Equinox keeps statistics apart from the model."""

    def batch_norms(self, model: Any) -> Iterator[tuple[str, Any]]:
        tree_util = sys.modules["jax"].tree_util
        for path, leaf in self._flattened(model)[0]:
            if isinstance(leaf, self._batch_norm):
                yield tree_util.keystr(path, simple=True, separator="."), leaf

    @property
    def _batch_norm(self) -> Any:
        return sys.modules["equinox"].nn.BatchNorm

    def _flattened(self, model: Any) -> Any:
        is_leaf: Callable[[Any], bool] = lambda node: isinstance(node, self._batch_norm)  # noqa: E731
        return sys.modules["jax"].tree_util.tree_flatten_with_path(model[0], is_leaf=is_leaf)

    def layer(self, module: Any) -> Layer:
        _, state = self.model
        rules = CONVENTIONS["equinox" if module.mode == "batch" else "equinox-ema"]
        arrays = {name: self._get(state, module, name) for name in rules.names}
        settings = {"eps": module.eps, "momentum": module.momentum}
        return Layer(rules, {n: a for n, a in arrays.items() if a is not None}, settings, [])

    @staticmethod
    def _get(state: Any, module: Any, name: str) -> Any:
        """weight or bias, or "batch_state_index/0": one of the averages that the state has for this index."""
        attribute, _, number = name.partition("/")
        value = getattr(module, attribute)
        if attribute in ("weight", "bias"):
            return value
        kept = state.get(value)
        return kept[int(number)] if number else kept

    def written(self, values: Values) -> Any:
        jax = sys.modules["jax"]
        state = jax.tree_util.tree_map(lambda a: a, self.model[1])  # a copy: set uses a state up
        leaves, tree = self._flattened(self.model)
        new = []
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if isinstance(leaf, self._batch_norm) and name in values:
                arrays, settings = values[name]
                leaf, state = self._changed(leaf, state, arrays, settings)
            new.append(leaf)
        return jax.tree_util.tree_unflatten(tree, new), state

    @staticmethod
    def _changed(
        module: Any, state: Any, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        jnp = sys.modules["jax"].numpy
        module = copy.copy(module)
        given = {name: jnp.asarray(a) for name, a in arrays.items()}
        parts: dict[str, dict[int, Any]] = {}
        for name, array in given.items():
            attribute, _, number = name.partition("/")
            if attribute in ("weight", "bias"):
                object.__setattr__(module, attribute, array)  # of a copy that nobody else has yet
            elif number:
                parts.setdefault(attribute, {})[int(number)] = array
            else:
                index = getattr(module, attribute)
                weak = state.get(index).weak_type  # a type of its own to Equinox
                state = state.set(index, jnp.asarray(array.item()) if weak else array)
        for attribute, averages in parts.items():
            state = state.set(getattr(module, attribute), tuple(averages[i] for i in sorted(averages)))
        for name, value in settings.items():
            object.__setattr__(module, name, value)
        return module, state

    def contents(self) -> str:
        return f"it is a {type(self.model[0]).__name__}"


_MODELS: dict[str, type[Model]] = {
    "torch.nn.modules.module.Module": Torch,
    "keras.src.layers.layer.Layer": Keras,
    "flax.nnx.module.Module": NNX,
}


def model_of(source: Any) -> Model | None:
    """What deals with a model of a framework, or with Equinox's ``(model, state)``; None for what is no model."""
    for cls in type(source).__mro__:
        if (kind := _MODELS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return kind(source)
    is_pair = isinstance(source, tuple) and len(source) == 2 and "equinox" in sys.modules
    return Equinox(source) if is_pair and isinstance(source[1], sys.modules["equinox"].nn.State) else None
