"""The OpenMP threads that torch has.

After each operation they stay awake for some milliseconds, and keep the CPUs: threads of our own then get half of a CPU
each. ``GOMP_parallel`` is what GCC makes of ``#pragma omp parallel``; GNU's runtime has it, LLVM's and Intel's too on
Linux. What torch was built without OpenMP for, other systems and a forked child take `pool` in its place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anybn._lock import after_fork


class Team(NamedTuple):
    in_parallel: Any
    """a C function: whether the thread is in a parallel region, where others wait for it and it has no team"""
    entries: np.ndarray
    """for compiled code: the addresses of ``GOMP_parallel`` and ``omp_get_thread_num``"""


def _was_forked() -> bool:
    """Whether this process is a child that has not executed a program of its own since: Linux's ``PF_FORKNOEXEC``."""
    try:
        return bool(int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]) & 0x40)
    except OSError:
        return False


#: Whether the process has torch from its parent: its threads are gone, and GNU's runtime would wait for them for ever.
_inherited = "torch" in sys.modules and _was_forked()


@after_fork
def _inherit() -> None:
    global _inherited
    _inherited = _inherited or "torch" in sys.modules


def team() -> Team | None:
    """torch's, if it is loaded and has one that can be shared."""
    torch = sys.modules.get("torch")
    if torch is None or _inherited or not hasattr(torch, "__config__"):  # it may be on its way in
        return None
    return _team_of(torch)


@functools.cache
def _team_of(torch: Any) -> Team | None:
    if not sys.platform.startswith("linux") or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    # As the library's own calls find them: among what is global, then among what the library has brought.
    for library in (None, str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")):
        with suppress(OSError, AttributeError):
            symbols = ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
            parallel = ctypes.cast(symbols.GOMP_parallel, ctypes.c_void_p).value
            in_parallel = ctypes.cast(symbols.omp_in_parallel, ctypes.c_void_p).value
            number = ctypes.cast(symbols.omp_get_thread_num, ctypes.c_void_p).value
            if parallel and in_parallel and number:
                entries = np.array((parallel, number), np.int64)
                return Team(ctypes.PYFUNCTYPE(ctypes.c_int)(in_parallel), entries)
    return None
