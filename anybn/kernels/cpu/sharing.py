"""One kernel call on several threads, which share its work without the interpreter's lock.

The work is numbered, and whoever is free claims the next numbers: the calling thread, and helpers that were offered the
call. A helper may come late or never; the others have done its share then.

``concurrent.futures`` would cost 50 us a call, which is what copying a megabyte takes: each of its steps waits for the
interpreter's lock, and a thread that waits falls asleep. Here all waiting is in compiled code, and for some time awake.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from anybn._lock import after_fork
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.plan import LOOKS, YIELDS
from anybn.kernels.cpu.threads import get_num_threads

#: The tickets of a call: the next number, how many are done, how many go with one claim, how many there are.
NEXT, DONE, STEP, COUNT = range(4)
#: What the calling thread passes as ``seen``; a helper passes how many offers there had been when it took its own.
CALLER = -1


# -- in kernels ------------------------------------------------------------------------------------------------


def _pointer(context, builder, kind, array, index):
    return cgutils.get_item_pointer(context, builder, kind, context.make_array(kind)(context, builder, array), [index])


@intrinsic
def _fetch_add(_, array, index, amount):
    """``array[index] += amount`` in one step that no other thread comes between; what it was before."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def _look(_, array, index):
    """``array[index]`` as another thread has left it, with all that it wrote before."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(context, builder, signature.args[0], *arguments), "acquire", align=8)

    return types.int64(array, types.intp), generate


_yield = types.ExternalFunction("sched_yield", types.int32()) if hasattr(os, "sched_yield") else njit(lambda: 0)


@cached(nogil=True)
def _reaches(counts, index, value):
    """Waits for ``counts[index] >= value``, but not for ever; whether it is so."""
    for _ in range(YIELDS):
        for _ in range(LOOKS):
            if _look(counts, index) >= value:
                return True
        _yield()
    return False


@njit
def _claim(tickets):
    first = _fetch_add(tickets, NEXT, tickets[STEP])
    return first, min(first + tickets[STEP], tickets[COUNT])


@njit
def begin(tickets, offers, seen):
    """The first range of numbers that the thread claims; empty when there are none.

    Only here, where the caller has let go of the interpreter's lock, do helpers hear of the call.
    """
    if seen == CALLER and tickets[STEP] < tickets[COUNT]:
        _fetch_add(offers, 0, 1)
    return _claim(tickets)


@njit
def proceed(tickets, offers, seen, done):
    """The next range, after so many numbers are done. When there is none, it comes after a wait: the caller's for the
    others to be done, a helper's for the next call, since back in Python it would wait for the interpreter's lock."""
    _fetch_add(tickets, DONE, done)
    first, last = _claim(tickets)
    if first >= last:
        if seen == CALLER:
            _reaches(tickets, DONE, tickets[COUNT])
        else:
            _reaches(offers, 0, seen + 1)
    return first, last


@cached()
def _claim_all(tickets):
    """Leaves nothing to claim."""
    _fetch_add(tickets, NEXT, tickets[COUNT])


# -- in Python -------------------------------------------------------------------------------------------------


class _Helper:
    """A thread that joins calls: the last it was offered. One that it had no time for is lost, and none the worse."""

    def __init__(self) -> None:
        self.offered: tuple[Any, ...] | None = None
        self.joined: Any = None
        self.asleep = False
        self.wake: SimpleQueue[None] = SimpleQueue()
        self.stopped = False
        self.thread = threading.Thread(target=self._work, name="anybn", daemon=True)
        self.thread.start()

    def offer(self, *call: Any) -> None:
        self.offered = call
        if self.asleep:
            self.asleep = False
            self.wake.put(None)

    def stop(self) -> None:
        """A daemon thread that came back from compiled code while the interpreter ends could crash it."""
        self.stopped = True
        self.offer()
        self.thread.join()

    def _work(self) -> None:
        while not self.stopped:
            seen = int(_offers[0])
            call, self.offered = self.offered, None
            if call:
                self._join(seen, *call)
                call = None  # its arrays are the caller's to free
            elif self.offered is None:
                self.asleep = True
                if self.offered is None:  # else it came before asleep was seen
                    self.wake.get()
                self.asleep = False

    def _join(self, seen: int, kernel: Callable[..., None], tickets: Any, failures: list[Any], arguments: Any) -> None:
        self.joined = tickets
        try:
            kernel(tickets, _offers, seen, *arguments)
        except BaseException as failure:
            failures.append(failure)
        self.joined = None


_helpers: list[_Helper] = []
_offers = np.zeros(1, np.int64)
_lock = threading.Lock()


@after_fork
def _forget_helpers() -> None:
    global _lock
    _lock = threading.Lock()
    _helpers.clear()


@atexit.register
def _stop_helpers() -> None:
    for helper in _helpers:
        helper.stop()


def share(kernel: Callable[..., None], count: int, step: int, *arguments: Any) -> None:
    """``kernel(tickets, offers, seen, *arguments)`` on this thread and on helpers, until ``count`` numbers are done.

    The kernel claims ``step`` numbers at a time, with `begin` and `proceed`; what it computes must not depend on who
    claims which. Where one claim takes all, nobody is asked to help. Returns, or raises what the kernel raised, after
    the last claim is done: nothing is written to an array afterwards.
    """
    tickets = np.array((0, 0, step, count))
    helpers = min(get_num_threads(), -(-count // step)) - 1
    if helpers < 1:
        kernel(tickets, _offers, CALLER, *arguments)
        return
    if len(_helpers) < helpers:
        with _lock:
            _helpers.extend(_Helper() for _ in range(helpers - len(_helpers)))
    failures: list[BaseException] = []
    for helper in _helpers[:helpers]:
        helper.offer(kernel, tickets, failures, arguments)
    try:
        kernel(tickets, _offers, CALLER, *arguments)
        while tickets[DONE] < count and not failures:
            _reaches(tickets, DONE, count)
    finally:
        if tickets[DONE] < count:  # somebody failed
            _claim_all(tickets)
            while any(helper.joined is tickets for helper in _helpers):
                time.sleep(1e-5)
    if tickets[DONE] < count:
        raise failures[0]
