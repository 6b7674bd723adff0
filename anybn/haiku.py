"""For users of Haiku: its batch norm module over anybn.

>>> import haiku as hk, anybn.haiku  # doctest: +SKIP
>>> net = hk.transform_with_state(lambda x: anybn.haiku.BatchNorm(True, True, 0.9)(x, is_training=True))
"""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax.numpy as jnp

from anybn._stateless import Held, batch_norm_of, few_values

__all__ = ["BatchNorm"]


class BatchNorm(hk.BatchNorm):
    """``haiku.BatchNorm``: its constructor, parameters, state and meaning, and anybn's numbers.

    Where it differs: a channel whose batch has a NaN or an infinity keeps its averages. A scale or offset that is given
    in the call, reduced axes of one's own, ``cross_replica_axis_index_groups``, integers and training on one value per
    channel are left to Haiku's own code, with its accuracy.

    >>> import anybn.haiku  # doctest: +SKIP
    >>> norm = anybn.haiku.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)  # within hk.transform
    """

    def __call__(
        self,
        inputs: Any,
        is_training: bool,
        test_local_stats: bool = False,
        scale: Any = None,
        offset: Any = None,
    ) -> Any:
        """As Haiku's: inputs of any rank and floating dtype, and y of the same."""
        inputs = jnp.asarray(inputs)
        theirs = self.axis, self.cross_replica_axis_index_groups, scale, offset
        learns = is_training or test_local_stats
        is_batch = inputs.ndim > 1 and jnp.issubdtype(inputs.dtype, jnp.floating)
        alone = learns and self.cross_replica_axis is None and is_batch and few_values(inputs, self.channel_index)
        if alone or not is_batch or any(given is not None for given in theirs):
            return super().__call__(inputs, is_training, test_local_stats, scale, offset)
        axis = self.channel_index % inputs.ndim
        channels = inputs.shape[axis]
        shape = [channels if i == axis else 1 for i in range(inputs.ndim)]
        if learns:
            for average in (self.mean_ema, self.var_ema):
                average.initialize(shape, inputs.dtype)
        averages = [average.average.reshape(-1) for average in (self.mean_ema, self.var_ema)]
        weight, bias = (
            hk.get_parameter(name, shape, inputs.dtype, init).reshape(-1) if exists else None
            for name, exists, init in (
                ("scale", self.create_scale, self.scale_init),
                ("offset", self.create_offset, self.offset_init),
            )
        )
        name = self.cross_replica_axis
        group = tuple(name) if isinstance(name, (list, tuple)) else name
        # With momentum 1 the batch's own statistics come out; of a channel that is not finite those that were there,
        # with which a debiased average stays what it is.
        y, mean, var = batch_norm_of(
            inputs,
            Held(weight, bias, *averages),
            eps=self.eps,
            momentum=1.0,
            training=learns,
            axis=axis,
            group=group if learns else None,
        )
        if is_training:
            self.mean_ema(jnp.reshape(mean, shape).astype(inputs.dtype))
            self.var_ema(jnp.reshape(var, shape).astype(inputs.dtype))
        return y
