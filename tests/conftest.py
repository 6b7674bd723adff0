from compile_once import compile_once

from anybn.conformance.conftest import target

__all__ = ["target"]

compile_once()
