"""The lock of every change to a state; changes that nothing comes between, and tasks that neither signals nor forks
disturb; what a forked child makes anew: locks, which threads of its parent may hold, and threads, which it lacks."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
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


# -- tasks that neither signals nor forks come between ---------------------------------------------------------

_here = threading.local()
#: Locks that a thread takes before it forks, in this order; the first is that of `undisturbed`.
held_in_forks: list[Any] = [threading.RLock()]
#: Seconds that it waits for one at most: who has it may wait for something that the forking thread holds.
_PATIENCE = 60


def _before_fork() -> None:
    for lock in held_in_forks:
        lock.acquire(timeout=_PATIENCE)


def _after_fork(in_child: bool) -> None:
    for lock in held_in_forks:
        if lock._is_owned():
            lock.release()
        elif in_child:
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, False),
        after_in_child=partial(_after_fork, True),
    )


def undisturbed(task: Callable[[], Any]) -> Any:
    """What it returns or raises: for the imports and compilations of a first call.

    KeyboardInterrupt would leave them half done, to fail, hang or crash ever after. It strikes the main thread alone,
    so the task has a thread of its own; who is interrupted leaves that to finish. A fork would leave the child with
    locks that nobody opens, Python's for modules and Numba's, so it waits for the task.
    """
    if hasattr(_here, "undisturbed") or sys.is_finalizing():  # a thread that starts now would wait for ever
        return task()
    outcome: list[Any] = []
    failure: list[BaseException] = []
    ended = threading.Event()  # a Future needs logging, which takes 4 ms to import

    def complete() -> None:
        _here.undisturbed = True
        try:
            with held_in_forks[0]:
                outcome.append(task())
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=complete, name="anybn compiles").start()
    except RuntimeError:  # there are no more threads to be had
        return task()
    ended.wait()
    if failure:
        raise failure[0]
    return outcome[0]
