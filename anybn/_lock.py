"""The lock of every change to a state, and what a forked child makes anew: locks, which a thread of its parent may
hold, and threads, which it does not have."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_renewals: list[Callable[[], None]] = []


def after_fork(renew: Callable[[], None]) -> Callable[[], None]:
    """Calls ``renew`` in every process that is forked from this one, before any other code of it; a decorator."""
    _renewals.append(renew)
    return renew


def _renew_all() -> None:
    for renew in _renewals:
        renew()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_renew_all)

#: Held for nothing but the comparison and the swap of a state's arrays, or the writes in place to a torch module's.
commits = threading.RLock()


@after_fork
def _renew_commits() -> None:
    global commits
    commits = threading.RLock()
