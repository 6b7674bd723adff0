"""torch tensors."""

from anybn.backends._needs import needs

with needs("torch", pip="torch"):
    from anybn.backends.torch.backend import TorchBackend, TorchNativeBackend

__all__ = ["TorchBackend", "TorchNativeBackend"]
