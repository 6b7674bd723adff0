"""numba.njit with a cache on disk that several processes can fill at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import IndexDataCacheFile


class _FilePerSignature(IndexDataCacheFile):
    """Numba numbers the files of a function's signatures. Two processes that save two signatures at the same time give
    them one number, and from then on the kernel of one is loaded for the other, whose calls are TypeErrors. With a file
    named after its signature they can lose an entry of the index, and compile again.

    Seen with Numba 0.68.1. https://github.com/numba/numba/issues/4807 is open, on caches that several processes fill;
    we know of no issue on the numbers alone. Delete this class when Numba's `save` names a file after its key, or locks
    the index from reading to writing it.
    """

    def save(self, key: Any, data: Any) -> None:
        name = self._data_name_pattern.replace("{number:d}", hashlib.sha1(repr(key).encode()).hexdigest())
        self._save_data(name, data)
        self._save_index(self._load_index() | {key: name})


def cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit(cache=True, **options)``, as a decorator."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(cache=True, **options)(function)
        if files := getattr(getattr(dispatcher, "_cache", None), "_cache_file", None):  # none with NUMBA_DISABLE_JIT
            files.__class__ = _FilePerSignature
        return dispatcher

    return decorate
