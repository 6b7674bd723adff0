"""One kernel call on several threads, and the one place that decides who works.

The work is numbered, and whoever is free claims the next numbers. Threads are OpenMP's where torch has brought them
(`openmp`), else our own (`pool`); both run a compiled function on data that lie in the caller's memory, and return when
everybody has. All of it is one step of Python's: no signal comes between.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit

from anybn.kernels.cpu import openmp, pool
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.primitives import (
    fetch_add,
    integers,
    invoke,
    invoke_number,
    invoke_parallel,
    look,
    nanoseconds,
    outlined,
    restore_environment,
    save_environment,
    swap_if,
)
from anybn.kernels.cpu.threads import ENVIRONMENT, get_num_threads

#: The tickets of a call: how many are done, how many go with one claim, how many there are, how many are a thread's
#: share; how many threads may work, how many have come and how many have begun; the addresses of OpenMP's entries and
#: of our pool, 0 for what is not to be used, of the kernel and of its arguments; when all numbers were done, and for
#: how long OpenMP went on waiting, in nanoseconds; the caller's floating-point environment; the next of each share.
DONE, STEP, COUNT, SHARE, THREADS, COME, BEGUN, OPENMP, POOL, KERNEL, ARGUMENTS, FINISHED, WAITED, CALLERS = range(14)
NEXT, _MOST_SHARES = CALLERS + ENVIRONMENT, 16
SIZE = NEXT + _MOST_SHARES


# -- in kernels ------------------------------------------------------------------------------------------------


@njit
def _claim(tickets, share):
    """The next range of a share, or of those after it; empty when all numbers are claimed."""
    count, size = tickets[COUNT], tickets[SHARE]
    shares = -(-count // size)
    for _ in range(shares):
        first, end = fetch_add(tickets, NEXT + share, tickets[STEP]), min((share + 1) * size, count)
        if first < end:
            return first, min(first + tickets[STEP], end)
        share = share + 1 if share + 1 < shares else 0
    return 0, 0


@njit
def begin(tickets):
    """The first range of numbers that the thread claims; empty when there are none.

    A thread begins with its own share, as in torch's operations: before and after ours, they have the same part of an
    array in that thread's cache.
    """
    number, shares = 0, -(-tickets[COUNT] // tickets[SHARE])
    if tickets[OPENMP] != 0:
        number = invoke_number(carray(integers(tickets[OPENMP]), (2,))[1])
    elif tickets[THREADS] > 1:
        number = fetch_add(tickets, BEGUN, 1)
    return _claim(tickets, number % shares)


@njit
def proceed(tickets, first, last):
    """The next range, after this one is done."""
    fetch_add(tickets, DONE, last - first)
    return _claim(tickets, first // tickets[SHARE])


@cached(nogil=True)
def tickets_of(work, hands):
    """Tickets of a call for ``(count, step)`` of a plan, with `hands` to do it, which one claim needs none of."""
    count, step = work
    tickets, claims = np.zeros(SIZE, np.int64), max(1, -(-count // step))
    threads = min(hands[0], claims)
    shares = max(1, min(threads, _MOST_SHARES))
    tickets[STEP], tickets[COUNT], tickets[SHARE] = step, count, -(-claims // shares) * step
    for share in range(shares):
        tickets[NEXT + share] = share * tickets[SHARE]
    if threads > 1:
        tickets[THREADS], tickets[OPENMP], tickets[POOL] = threads, hands[1], hands[2]
    return tickets


# -- around kernels --------------------------------------------------------------------------------------------


@njit
def _join(tickets):
    """What each of several threads does: it works, as the caller would, if one more is wanted."""
    if fetch_add(tickets, COME, 1) < tickets[THREADS]:
        own = np.empty(ENVIRONMENT, np.int64)
        save_environment(own, 0)
        restore_environment(tickets, CALLERS)
        invoke(tickets[KERNEL], tickets[ARGUMENTS])
        restore_environment(own, 0)
        if tickets[OPENMP] != 0 and look(tickets, DONE) >= tickets[COUNT]:
            swap_if(tickets, FINISHED, 0, nanoseconds())


@njit
def run(tickets, kernel, arguments):
    """``kernel(arguments)`` on as many threads as the tickets say, until every number is done."""
    if tickets[THREADS] < 2:
        invoke(kernel, arguments)
    else:
        tickets[KERNEL], tickets[ARGUMENTS] = kernel, arguments
        save_environment(tickets, CALLERS)
        join, data, _ = outlined(_join, (tickets,))
        if tickets[OPENMP] != 0:
            invoke_parallel(carray(integers(tickets[OPENMP]), (2,))[0], join, data)
            if tickets[FINISHED] != 0:
                tickets[WAITED] = nanoseconds() - tickets[FINISHED]
        else:
            pool.parallel(tickets[POOL], join, data, tickets[THREADS])
    if look(tickets, DONE) < tickets[COUNT]:
        raise MemoryError("there was no memory left to work with")


_SOURCE = """def {name}({parameters}):
    function, data, _ = outlined(kernel, ({parameters},))
    run(tickets, function, data)
