"""How many threads a call uses; and those that NumPy's blocks run on, a pool that all calls of the process share.

Compiled kernels have threads of their own: see `sharing`. No OpenMP, which hangs in a forked child, and no
``parallel=True``, whose layer dies under concurrent callers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from anybn import _settings
from anybn._lock import after_fork

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_num_threads: int | None = None


@after_fork
def _forget_pool() -> None:
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


def get_num_threads() -> int:
    """The number of threads that one call uses at most.

    What `set_num_threads` was given, else the environment variable ANYBN_NUM_THREADS, else the number of CPUs that the
    process may use.
    """
    global _num_threads
    if _num_threads is None:
        given = os.environ.get("ANYBN_NUM_THREADS", "")
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _num_threads = max(1, int(given)) if given.isdecimal() else available
    return _num_threads


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
    global _num_threads, _pool
    count = _settings.positive("count", count)
    with _lock:
        _num_threads, _pool = count, None  # a call under way keeps the old pool until it is done


def _shared_pool(workers: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(workers, thread_name_prefix="anybn")
        return _pool


def run(task: Callable[[int], None], count: int) -> None:
    """``task(0), ..., task(count - 1)``, each once, on the caller's thread and the pool's; in no particular order.

    Returns, or raises what a task raised, after every task that was started has ended: none writes to an array
    afterwards.
    """
    helpers = min(get_num_threads(), count) - 1
    if helpers < 1:
        for i in range(count):
            task(i)
        return
    remaining = iter(range(count))  # next() is one step under the GIL: each number goes to one thread

    def work() -> None:
        for i in remaining:
            task(i)

    pool = _shared_pool(get_num_threads() - 1)
    futures = [pool.submit(work) for _ in range(helpers)]
    try:
        work()
    except BaseException:
        for _ in remaining:
            pass
        raise
    finally:
        failures = [future.exception() for future in futures if not future.cancel()]
    for failure in failures:
        if failure is not None:
            raise failure
