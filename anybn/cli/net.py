"""A small net, its layers and their gradients, by hand over the Array API: one piece of code for every array library.

Each layer has ``vjp(x) -> (y, pullback)`` as `anybn.BatchNorm` has. Arrays are channels last: ``(N, H, W, C)`` or
``(N, C)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace

import anybn
from anybn.core.call import Array, Gradients

WIDTHS = {"conv": (1, 16, 16, 16), "dense": (64, 64, 64, 64)}
SIDE, CLASSES = 8, 10
LEARNING_RATE, SGD_MOMENTUM = 0.05, 0.9

Pullback = Callable[[Array], Gradients]


# -- layers ----------------------------------------------------------------------------------------------------


class Layer(Protocol):
    """``state`` has weight and bias, None where the layer has none."""

    @property
    def state(self) -> Any: ...

    def vjp(self, x: Array) -> tuple[Array, Pullback]: ...


@dataclass
class Parameters:
    weight: Array | None = None
    bias: Array | None = None


class Linear:
    """``x @ weight + bias`` on the last axis."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, *, bias: bool):
        scale = np.sqrt(2 / inputs)  # He et al. 2015: keeps the variance through relu
        self.state = Parameters(scale * rng.standard_normal((inputs, outputs)), np.zeros(outputs) if bias else None)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        xp, weight, bias = array_namespace(x), self.state.weight, self.state.bias
        assert weight is not None
        inputs, outputs = weight.shape
        rows = xp.reshape(x, (-1, inputs))
        y = rows @ weight if bias is None else rows @ weight + bias

        def pullback(dy: Array) -> Gradients:
            dy = xp.reshape(dy, (-1, outputs))
            dbias = None if bias is None else xp.sum(dy, axis=0)
            return Gradients(xp.reshape(dy @ weight.T, x.shape), rows.T @ dy, dbias, None)

        return xp.reshape(y, (*x.shape[:-1], outputs)), pullback


@dataclass
class Fixed:
    """A layer without parameters."""

    vjp: Callable[[Array], tuple[Array, Pullback]]
    state: Parameters = field(default_factory=Parameters)


def padded(x: Array) -> Array:
    """(N, H, W, C) -> (N, H + 2, W + 2, C) with zeros around each image."""
    xp = array_namespace(x)
    for axis in (1, 2):
        border = xp.zeros_like(x[:, :1, :, :] if axis == 1 else x[:, :, :1, :])
        x = xp.concat([border, x, border], axis=axis)
    return x


def windows(x: Array) -> tuple[Array, Pullback]:
    """(N, H, W, C) -> (N, H, W, 9 C), the 3x3 neighbourhood of each pixel; `Linear` makes it a convolution."""
    xp = array_namespace(x)
    _, height, width, channels = x.shape
    offsets = [(i, j) for i in range(3) for j in range(3)]

    def shifted(a: Array, i: int, j: int) -> Array:
        return a[:, i : i + height, j : j + width, :]

    def pullback(dy: Array) -> Gradients:
        dy = padded(dy)
        dx = xp.zeros_like(x)
        for k, (i, j) in enumerate(offsets):
            dx = dx + shifted(dy[..., k * channels : (k + 1) * channels], 2 - i, 2 - j)
        return Gradients(dx, None, None, None)

    around = padded(x)
    return xp.concat([shifted(around, i, j) for i, j in offsets], axis=-1), pullback


def flattened(x: Array) -> tuple[Array, Pullback]:
    """(N, H, W, C) -> (N, H W C)."""
    xp = array_namespace(x)
    return xp.reshape(x, (x.shape[0], -1)), lambda dy: Gradients(xp.reshape(dy, x.shape), None, None, None)


def relu(x: Array) -> tuple[Array, Pullback]:
    xp = array_namespace(x)
    active = x > 0

    def where_active(a: Array) -> Array:
        return xp.where(active, a, xp.zeros_like(a))

    return where_active(x), lambda dy: Gradients(where_active(dy), None, None, None)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Mean loss and its gradient, for one-hot labels: both (N, CLASSES)."""
    xp = array_namespace(logits)
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    log_p = logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))
    n = logits.shape[0]
    return -xp.sum(labels * log_p) / n, (xp.exp(log_p) - labels) / n


# -- the net ---------------------------------------------------------------------------------------------------


class Net:
    """Blocks of a linear layer or convolution, batch norm and relu; without batch norm they have biases instead."""

    def __init__(self, kind: str, seed: int, *, batch_norm: bool):
        rng = np.random.default_rng(seed)  # both nets draw the same initial weights
        conv, widths = kind == "conv", WIDTHS[kind]
        self.layers: list[Layer] = []
        for inputs, outputs in pairwise(widths):
            if conv:
                self.layers.append(Fixed(windows))
            self.layers.append(Linear(9 * inputs if conv else inputs, outputs, rng, bias=not batch_norm))
            if batch_norm:
                self.layers.append(anybn.BatchNorm(outputs, axis=-1, activation="relu", dtype="float64"))
            else:
                self.layers.append(Fixed(relu))
        self.layers.append(Fixed(flattened))
        self.layers.append(Linear(widths[-1] * SIDE**2 if conv else widths[-1], CLASSES, rng, bias=True))
        self.velocity: dict[tuple[int, str], Array] = {}

    @property
    def norms(self) -> list[anybn.BatchNorm]:
        return [layer for layer in self.layers if isinstance(layer, anybn.BatchNorm)]

    def to(self, target: str) -> None:
        """Move everything but batch norm, whose state follows x by itself."""
        for layer in self.layers:
            if isinstance(layer, Linear):
                weight, bias = layer.state.weight, layer.state.bias
                bias = None if bias is None else anybn.asarray(bias, like=target)
                layer.state = Parameters(anybn.asarray(weight, like=target), bias)
        self.velocity = {key: anybn.asarray(v, like=target) for key, v in self.velocity.items()}

    def logits(self, x: Array) -> Array:
        for bn in self.norms:
            bn.eval()
        for layer in self.layers:
            x, _ = layer.vjp(x)
        return x

    def step(self, x: Array, labels: Array) -> float:
        """One step of gradient descent with momentum; the loss before it."""
        for bn in self.norms:
            bn.train()
        pullbacks = []
        for layer in self.layers:
            x, pullback = layer.vjp(x)
            pullbacks.append(pullback)
        loss, dy = cross_entropy(x, labels)
        for i in reversed(range(len(self.layers))):
            gradients = pullbacks[i](dy)
            self.descend(i, gradients)
            dy = gradients.x
        return float(loss)

    def descend(self, i: int, gradients: Gradients) -> None:
        state = self.layers[i].state
        for name in ("weight", "bias"):
            gradient = getattr(gradients, name)
            if gradient is not None:
                v = SGD_MOMENTUM * self.velocity.get((i, name), 0.0) + gradient
                self.velocity[i, name] = v
                setattr(state, name, getattr(state, name) - LEARNING_RATE * v)
