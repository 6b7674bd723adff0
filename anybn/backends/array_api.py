"""Any other library with an array namespace."""

from __future__ import annotations

from typing import Any

from anybn.backends.base import Backend


class ArrayAPIBackend(Backend):
    """The inherited core, over any Array API namespace.

    Args:
        name: of the namespace.
        namespace: what the arrays' ``__array_namespace__()`` returns.
        library: root module of the array types.
    """

    def __init__(self, name: str, namespace: Any, library: str):
        self.name = name  # type: ignore[misc]
        self.libraries = (library,)  # type: ignore[misc]
        self._namespace = namespace

    def module(self) -> Any:
        return self._namespace

    def version(self) -> str:
        return str(getattr(self._namespace, "__version__", "unknown"))
