"""How other frameworks write a batch norm down, as data: names and their order, settings, what the numbers mean.

A framework's name stands for a *quantity*: one of what a state holds (weight, bias, running_mean, running_var,
num_batches_tracked), or

- ``hidden_mean``, ``hidden_var``: averages that are divided by ``1 - decay**counter`` before use (Adam's debiasing,
  Kingma & Ba 2015, section 3); ``counter`` is the number of batches in them;
- ``unfilled``: True until the first batch, which then replaces the running statistics;
- ``ignored_weight``: an array that is kept but taken to be 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from anybn import _settings


@dataclass(frozen=True)
class Convention:
    """One framework's batch norm, a row of `CONVENTIONS`.

    Attributes:
        names: the framework's name of each array -> the quantity it holds, in the framework's order; "/" nests.
        eps, momentum: (name, default) of these settings; a default of None means that the framework wants to be told.
        decay: its momentum is the weight of the old, ``running = momentum * running + (1 - momentum) * batch``.
        ddof: running_var averages ``m2 / (count - ddof)``.
        affine: the settings that switch weight and bias on: one for both, one for each, none where both always exist.
        apart: there may be a weight without a bias, and a bias without a weight.
        bias: the setting that switches the bias off alone, where affine is one for both.
        track: the setting that switches the running statistics on, or "" where they always exist.
        cumulative: momentum may be None, for the average over all batches.
        size: the setting that is the number of channels, or "" where the input tells it.
        constants: settings that tell this convention from the framework's others.
        keeps_rank: the arrays have x's rank, with 1 on all axes but the channels'.
        collections: what may stand before a layer's name: one tree for parameters, another for statistics.
        separators: what may stand between a layer's name and an array's; the first does in new files.
        axis: of the channels, where a layer does not tell it.
        aliases: other names in use -> those in names.
        extras: names that some of its layers have beside those, which tell a state nothing: -> what they hold, with
            running_std for ``sqrt(running_var + eps)``.
    """

    names: Mapping[str, str]
    eps: tuple[str, float]
    momentum: tuple[str, float | None]
    decay: bool
    ddof: int
    affine: tuple[str, ...] = ()
    apart: bool = False
    bias: str = ""
    track: str = ""
    cumulative: bool = False
    size: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    keeps_rank: bool = False
    collections: tuple[str, ...] = ()
    separators: str = "/."
    axis: int = 1
    aliases: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, field: str) -> str:
        """The name under which running_mean or running_var stands, debiased or not."""
        quantities = field, field.replace("running", "hidden")
        return min((quantities.index(q), name) for name, q in self.names.items() if q in quantities)[1]

    @cached_property
    def _key(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, (*self.names, *self.aliases, *self.extras)))
        collection = f"(?:(?:{'|'.join(self.collections)})[./:])?" if self.collections else ""
        # ":0" ends TensorFlow's names.
        return re.compile(rf"{collection}(?:(.*)[{re.escape(self.separators)}])?({names})(?::0)?", re.DOTALL)

    def parse(self, key: str) -> tuple[str, str] | None:
        """(layer, name) for the key of an array among a model's weights; None if it does not end in one of names."""
        if (match := self._key.fullmatch(key)) is None:
            return None
        layer, name = match.groups()
        return layer or "", self.aliases.get(name, name)

    def state_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """eps, momentum and ddof as `BatchNormState` takes them, from settings by the framework's names and meaning."""
        (eps_name, default_eps), (momentum_name, default_momentum) = self.eps, self.momentum
        for name in settings:
            if name not in (eps_name, momentum_name):
                raise TypeError(f"{name!r} is no setting of this convention: it has {eps_name!r} and {momentum_name!r}")
        momentum = _settings.momentum(settings.get(momentum_name, default_momentum), momentum_name)
        eps = _settings.eps(settings.get(eps_name, default_eps), eps_name)
        if momentum is None and not self.cumulative:
            momentum = 0.9 if self.decay else 0.1  # not known, and of no consequence before training goes on
        if self.decay:
            momentum = complement(momentum)
        return {"eps": eps, "momentum": momentum, "ddof": self.ddof}

    def own_settings(self, eps: float, momentum: float | None) -> dict[str, Any]:
        """The reverse. Raises ValueError for a momentum of None, which only torch knows."""
        if momentum is None and not self.cumulative:
            raise ValueError(
                "momentum is None, the average over all batches, which this convention has no setting for: "
                "set state.momentum to a number first"
            )
        return {self.eps[0]: eps, self.momentum[0]: complement(momentum) if self.decay else momentum}


def complement(momentum: Any) -> float:
    """``1 - momentum``, without the digits that binary numbers add: 0.01 for 0.99."""
    return round(1.0 - momentum, 15)


