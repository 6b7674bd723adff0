"""For users of Equinox: its batch norm layer over anybn.

>>> import equinox as eqx, anybn.equinox  # doctest: +SKIP
>>> layer, state = eqx.nn.make_with_state(anybn.equinox.BatchNorm)(8, axis_name="batch", mode="batch")
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from anybn._stateless import Held, batch_norm_of

__all__ = ["BatchNorm"]


class BatchNorm(eqx.nn.BatchNorm):
    """``equinox.nn.BatchNorm``: its constructor, state and meaning, and anybn's numbers.

    It is called as Equinox's, one sample at a time under ``jax.vmap(..., axis_name=...)``, whose batch is then the
    group of `anybn.batch_norm`. Where it differs: a channel whose batch has a NaN or an infinity keeps its averages.
    Complex numbers, one value per channel, and ``mode="ema"``, which normalizes with averages in training too, are
    left to Equinox's own code in training.

    >>> import anybn.equinox  # doctest: +SKIP
    >>> layer, state = eqx.nn.make_with_state(anybn.equinox.BatchNorm)(8, axis_name="batch", mode="batch")
    """

    def __call__(self, x: Any, state: Any, *, key: Any = None, inference: bool | None = None) -> tuple[Any, Any]:
        """As Equinox's: x of shape ``(C, ...)``, without a batch axis; returns (y, state)."""
        x, inference = jnp.asarray(x), self.inference if inference is None else inference
        axis_name = tuple(self.axis_name) if isinstance(self.axis_name, list) else self.axis_name
        theirs = not inference and (self.mode == "ema" or x.size // x.shape[0] * jax.lax.psum(1, axis_name) < 2)
        if theirs or not jnp.issubdtype(x.dtype, jnp.floating):
            return super().__call__(x, state, key=key, inference=inference)
        options = {"eps": self.eps, "momentum": 1.0, "axis": 1}
        if self.mode == "ema":
            y, *_ = batch_norm_of(x[None], self._held(*state.get(self.ema_state_index)), training=False, **options)
            return y[0], state
        counter = state.get(self.batch_counter)
        hidden = state.get(self.batch_state_index)
        debiasing = jnp.where(counter == 0, 1, 1 - self.momentum**counter)
        held = self._held(*(average / debiasing for average in hidden))
        if inference:
            y, *_ = batch_norm_of(x[None], held, training=False, **options)
            return y[0], state
        # With momentum 1 the batch's own statistics come out; of a channel that is not finite those that were there,
        # with which a debiased average stays what it is.
        y, *statistics = batch_norm_of(x[None], held, training=True, group=axis_name, **options)
        new = tuple(
            old * self.momentum + value.astype(old.dtype) * (1 - self.momentum)
            for old, value in zip(hidden, statistics, strict=True)
        )
        return y[0], state.set(self.batch_counter, counter + 1).set(self.batch_state_index, new)

    def _held(self, mean: Any, var: Any) -> Held:
        return Held(self.weight, self.bias, mean, var)
