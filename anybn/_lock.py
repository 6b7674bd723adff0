"""The lock of every change to a state, changes that nothing comes between, and what a forked child makes anew: locks,
which a thread of its parent may hold, and threads, which it does not have."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from operator import call
from typing import Any

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
#: Changes with every write in place, and is odd while a thread is at one: so a reader knows, without the lock, whether
#: it may have read old values and new ones.
writes = 0


def at_once(actions: Iterable[Callable[[], Any]], undo: Iterable[Callable[[], Any]] = ()) -> None:
    """Make calls of C functions (`functools.partial`) under the lock; if one fails, make those of undo.

    Python looks for signals between its own instructions only, so KeyboardInterrupt finds all of them done or none.
    """
    global writes
    with commits:
        writes |= 1
        try:
            deque(map(call, actions), 0)
        except BaseException:
            deque(map(call, undo), 0)
            raise
        finally:
            writes += 1


@after_fork
def _renew_commits() -> None:
    global commits
    commits = threading.RLock()
