"""For users of JAX: importing this makes `BatchNormState` a pytree.

It happens by itself when a state is made after JAX was imported. The arrays and ``num_batches_tracked`` are leaves, the
settings are static, so ``jax.jit``, ``vmap``, ``lax.scan`` and ``jax.tree.map`` take a state and give one back:

>>> import jax, anybn
>>> @jax.jit
... def step(x, state):
...     y = anybn.batch_norm(x, state, training=True)
...     return y, state
>>> y, state = step(jax.numpy.ones((4, 2)), anybn.BatchNormState(2))
>>> state.num_batches_tracked, state.running_mean
(1, Array([0.1, 0.1], dtype=float32))
"""

import jax  # noqa: F401

from anybn import _pytree

_pytree.register_with_jax()
