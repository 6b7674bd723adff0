"""One file per backend. ``anybn.backends()`` says which are installed and usable.

A backend is a subclass of `Backend`. It inherits every operation, written over any Array API namespace, and overrides
what it does better. `anybn.register_backend` adds one.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from anybn.backends.base import Backend

if TYPE_CHECKING:
    from anybn.backends.registry import BackendInfo

__all__ = ["Backend"]


class _CallableModule(ModuleType):
    """The design gives one name to two things: the package ``anybn.backends`` and the function ``anybn.backends()``."""

    def __call__(self) -> "dict[str, BackendInfo]":
        from anybn.backends.registry import installed_backends

        return installed_backends()


sys.modules[__name__].__class__ = _CallableModule
