"""Threads of our own for compiled kernels, for where there is no OpenMP team: see `sharing`.

They run compiled code alone, and wait in it: for some time awake, then on a lock of Python's that needs no interpreter.
So they neither wait for the interpreter's lock nor hold up its end, nothing can be raised in them, and a call that is
under way cannot be interrupted before all that have joined it have left it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import atexit
import ctypes

import numpy as np
from numba import carray, njit, types

from anybn._lock import after_fork
from anybn.kernels.cpu.cached import cached
from anybn.kernels.cpu.plan import LOOKS, YIELDS
from anybn.kernels.cpu.primitives import fetch_add, integers, invoke, look, outlined, sched_yield, swap_if

#: How many there can be.
MOST = 255
#: What a helper has in the array of all, a line of the cache: the address of the call that it is to join, 0 for none,
#: and one more (addresses are even) while it is in it; whether it is asleep; the lock that it sleeps on; its address.
CALL, ASLEEP, LOCK, SELF, SIZE = 0, 1, 2, 3, 8
#: How many there are, behind all helpers.
COUNT = MOST * SIZE

_ulong = getattr(types, f"uint{8 * ctypes.sizeof(ctypes.c_ulong)}")
_allocate_lock = types.ExternalFunction("PyThread_allocate_lock", types.int64())
_acquire_lock = types.ExternalFunction("PyThread_acquire_lock", types.int32(types.int64, types.int32))
_release_lock = types.ExternalFunction("PyThread_release_lock", types.void(types.int64))
_start_new_thread = types.ExternalFunction("PyThread_start_new_thread", _ulong(types.int64, types.int64))
_NO_THREAD = np.iinfo(f"u{ctypes.sizeof(ctypes.c_ulong)}").max


# -- in the caller ---------------------------------------------------------------------------------------------


@njit
def parallel(pool, function, data, threads):
    """``function(data)`` here, and on up to ``threads - 1`` helpers that have nothing else to do.

    Those that come late do not come at all. Returns after the last has left the function.
    """
    helpers = carray(integers(pool), (COUNT + 1,))
    call = np.array((function, data))
    address, asked, end = call.ctypes.data, 1, 0
    for i in range(0, look(helpers, COUNT) * SIZE, SIZE):
        if asked == threads:
            break
        if swap_if(helpers, i + CALL, 0, address):
            asked, end = asked + 1, i + SIZE
            if swap_if(helpers, i + ASLEEP, 1, 0):
                _release_lock(helpers[i + LOCK])
    invoke(function, data)
    for i in range(0, end, SIZE):
        swap_if(helpers, i + CALL, address, 0)
    for i in range(0, end, SIZE):
        while not _becomes(helpers, i + CALL, address + 1, False):
            pass
    call[0] = 0  # Numba frees an array after the last line that names it


@njit
def _becomes(array, index, value, equal):
    """Waits for ``(array[index] == value) == equal``, but not for ever; whether it is so."""
    for _ in range(YIELDS):
        for _ in range(LOOKS):
            if (look(array, index) == value) == equal:
                return True
        sched_yield()
    return False


# -- in a helper -----------------------------------------------------------------------------------------------


@njit
def _serve(address):
    helper = carray(integers(address), (SIZE,))
    while True:
        if not _becomes(helper, CALL, 0, False):
            swap_if(helper, ASLEEP, 0, 1)
            # Who has put a call there before may not have seen that it is to wake somebody.
            if look(helper, CALL) == 0 or not swap_if(helper, ASLEEP, 1, 0):
                _acquire_lock(helper[LOCK], 1)
        call = look(helper, CALL)
        if call != 0 and swap_if(helper, CALL, call, call + 1):
            arguments = carray(integers(call), (2,))
            invoke(arguments[0], arguments[1])
            swap_if(helper, CALL, call + 1, 0)


# -- all of them -----------------------------------------------------------------------------------------------


@cached()  # without nogil: one thread at a time
def _grow(helpers, count):
    """Starts threads until there are so many, or no more to be had."""
    while helpers[COUNT] < min(count, MOST):
        i = helpers[COUNT] * SIZE
        if helpers[i + LOCK] == 0:
            helpers[i + LOCK] = _allocate_lock()
            if helpers[i + LOCK] == 0:
                return
            _acquire_lock(helpers[i + LOCK], 1)
        helpers[i + SELF] = helpers[i:].ctypes.data
        function, _, _ = outlined(_serve, (helpers[i + SELF],))
        if _start_new_thread(function, helpers[i + SELF :].ctypes.data) == _NO_THREAD:  # where its argument lies
            return
        fetch_add(helpers, COUNT, 1)


@cached(nogil=True)
def _all_asleep(helpers):
    for i in range(0, helpers[COUNT] * SIZE, SIZE):
        while look(helpers, i + CALL) != 0 or look(helpers, i + ASLEEP) == 0:
            sched_yield()


_helpers = np.zeros(COUNT + 1, np.int64)
_address = _helpers.ctypes.data
_ended = False


@after_fork
def _renew() -> None:
    global _helpers, _address
    _helpers = np.zeros(COUNT + 1, np.int64)
    _address = _helpers.ctypes.data


def pool_of(count: int) -> int:
    """The address of the pool, for `parallel`, with so many helpers if they are to be had; 0 without any."""
    if _ended:
        return 0
    if _helpers[COUNT] < count:
        _grow(_helpers, count)
    return _address if _helpers[COUNT] else 0


@atexit.register
def _end() -> None:
    """Compiled code is freed with the interpreter: nobody may be in it then, nor come back to it."""
    global _ended
    _ended = True
    if _helpers[COUNT]:
        _all_asleep(_helpers)
