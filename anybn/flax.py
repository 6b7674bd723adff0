"""For users of Flax: its batch norm layers over anybn, `BatchNorm` for NNX and `LinenBatchNorm` for Linen.

>>> import jax, anybn.flax  # doctest: +SKIP
>>> from flax import nnx
>>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), anybn.flax.BatchNorm(8, rngs=nnx.Rngs(0)))
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from anybn._stateless import Held, batch_norm_of, few_values
from anybn.checkpoints.conventions import complement

__all__ = ["BatchNorm", "LinenBatchNorm"]


class BatchNorm(nnx.BatchNorm):
    """``flax.nnx.BatchNorm``: its constructor, variables and meaning, and anybn's numbers.

    Where it differs: a channel whose batch has a NaN or an infinity keeps its averages, and ``use_fast_variance`` does
    not matter. Masks, ``axis_index_groups``, several feature axes, complex numbers and training on one value per
    channel are left to Flax's own code, with its accuracy.

    The call takes ``residual`` and ``activation="relu"`` besides, as `anybn.batch_norm` does.

    >>> import anybn.flax  # doctest: +SKIP
    >>> layer = anybn.flax.BatchNorm(8, epsilon=1e-3, rngs=nnx.Rngs(0))
    """

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Any = None,
        activation: str | None = None,
    ) -> Any:
        """As Flax's: x of any rank, with its features on ``axis``; y in ``dtype``, or what x and the arrays promote to.

        Raises ValueError where residual or activation comes with what is left to Flax.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None or not _is_ours(self, x, mask, use_running_average, self.axis_name):
            _refuse_fusion(residual, activation)
            return super().__call__(x, use_running_average, mask=mask)
        scale, bias = (None if variable is None else variable[...] for variable in (self.scale, self.bias))
        held = Held(scale, bias, self.mean[...], self.var[...])
        x, *_ = self.promote_dtype((x, held.mean, held.var, scale, bias), dtype=self.dtype)
        options = {"residual": residual, "activation": activation, "group": self.axis_name}
        y, mean, var = _batch_norm(self, x, held, use_running_average, options)
        if not use_running_average:
            self.mean[...], self.var[...] = mean, var
        return y


class LinenBatchNorm(linen.BatchNorm):
    """``flax.linen.BatchNorm``: its fields, variables and meaning, and anybn's numbers; see `BatchNorm`.

    ``force_float32_reductions=False`` is left to Flax's own code as well.

    >>> import anybn.flax  # doctest: +SKIP
    >>> y = anybn.flax.LinenBatchNorm(use_running_average=False)(x)  # within a module of Linen
    """

    @linen.compact
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Any = None,
        activation: str | None = None,
    ) -> Any:
        """As Flax's, see `BatchNorm`."""
        uses_average = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        starts = self.is_initializing()  # when the devices of axis_name need not be there
        group = None if starts else self.axis_name
        if not (_is_ours(self, x, mask, uses_average, group) and self.force_float32_reductions):
            _refuse_fusion(residual, activation)
            return super().__call__(x, use_running_average, mask=mask)
        shape = (x.shape[_one(self.axis)],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        held = Held(scale, bias, mean.value, var.value)
        options = {"residual": residual, "activation": activation, "group": group}
        y, new_mean, new_var = _batch_norm(self, x, held, uses_average, options)
        if not (uses_average or starts):
            mean.value, var.value = new_mean, new_var
        return y


def _one(axis: Any) -> int:
    return axis[0] if isinstance(axis, (tuple, list)) else axis


def _is_ours(layer: Any, x: Any, mask: Any, uses_average: bool, group: Any) -> bool:
    several = isinstance(layer.axis, (tuple, list)) and len(layer.axis) != 1
    real = jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(layer.dtype or x.dtype, jnp.complexfloating)
    if mask is not None or layer.axis_index_groups is not None or several or not real:
        return False
    return uses_average or group is not None or not few_values(x, _one(layer.axis))


def _refuse_fusion(residual: Any, activation: str | None) -> None:
    if residual is not None or activation is not None:
        raise ValueError(
            "residual or activation was given with what Flax's own code computes, such as a mask or one value per "
            "channel: add and activate after the layer"
        )


def _batch_norm(layer: Any, x: Any, held: Held, uses_average: bool, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    options["group"] = None if uses_average else options["group"]
    dtype = layer.dtype or jnp.result_type(*(a for a in (x, held.weight, held.bias) if a is not None))
    x = jnp.asarray(x, jnp.promote_types(x.dtype, dtype))
    if options["residual"] is not None:
        options["residual"] = options["residual"].astype(x.dtype)
    y, mean, var = batch_norm_of(
        x,
        held,
        eps=layer.epsilon,
        momentum=complement(layer.momentum),
        training=not uses_average,
        axis=_one(layer.axis),
        **options,
    )
    return y.astype(dtype), mean, var
