"""asarray: an array of one library as one of another."""

from __future__ import annotations

from typing import Any

from anybn.backends.registry import backend_for, resolve_target
from anybn.core.call import Array


def asarray(a: Array, *, like: Any) -> Array:
    """The values of an array in another library or on another device; the array itself where it lies there already.

    For what belongs to a net and is not in a `BatchNormState`: an optimizer's moments, the weights of other layers.

    Args:
        a: an array of any library, of any shape and of a dtype that both libraries have.
        like: an array to be beside, a namespace such as ``numpy`` or ``jax.numpy``, or a target as in
            `BatchNormState.to`.

    Returns an array of a's shape and dtype; float64 becomes float32 where there is no float64. From torch to torch, the
    copy is part of autograd's graph; between libraries, it is a constant. The values of a Dask array are computed.

    Raises TypeError for what is no array, or a traced one for another library; what `BatchNormState.to` does for like.

    >>> import numpy as np, torch, anybn
    >>> anybn.asarray(np.ones(2, np.float32), like=torch)
    tensor([1., 1.])
    """
    owner = backend_for(a, "a")
    if problem := owner.refusal(a):
        raise TypeError(f"a {problem}")
    backend, device = resolve_target(like)
    if backend.holds(a, device):
        return a
    if backend.owns(type(a)):
        return backend.moved(a, device)
    a = owner.detached(a)
    if not owner.lasts(a):
        raise TypeError(
            f"a is traced by {owner.name} and has no values yet, so {backend.name} cannot have it: return it from the "
            "traced function first"
        )
    values = owner.to_numpy(a)
    if values.dtype == "float64" and not backend.has_float64(device):
        values = values.astype("float32")
    return backend.from_numpy(values, device)
