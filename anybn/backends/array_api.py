"""Any other library with an array namespace."""

from anybn.backends._base import Backend


class ArrayAPIBackend(Backend):
    """The inherited core, over the importable Array API namespace called ``name``."""

    def __init__(self, name: str):
        self.name = name  # type: ignore[misc]
        self.libraries = (name,)  # type: ignore[misc]
