"""How loops are compiled: once a machine where a cache can be written, else once a process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import IndexDataCacheFile


class _CacheFiles(IndexDataCacheFile):  # type: ignore[misc]  # numba has no types
    """numba's cache of one function, safe to fill from several processes at a time.

    numba numbers the files of compiled code. Two processes that add an overload at the same time take one number, and the index
    then gives the code of one overload for another. Here the name follows from the overload, and its code is there before the
    index names it: all that a race can lose is an entry, which is compiled again.
    """

    def save(self, key: Any, data: Any) -> None:
        """As numba's."""
        name = f"{self._index_name}.{hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()[:32]}.nbc"
        self._save_data(name, data)
        self._save_index(self._load_index() | {key: name})


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit`, with its cache on disk: beside the file, or in the user's cache directory where that is not writable.

    Where neither is, numba refuses to make a function with a cache; it gets none then. What is kept goes by the function's own
    file, its size and time: so a file of compiled functions takes no constant from another that could change without it.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            made = njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:
            return njit(error_model="numpy", **options)(function)
        made._cache._cache_file.__class__ = _CacheFiles
        return made

    return decorate
