"""How many threads a call uses; and those that NumPy's blocks run on. Compiled kernels have others: see `sharing`."""

from __future__ import annotations

import _thread
import ctypes
import os
import platform
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import repeat
from operator import call
from typing import Any

import numpy as np

from anybn import _settings

#: The number of threads that one call uses at most, if torch does not say fewer; 0 before anybody has asked. Compiled
#: callers of kernels read it too, hence an array.
limit = np.zeros(1, np.int64)


def get_num_threads() -> int:
    """The number of threads that one call uses at most.

    What `set_num_threads` was given, else the environment variable ANYBN_NUM_THREADS, else the number of CPUs that the
    process may use; where torch is loaded, no more than ``torch.get_num_threads()``.

    Raises ValueError, as calls that ask for it do, if ANYBN_NUM_THREADS is set to anything but 1 or more.
    """
    if not limit[0]:
        given = os.environ.get("ANYBN_NUM_THREADS", "")
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if given and not (given.isdecimal() and int(given)):
            raise ValueError(f"ANYBN_NUM_THREADS is {given!r}; it must be 1 or more, in digits: set that, or unset it")
        limit[0] = min(int(given or available), np.iinfo(np.int32).max)
    of_torch = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return int(limit[0]) if of_torch is None else min(int(limit[0]), of_torch())


def set_num_threads(count: int) -> None:
    """Let one call use at most ``count`` threads, 1 or more. The results do not depend on it.

    Raises TypeError or ValueError for anything else.

    >>> import anybn
    >>> before = anybn.get_num_threads()
    >>> anybn.set_num_threads(1)
    >>> anybn.get_num_threads()
    1
    >>> anybn.set_num_threads(before)
    """
    limit[0] = min(_settings.positive("count", count), np.iinfo(np.int32).max)


# -- tasks in Python -------------------------------------------------------------------------------------------

_c: Any = ctypes.CDLL(None) if os.name == "posix" else None
#: Whether C's functions for the floating-point environment (rounding, whether small numbers are flushed to 0, as by
#: ``torch.set_flush_denormal``) are at hand, and it is no longer than `ENVIRONMENT` times 8 bytes.
HAS_ENVIRONMENT = (
    os.name == "posix" and platform.machine() in ("x86_64", "amd64", "aarch64", "arm64") and hasattr(_c, "fegetenv")
)
ENVIRONMENT = 8

# Python's own locks for C: unlike those of `threading`, no signal ends the wait for them.
_python = ctypes.CDLL(None, handle=ctypes.pythonapi._handle)
_new_lock, _acquire, _release, _free = (
    _python[f"PyThread_{name}"] for name in ("allocate_lock", "acquire_lock", "release_lock", "free_lock")
)
_new_lock.restype = ctypes.c_void_p
_acquire.argtypes = (ctypes.c_void_p, ctypes.c_int)
_release.argtypes = _free.argtypes = (ctypes.c_void_p,)


def run(task: Callable[[int], None], count: int) -> None:
    """``task(0), ..., task(count - 1)``, each once, on the caller's thread and others; in no particular order.

    Returns, or raises what a task raised, after every task that was started has ended: none writes to an array
    afterwards. Threads are made for the call, in 0.1 ms: so there are none to be found dead in a forked child, when the
    interpreter ends, or after somebody has killed them.
    """
    helpers = min(get_num_threads(), count) - 1
    remaining = iter(range(count))  # next() is one step under the GIL: each number goes to one thread
    failures: list[BaseException] = []
    environment = (ctypes.c_int64 * ENVIRONMENT)()
    if HAS_ENVIRONMENT:
        _c.fegetenv(environment)

    def work() -> None:
        for i in remaining:
            task(i)

    def help(ended: int) -> None:
        try:
            if HAS_ENVIRONMENT:
                _c.fesetenv(environment)
            work()
        except BaseException as failure:
            failures.append(failure)
            deque(remaining, 0)
        finally:
            _release(ended)

    # A thread that starts while the interpreter ends would wait for it for ever.
    ended = [] if sys.is_finalizing() else [_new_lock() for _ in range(helpers)]
    wait: Callable[[], object] = partial(deque, map(_acquire, ended, repeat(1)), 0)
    try:
        for lock in ended:
            try:  # calls of C functions, which no signal comes between
                deque(map(call, (partial(_acquire, lock, 1), partial(_thread.start_new_thread, help, (lock,)))), 0)
            except RuntimeError:  # there are no more threads to be had
                _release(lock)
                break
        work()
    except BaseException:
        deque(remaining, 0)
        raise
    finally:
        wait()
    deque(map(_free, ended), 0)
    if failures:
        raise failures[0]
