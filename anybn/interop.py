"""Other frameworks' names and conventions for a state; folding a state into a layer beside it.

`CONVENTIONS` says what each framework calls things and means by them. A state goes into one and comes out of one:

>>> import numpy as np, anybn
>>> from anybn import interop
>>> keras_weights = {name: np.full(2, 1.0, "float32") for name in ("gamma", "beta", "moving_mean", "moving_variance")}
>>> state = interop.from_state_dict(keras_weights, "keras", epsilon=1e-3, momentum=0.99)
>>> state
BatchNormState(2, eps=0.001, momentum=0.01, ddof=0) on numpy, 0 batches tracked
>>> list(state.state_dict("flax")), interop.settings(state, "flax")
(['scale', 'bias', 'mean', 'var'],
 {'num_features': 2, 'epsilon': 0.001, 'momentum': 0.99, 'use_scale': True, 'use_bias': True})

What every conversion keeps, exactly, is y in evaluation. How training goes on is the state's ``momentum`` and ``ddof``:

- running_var is copied, not rescaled between biased and unbiased: that would need the count of every batch in it, and
  would change y. ``ddof`` says how the next batches are averaged; `from_state_dict` sets it to the framework's.
- Haiku and Equinox (``mode="batch"``) divide their averages by ``1 - decay**counter`` while they are young. The divided
  averages are what evaluation uses, and so what a state takes; ``counter`` becomes num_batches_tracked. On the way out
  the division is undone. A state with num_batches_tracked 0 did not start there, so its counter is written as the
  number after which the divisor is 1: its statistics count in full, and training goes on from them.
- A framework that may lack weight or bias alone (torch, Keras, Flax, Haiku, Chainer) gives a state that lacks it too,
  ``scale=False`` or ``bias=False``, and takes it. Where both exist or none (Equinox, MLX), or always both (ONNX,
  MXNet), a state writes 1 and 0 for what it lacks.
- Where there is no count of batches, num_batches_tracked is 0.
- Equinox with ``mode="ema"`` normalizes with the running statistics in training too; a state only in evaluation.
- Haiku's arrays have x's rank: ``(1, C)``, ``(1, 1, 1, C)``. Any of these is read; what is written is ``(C,)``, to be
  reshaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anybn._fold import fold
from anybn.checkpoints.conventions import CONVENTIONS, Convention, ConventionName, Layer
from anybn.checkpoints.translation import decode_layer, layer_of, quantities_of
from anybn.core.call import Array
from anybn.state.state import BatchNormState

__all__ = ["CONVENTIONS", "Convention", "fold", "from_state_dict", "load_state_dict", "settings", "state_dict"]


def from_state_dict(
    mapping: Mapping[str, Any], convention: ConventionName = "torch", **settings: float
) -> BatchNormState:
    """The state, in NumPy, that one layer's arrays are in a framework; the way back is `BatchNormState.state_dict`.

    Args:
        mapping: names to arrays of any library, flat (``"~/mean_ema/average"``) or nested, with or without the
            collections in front (Flax's ``params`` and ``batch_stats``). Arrays that may be missing: counters; weight
            or bias or both where the framework can switch them off; running statistics in torch and MLX.
        convention: one of `CONVENTIONS`.
        settings: the layer's eps and momentum by the framework's names and in its meaning, as they stand in its code:
            ``epsilon=1e-3, momentum=0.99`` for Keras. Weights do not tell them; the default is the framework's.
            Equinox's hidden averages cannot be read without the right momentum.

    Returns:
        A `BatchNormState` with the framework's ``ddof``, in the dtype of weight or bias, or else float32.

    Raises CheckpointError that lists everything that is missing, foreign, misshapen or impossible; TypeError for an
    unknown setting; ValueError for an unknown convention.

    >>> import numpy as np, anybn
    >>> anybn.interop.from_state_dict({"params": {"scale": np.ones(2), "bias": np.zeros(2)},
    ...                                "batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}, "flax", momentum=0.9)
    BatchNormState(2, eps=1e-05, momentum=0.1, ddof=0, dtype='float64') on numpy, 0 batches tracked
    """
    return state_of(layer_of(mapping, convention, settings))


def state_of(layer: Layer) -> BatchNormState:
    """The state, in NumPy, that a layer of a framework is. Raises CheckpointError that lists every problem."""
    settings, values = decode_layer(layer)
    state = BatchNormState(**settings)
    state._store.fill(values)
    return state


def state_dict(state: BatchNormState, convention: ConventionName) -> dict[str, Array]:
    """See `BatchNormState.state_dict`."""
    return state.state_dict(convention)


def load_state_dict(state: BatchNormState, mapping: Mapping[str, Any], convention: ConventionName) -> None:
    """See `BatchNormState.load_state_dict`."""
    state.load_state_dict(mapping, convention)


def settings(state: BatchNormState, convention: ConventionName) -> dict[str, Any]:
    """The settings with which a framework makes the layer that a state is, by its names and in its meaning.

    ``keras.layers.BatchNormalization(**settings(state, "keras"))``; for ONNX, the attributes of the node. ``ddof`` has
    no setting in any of them, see the top of this module.

    Raises ValueError for an unknown convention, or for a state that it has no settings for: without running statistics
    (only torch and MLX), or with ``momentum=None`` (only torch).

    >>> import anybn
    >>> anybn.interop.settings(anybn.BatchNormState(3, eps=1e-3, momentum=0.01, affine=False), "keras")
    {'epsilon': 0.001, 'momentum': 0.99, 'scale': False, 'center': False}
    """
    quantities_of(state._settings(), convention)  # raises where it has none
    rules = CONVENTIONS[convention]
    switches = [a is not None for a in (state.weight, state.bias)]
    if rules.bias and switches == [False, True]:
        raise ValueError(
            f"state has scale=False, but {convention}'s layers with a bias have a weight: make a state with one of 1"
        )
    return {
        **({rules.size: state.num_features} if rules.size else {}),
        **rules.own_settings(state.eps, state.momentum),
        **dict(zip(rules.affine, switches if len(rules.affine) == 2 else [state.affine], strict=False)),
        **({rules.bias: False} if rules.bias and switches == [True, False] else {}),
        **({rules.track: state.track_running_stats} if rules.track else {}),
        **rules.constants,
    }
