"""Each of Numba's kernels is compiled by one of the test processes; the others wait, and load it from Numba's cache."""

import fcntl
import hashlib
import tempfile
from pathlib import Path


def compile_once():
    """In this process, from now on."""
    try:
        from numba.core.compiler_lock import global_compiler_lock
        from numba.core.dispatcher import Dispatcher
    except ImportError:
        return
    locks = Path(tempfile.gettempdir()) / "anybn-compile-once"
    locks.mkdir(exist_ok=True)
    compile_here = Dispatcher.compile

    def compile_or_wait(self, signature):
        name = hashlib.sha1(f"{self.py_func.__module__}.{self.py_func.__qualname__}{signature}".encode()).hexdigest()
        with global_compiler_lock, (locks / name).open("w") as lock:  # in this order: a kernel compiles what it calls
            fcntl.flock(lock, fcntl.LOCK_EX)
            return compile_here(self, signature)

    Dispatcher.compile = compile_or_wait
