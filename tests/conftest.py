from anybn.conformance.conftest import target

__all__ = ["target"]
