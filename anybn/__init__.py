"""Batch normalization for any array library: one core, one state, the same numbers everywhere."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from anybn import distributed as distributed  # which users write as anybn.distributed
from anybn._accumulate import accumulate
from anybn._functional import batch_norm, batch_norm_vjp
from anybn._layer import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from anybn._moments import Moments
from anybn._networks import load_batch_norms, save_batch_norms
from anybn._recalibrate import recalibrate
from anybn._saving import load, save
from anybn._statistics import denormalize, moments
from anybn.backends._transfer import asarray
from anybn.backends.registry import BackendInfo, register_backend, unregister_backend, use_backend
from anybn.core.call import Gradients
from anybn.diagnosis import diagnose
from anybn.errors import BackendNotInstalled, CheckpointError, MemberError, NonFiniteError, StateError
from anybn.interop import fold
from anybn.kernels.cpu.threads import get_num_threads, set_num_threads
from anybn.norms import group_norm, instance_norm, layer_norm, rms_norm
from anybn.state.state import BatchNormState

if TYPE_CHECKING:
    from anybn.backends.registry import installed_backends as backends
else:
    from anybn import backends

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """``anybn.torch``, ``anybn.keras`` and the like without an import of their own, which the first use makes."""
    if name in ("jax", "torch", "keras", "flax", "equinox", "haiku"):
        try:
            return importlib.import_module(f"anybn.{name}")
        except ImportError as error:  # an attribute that is missing, as hasattr and inspect expect it
            package = "dm-haiku" if name == "haiku" else name
            raise AttributeError(f"anybn.{name} cannot be imported ({error}): pip install {package}") from error
    raise AttributeError(f"module 'anybn' has no attribute {name!r}")


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
