"""Batch normalization for any array library: one core, one state, the same numbers everywhere."""

import importlib
from typing import TYPE_CHECKING, Any

from anybn import distributed as distributed  # which users write as anybn.distributed
from anybn._accumulate import accumulate
from anybn._functional import batch_norm, batch_norm_vjp
from anybn._layer import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from anybn._moments import Moments
from anybn._recalibrate import recalibrate
from anybn._saving import load, save
from anybn._statistics import denormalize, moments
from anybn.backends._transfer import asarray
from anybn.backends.registry import BackendInfo, register_backend, unregister_backend, use_backend
from anybn.core.call import Gradients
from anybn.errors import BackendNotInstalled, CheckpointError, MemberError, NonFiniteError, StateError
from anybn.interop import fold
from anybn.kernels.cpu.threads import get_num_threads, set_num_threads
from anybn.norms import group_norm, instance_norm, layer_norm, rms_norm
from anybn.state.state import BatchNormState

if TYPE_CHECKING:
    from anybn._networks import load_batch_norms, save_batch_norms
    from anybn.backends.registry import installed_backends as backends
    from anybn.diagnosis.diagnose import diagnose
else:
    from anybn import backends

__version__ = "0.1.0"

#: What is imported with its first use, and from where: it would be a third of the time that importing anybn takes.
_LATER = {"diagnose": "diagnosis.diagnose", "load_batch_norms": "_networks", "save_batch_norms": "_networks"}


def __getattr__(name: str) -> Any:
    """``anybn.torch``, ``anybn.keras`` and the like without an import of their own, which the first use makes."""
    if name in _LATER:
        return getattr(importlib.import_module(f"anybn.{_LATER[name]}"), name)
    if name in ("jax", "torch", "keras", "flax", "equinox", "haiku"):
        try:
            return importlib.import_module(f"anybn.{name}")
        except ImportError as error:  # an attribute that is missing, as hasattr and inspect expect it
            package = "dm-haiku" if name == "haiku" else name
            raise AttributeError(f"anybn.{name} cannot be imported ({error}): pip install {package}") from error
    raise AttributeError(f"module 'anybn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "BackendInfo",
    "BackendNotInstalled",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormState",
    "CheckpointError",
    "Gradients",
    "MemberError",
    "Moments",
    "NonFiniteError",
    "StateError",
    "accumulate",
    "asarray",
    "backends",
    "batch_norm",
    "batch_norm_vjp",
    "denormalize",
    "diagnose",
    "fold",
    "get_num_threads",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "load",
    "load_batch_norms",
    "moments",
    "recalibrate",
    "register_backend",
    "rms_norm",
    "save",
    "save_batch_norms",
    "set_num_threads",
    "unregister_backend",
    "use_backend",
]
