"""torch tensors."""

from anybn.backends.torch.backend import TorchBackend, TorchNativeBackend

__all__ = ["TorchBackend", "TorchNativeBackend"]
