"""numba.njit, compiled where neither signal nor fork comes between, and kept on disk in files that say what from.

Nothing that can happen to these files is an error: what cannot be read is compiled, what cannot be written stays in
memory.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite.binding import llvm_version_info
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

from anybn._lock import held_in_forks, undisturbed

#: Why compiled code is not kept, in words for a user; or "".
problem = ""


def _stamp() -> str:
    """Of everything that compiled code is made from. It takes in functions and constants of other files than its own,
    so the stamp is that of all sources of this folder."""
    versions = (sys.modules["anybn"].__version__, np.__version__, numba.__version__, llvmlite.__version__)
    digest = hashlib.sha256(repr((versions, llvm_version_info)).encode())
    for source in sorted(files("anybn.kernels.cpu").iterdir(), key=lambda source: source.name):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


_STAMP = _stamp()  # of what this process has imported, whatever an update puts in its place later
_DIGEST_BYTES = 32


class _Files(FunctionCache):
    """One file for each signature, named after it and after `_STAMP`, which begins with a digest of what follows.

    Numba's own index knows the stamp of the function's file alone, so it would go on giving old code after a change to
    what the function calls. It numbers its files, too: two processes that save two signatures at the same time give
    them one number, and from then on the kernel of one is loaded for the other (Numba 0.68.1;
    https://github.com/numba/numba/issues/4807 is open, on caches that several processes fill). And it raises what
    reading and writing raise. Delete this class when Numba does none of these.
    """

    def _file(self, signature: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr(self._index_key(signature, codegen)).encode()).hexdigest()[:32]
        return Path(self._cache_path, f"{self._impl.filename_base}.{_STAMP}.{key}.nbc")

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        with suppress(Exception):  # a file that is not there, or damaged, of which unpickling raises anything
            content = self._file(sig, target_context.codegen()).read_bytes()
            if hashlib.sha256(content[_DIGEST_BYTES:]).digest() == content[:_DIGEST_BYTES]:
                return self._impl.rebuild(target_context, pickle.loads(content[_DIGEST_BYTES:]))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._impl.check_cachable(data):
            return
        content = dumps(self._impl.reduce(data))
        file = self._file(sig, data.codegen)
        with suppress(OSError):  # a full disk, a folder that has become unwritable
            self._impl.locator.ensure_cache_path()
            with self._cache_file._open_for_write(str(file)) as opened:
                opened.write(hashlib.sha256(content).digest() + content)
            for old in file.parent.glob(f"{self._impl.filename_base}.*.nbc"):
                if f".{_STAMP}." not in old.name:
                    old.unlink()


# As Numba takes them. Whoever holds them may compile what is not ours.
held_in_forks.extend((global_compiler_lock._lock, llvmlite.binding.ffi.lib._lock._lock))


class _Kernel(CPUDispatcher):
    """What `cached` makes of a function."""

    def compile(self, sig: Any) -> Any:
        return undisturbed(functools.partial(super().compile, sig))

    def enable_caching(self) -> None:
        global problem
        try:
            self._cache = _Files(self.py_func)
        except RuntimeError as error:  # "cannot cache function ...: no locator available"
            problem = (
                f"compiled anew in every process, since no folder can be written to ({error}): set NUMBA_CACHE_DIR"
            )


def cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit(cache=True, **options)``, as a decorator."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**options)(function)
        if isinstance(dispatcher, CPUDispatcher):  # with NUMBA_DISABLE_JIT, it is the function
            dispatcher.__class__ = _Kernel
            dispatcher.enable_caching()
        return dispatcher

    return decorate


class Callback(CFunc):
    """A compiled function of three int64, without a result, for torch's dispatcher to call at its ``address``."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function, ((types.int64,) * 3, types.void), {}, {"error_model": "numpy"})
        with suppress(RuntimeError):  # see `_Kernel`
            self._cache = _Files(function)
        undisturbed(self.compile)
