"""The exceptions that anybn raises beside the built-in ones.

Every message says what the argument was, what was wanted and what to do, in the same words on every backend.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BackendNotInstalled", "CheckpointError", "MemberError", "NonFiniteError", "StateError"]


class BackendNotInstalled(ImportError):
    """A library that anybn knows was asked for but cannot be imported; the message has the pip line."""


class CheckpointError(ValueError):
    """A checkpoint is truncated, damaged, foreign, newer, or has missing or extra keys; nothing was loaded."""


class MemberError(RuntimeError):
    """Another member of the group has failed, and raised what was wrong; ``members`` are the numbers of those that did.

    Empty for a group without ``rank`` and ``size``. The state is as it was before the call.
    """

    def __init__(self, message: str, members: tuple[int, ...] = ()):
        super().__init__(message)
        self.members = members


class NonFiniteError(ArithmeticError):
    """Batch statistics are NaN or infinite under ``nonfinite="raise"``; ``channels`` lists where.

    The state is as it was before the call.
    """

    def __init__(self, message: str, channels: tuple[int, ...] = ()):
        super().__init__(message)
        self.channels = channels


class StateError(RuntimeError):
    """A traced call (``jax.jit``, ``vmap``, ``scan``) would change a state that was not passed into it."""


@contextmanager
def required(what: str, pip: str) -> Iterator[None]:
    """Around an import: BackendNotInstalled says what for, and what to do.

    >>> with required("this", "nothing"):
    ...     import json
    """
    try:
        yield
    except ImportError as error:
        raise BackendNotInstalled(f"{what} ({error}): pip install {pip}") from error
