"""How loops are compiled: once a machine where a cache can be written, else once a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit`, with its cache on disk: beside the file, or in the user's cache directory where that is not writable.

    Where neither is, numba refuses to make a function with a cache; it gets none then. What is kept goes by the function's own
    file, its size and time: so a file of compiled functions takes no constant from another that could change without it.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:
            return njit(error_model="numpy", **options)(function)

    return decorate
