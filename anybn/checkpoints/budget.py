"""How much may be made of a file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path

from anybn.errors import CheckpointError


class Budget:
    """The bytes that may be made of a file: 16 MiB, and 8 times its size.

    No network's batch norms come near, for they lie in the file. If it is compressed, layers share an array, or an ONNX
    model's arrays lie beside it, there are the 16 MiB, a million channels. A file that inflates is soon beyond.
    """

    def __init__(self, path: Path):
        self.path = path
        self.left = 16 * 2**20 + 8 * path.stat().st_size

    def take(self, name: str, size: int) -> None:
        """Raises CheckpointError when it is used up."""
        self.left -= size
        if self.left < 0:
            raise CheckpointError(
                f"nothing was loaded: {self.path} holds more than 16 MiB and 8 times its size, with {size} bytes for "
                f"{name!r:.200}, as if made to fill the memory: if you trust it, read it with its own library and pass "
                "names to arrays"
            )