"""


def shared(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes of a kernel, whose first argument are tickets, one that runs on as many threads as they say; a decorator.

    Numba takes no arguments whose number is open without making a tuple of them, which costs a microsecond: hence a
    source with their names. It says that it stands where the kernel does, which is where errors are to point to and
    compiled code is kept. ``options`` are Numba's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name, parameters = function.__name__, ", ".join(inspect.signature(function).parameters)
        made = {"__name__": function.__module__, "kernel": njit(function), "outlined": outlined, "run": run}
        lines_before = "\n" * (function.__code__.co_firstlineno - 1)
        source = lines_before + _SOURCE.format(name=name, parameters=parameters)
        exec(compile(source, inspect.getfile(function), "exec"), made)
        return cached(**options)(made[name])

    return decorate


# -- in Python -------------------------------------------------------------------------------------------------


#: Nanoseconds that OpenMP may wait when nothing is left to do, before it counts as crowded, and how many times as long
#: it is then left alone. It waits for each of its threads, until the system gives it a CPU: beside processes that want
#: all of them, that took 20 to 90 ms for calls that our own pool, which waits for nobody who has not come, did in 2.
CROWDED, REST = 1_000_000, 20

#: What `hands` goes by, for compiled callers too: see `operator`. The address of OpenMP's entries, 0 for none that are
#: to be used; until when it is to be left alone, in nanoseconds.
ENTRIES, CROWDED_UNTIL = range(2)
team = np.zeros(2, np.int64)

#: `hands` of a call that is the caller's.
ALONE = (1, 0, 0)


def hands() -> tuple[int, int, int]:
    """Who may help in a call: how many threads, the caller's included; where OpenMP's entries are, or our pool is."""
    if (threads := get_num_threads()) > 1 and not ((its := openmp.team()) and its.in_parallel()):
        if its and time.monotonic_ns() >= team[CROWDED_UNTIL]:
            return threads, its.entries.ctypes.data, 0
        if address := pool.pool_of(threads - 1):
            return threads, 0, address
    return ALONE


def hands_for(work: tuple[int, int]) -> tuple[int, int, int]:
    """`hands` for ``(count, step)`` of a plan: where one claim takes all, nobody is asked to help."""
    return hands() if work[0] > work[1] else ALONE


def note_wait(waited: int) -> None:
    """Of a call, what its tickets say that OpenMP waited."""
    if waited > CROWDED:
        team[CROWDED_UNTIL] = time.monotonic_ns() + REST * int(waited)


def share(kernel: Callable[..., None], count: int, step: int, *arguments: Any) -> None:
    """``kernel(tickets, *arguments)`` on this thread and others, until ``count`` numbers are done.

    A kernel of `shared` claims ``step`` numbers at a time, with `begin` and `proceed`; what it computes must not depend
    on who claims which. Where one claim takes all, nobody is asked to help. Returns, or raises MemoryError, after the
    last thread has left the kernel: nothing is written to an array afterwards.
    """
    work = count, step
    tickets = tickets_of(work, hands_for(work))
    kernel(tickets, *arguments)
    note_wait(tickets[WAITED])
