"""For users of Keras 3: its batch norm layer over anybn, with the same numbers on its torch, JAX and NumPy backends.

>>> import numpy as np, keras, anybn.keras  # doctest: +SKIP
>>> model = keras.Sequential([keras.Input((4,)), anybn.keras.BatchNormalization(), keras.layers.Dense(1)])
"""

from __future__ import annotations

from typing import Any

import keras

from anybn._stateless import Held, batch_norm_of, few_values
from anybn.checkpoints.conventions import complement
from anybn.core.call import dtype_name

__all__ = ["BatchNormalization"]


@keras.saving.register_keras_serializable("anybn")
class BatchNormalization(keras.layers.BatchNormalization):
    """``keras.layers.BatchNormalization``: its constructor, weights, files and meaning, and anybn's numbers.

    y is `anybn.batch_norm`'s, correctly rounded wherever the device has float64 and x is narrower. Moving averages are
    float32, as Keras's. Where it differs from Keras's own layer: a channel whose batch has a NaN or an infinity keeps
    its moving averages. Masks, ``renorm``, ``synchronized`` and training on one value per channel are left to Keras's
    own code, with its accuracy.

    >>> import anybn.keras  # doctest: +SKIP
    >>> layer = anybn.keras.BatchNormalization(axis=1, epsilon=1e-5)
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """As Keras's: inputs of any rank and floating dtype; y in the layer's compute dtype."""
        learns = bool(training) and self.trainable
        if mask is not None or self.renorm or self.synchronized or (learns and few_values(inputs, self.axis)):
            return super().call(inputs, training=training, mask=mask)
        x = inputs if "float" in dtype_name(inputs.dtype) else keras.ops.cast(inputs, self.compute_dtype)
        variables = self.gamma, self.beta, self.moving_mean, self.moving_variance
        held = Held(*(None if variable is None else variable.value for variable in variables))
        momentum = complement(self.momentum)
        y, mean, variance = batch_norm_of(x, held, eps=self.epsilon, momentum=momentum, training=learns, axis=self.axis)
        if learns:
            self.moving_mean.assign(mean)
            self.moving_variance.assign(variance)
        return keras.ops.cast(y, self.compute_dtype)
