"""Models of frameworks: which part of anybn deals with one. It is imported when a model is met, never before."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

#: A framework's class of models -> the package that deals with them.
_PACKAGES = {"torch.nn.modules.module.Module": "anybn.torch"}


def tools_for(model: Any, purpose: str) -> ModuleType | None:
    """The module of this name for models of this class, ``anybn.torch.population`` for "population"; None for others.

    By the names of its classes, which import nothing.

    >>> tools_for(3, "population") is None
    True
    """
    for cls in type(model).__mro__:
        if (package := _PACKAGES.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return importlib.import_module(f"{package}.{purpose}")
    return None