_TORCH = Convention(
    names={name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    eps=("eps", 1e-5),
    momentum=("momentum", 0.1),
    decay=False,
    ddof=1,
    affine=("affine",),
    apart=True,
    bias="bias",
    track="track_running_stats",
    cumulative=True,
    size="num_features",
    separators="./",
)
_FLAX = Convention(
    names={"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
    eps=("epsilon", 1e-5),
    momentum=("momentum", 0.99),
    decay=True,
    ddof=0,
    affine=("use_scale", "use_bias"),
    apart=True,
    size="num_features",
    collections=("params", "batch_stats"),
    axis=-1,
)
_EQUINOX = Convention(
    names={
        "weight": "weight",
        "bias": "bias",
        "batch_counter": "counter",
        "batch_state_index/0": "hidden_mean",
        "batch_state_index/1": "hidden_var",
    },
    eps=("eps", 1e-5),
    momentum=("momentum", 0.99),
    decay=True,
    ddof=0,
    affine=("channelwise_affine",),
    size="input_size",
    constants={"mode": "batch"},
    separators="./",
)
_MXNET = Convention(
    names={"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"},
    eps=("epsilon", 1e-5),
    momentum=("momentum", 0.9),
    decay=True,
    ddof=0,
    size="in_channels",
    collections=("arg", "aux"),
    separators="_./",
    aliases={"moving_mean": "running_mean", "moving_var": "running_var"},
)

ConventionName = Literal[
    "torch",
    "keras",
    "flax",
    "flax-linen",
    "haiku",
    "chainer",
    "onnx",
    "mlx",
    "equinox",
    "equinox-ema",
    "mxnet",
    "mxnet-fix-gamma",
]

#: Read from the source of torch 2.13, Keras 3.15, Flax 0.12 (NNX, then Linen), Haiku 0.0.17, Chainer 7.8, MLX 0.32,
#: Equinox 0.13 and MXNet 1.9, and from ONNX's BatchNormalization, version 15; tests/checkpoints runs them.
CONVENTIONS: dict[ConventionName, Convention] = {
    "torch": _TORCH,
    "keras": Convention(
        names={"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"},
        eps=("epsilon", 1e-3),
        momentum=("momentum", 0.99),
        decay=True,
        ddof=0,
        affine=("scale", "center"),
        apart=True,
        collections=("trainable_variables", "non_trainable_variables"),
        axis=-1,
        extras={  # of renorm=True
            "moving_stddev": "running_std",
            "renorm_mean": "running_mean",
            "renorm_stddev": "running_std",
        },
    ),
    "flax": _FLAX,
    "flax-linen": replace(
        _FLAX,
        names={
            "params/scale": "weight",
            "params/bias": "bias",
            "batch_stats/mean": "running_mean",
            "batch_stats/var": "running_var",
        },
        size="",
        collections=(),
    ),
    "haiku": Convention(
        names={
            "offset": "bias",
            "scale": "weight",
            "~/mean_ema/average": "running_mean",
            "~/mean_ema/counter": "counter",
            "~/mean_ema/hidden": "hidden_mean",
            "~/var_ema/average": "running_var",
            "~/var_ema/counter": "counter",
            "~/var_ema/hidden": "hidden_var",
        },
        eps=("eps", 1e-5),
        momentum=("decay_rate", None),
        decay=True,
        ddof=0,
        affine=("create_scale", "create_offset"),
        apart=True,
        keeps_rank=True,
        collections=("params", "state"),
        axis=-1,
    ),
    "chainer": Convention(
        names={
            "gamma": "weight",
            "beta": "bias",
            "avg_mean": "running_mean",
            "avg_var": "running_var",
            "N": "num_batches_tracked",
        },
        eps=("eps", 2e-5),
        momentum=("decay", 0.9),
        decay=True,
        ddof=1,
        affine=("use_gamma", "use_beta"),
        apart=True,
        size="size",
    ),
    "onnx": Convention(
        names={"scale": "weight", "B": "bias", "input_mean": "running_mean", "input_var": "running_var"},
        eps=("epsilon", 1e-5),
        momentum=("momentum", 0.9),
        decay=True,
        ddof=0,
    ),
    "mlx": replace(
        _TORCH,
        names={name: name for name in ("weight", "bias", "running_mean", "running_var")},
        apart=False,
        bias="",
        cumulative=False,
        axis=-1,
    ),
    "equinox": _EQUINOX,
    "equinox-ema": replace(
        _EQUINOX,
        names={
            "weight": "weight",
            "bias": "bias",
            "ema_first_time_index": "unfilled",
            "ema_state_index/0": "running_mean",
            "ema_state_index/1": "running_var",
        },
        constants={"mode": "ema"},
    ),
    "mxnet": _MXNET,
    "mxnet-fix-gamma": replace(
        _MXNET,
        names={"gamma": "ignored_weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"},
        eps=("eps", 1e-3),
        size="",
        constants={"fix_gamma": True},
        aliases={"running_mean": "moving_mean", "running_var": "moving_var"},
    ),
}


def convention_called(name: str) -> Convention:
    """The row of `CONVENTIONS`. Raises ValueError for a name that is not there."""
    return CONVENTIONS[_settings.choice("convention", name, tuple(CONVENTIONS))]


# -- one layer of a model --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A batch norm as a framework has written it."""

    convention: Convention
    arrays: Mapping[str, Any]
    """by the convention's names"""
    settings: Mapping[str, float]
    """eps and momentum that are told, by the convention's names"""
    problems: list[str]
    """found while it was read"""
    axis: int | None = None
    """of x's channels, where it is told"""

    @property
    def framework(self) -> ConventionName:
        """The name of its convention."""
        return next(name for name, row in CONVENTIONS.items() if row == self.convention)


def one_axis(axis: Any) -> int | None:
    """A layer's own axis; Flax and Keras 2 have several, of which one can be one of channels."""
    axis = axis[0] if isinstance(axis, (tuple, list)) and len(axis) == 1 else axis
    return axis if type(axis) is int else None


def flattened(tree: Mapping[Any, Any], separator: str = "/", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and tuples with their paths, as in "batch_norm/~/mean_ema/average"."""
    for key, value in tree.items():
        key = separator.join(map(str, key)) if isinstance(key, tuple) else key  # of nnx.to_flat_state
        if isinstance(value, tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from flattened(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value
