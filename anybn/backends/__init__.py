"""One file or folder per library. ``anybn.backends()`` says which are installed and usable.

A backend is a subclass of `Backend`. It inherits every operation, written over any Array API namespace, and overrides
what it does better: ``statistics``, ``train``, ``evaluate``, ``gradients``, ``update`` and the norms of rows. Each
takes a `Call`, whose arguments have been checked and whose arrays all lie beside x. What an override does not take, it
hands to ``super()``: masks, groups, a dtype. A backend in a package of its own:

>>> import numpy as np, anybn
>>> from anybn.backends import Backend, Call, Statistics
>>> from anybn.backends.numpy import NumPyBackend
>>> class Plain(NumPyBackend):
...     name, how = "plain", "NumPy's own expressions for float64"
...
...
...     def train(self, call: Call):
...         if call.x.dtype != np.float64 or call.mask is not None or call.group is not None:
...             return super().train(call)
...         axes = tuple(i for i in range(call.x.ndim) if i != call.spec.axis)
...         mean, var = call.x.mean(axes), call.x.var(axes)
...         count = call.x.size // mean.size
...         statistics = Statistics(count, mean, None, var, var * count)
...         return self.evaluate(call, statistics), statistics, None
...
...     def evaluate(self, call: Call, statistics: Statistics):
...         print("evaluate", call.x.shape, "with eps", call.spec.eps)
...         return super().evaluate(call, statistics)
>>> anybn.register_backend(Plain)
>>> y = anybn.batch_norm(np.random.default_rng(0).normal(size=(8, 3)), anybn.BatchNormState(3), training=True)
evaluate (8, 3) with eps 1e-05
>>> anybn.unregister_backend("plain")

It is done when ``pytest --pyargs anybn.conformance --anybn-backend=plain`` passes. This one does not: its statistics
are not accurate enough, and the suite says where. For arrays of another library, a backend says which types it owns in
``libraries``, and overrides of the methods on arrays what the Array API does not say of them (``device_of``,
``from_numpy``, ``is_traced``, ...).
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from anybn.backends.base import Backend
from anybn.core.call import Call, Gradients, RowSpec, Spec, Statistics, Update

if TYPE_CHECKING:
    from anybn.backends.registry import BackendInfo

__all__ = ["Backend", "Call", "Gradients", "RowSpec", "Spec", "Statistics", "Update"]


class _CallableModule(ModuleType):
    """The design gives one name to two things: the package ``anybn.backends`` and the function ``anybn.backends()``."""

    def __call__(self) -> "dict[str, BackendInfo]":
        from anybn.backends.registry import installed_backends

        return installed_backends()


sys.modules[__name__].__class__ = _CallableModule
