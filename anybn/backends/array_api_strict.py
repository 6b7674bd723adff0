"""array-api-strict, which has what the standard says and nothing else: what works with it, works with any library."""

from __future__ import annotations

from anybn.backends._needs import needs
from anybn.backends.base import Backend

with needs("array_api_strict", pip="array-api-strict"):
    import array_api_strict  # noqa: F401


class ArrayAPIStrictBackend(Backend):
    name = "array_api_strict"
    libraries = ("array_api_strict",)
