"""Batch normalization for any array library: one core, one state, the same numbers everywhere."""

from typing import TYPE_CHECKING

from anybn._accumulate import accumulate
from anybn._core import Gradients
from anybn._dispatch import BackendInfo, register_backend, unregister_backend, use_backend
from anybn._functional import batch_norm, batch_norm_vjp, moments
from anybn._layer import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from anybn._models import load_batch_norms
from anybn._moments import Moments
from anybn._state import BatchNormState
from anybn._threads import get_num_threads, set_num_threads
from anybn.errors import BackendNotInstalled, CheckpointError, NonFiniteError, StateError
from anybn.interop import fold

if TYPE_CHECKING:
    from anybn._dispatch import installed_backends as backends
else:
    from anybn import backends

__version__ = "0.1.0"

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
    "Moments",
    "NonFiniteError",
    "StateError",
    "accumulate",
    "backends",
    "batch_norm",
    "batch_norm_vjp",
    "fold",
    "get_num_threads",
    "load_batch_norms",
    "moments",
    "register_backend",
    "set_num_threads",
    "unregister_backend",
    "use_backend",
]
