"""Work in several threads that are there for one call: threads that waited for the next one would be missing after a fork."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_LEAST_OPERATIONS = 1 << 25
"""From which a second thread pays for being started."""


def in_threads(work: Callable[[int, int], object], count: int, n_operations: int) -> None:
    """Call `work(first, stop)` for parts of `count` items, as many at a time as torch has threads; it must let go of Python's lock.

    n_operations: of all of it; a small work is done by the caller alone. Raises what `work` raises.
    """
    n_threads = max(1, min(torch.get_num_threads(), count, n_operations // _LEAST_OPERATIONS))
    parts = [(count * index // n_threads, count * (index + 1) // n_threads) for index in range(n_threads)]
    failed: list[BaseException] = []

    def run(first: int, stop: int) -> None:
        try:
            work(first, stop)
        except BaseException as error:  # noqa: BLE001  the caller raises it
            failed.append(error)

    others = [threading.Thread(target=run, args=part, daemon=True) for part in parts[1:]]
    for thread, part in zip(others, parts[1:], strict=True):
        try:
            thread.start()
        except RuntimeError:  # none can be had: too many, or the interpreter ends
            run(*part)
    run(*parts[0])
    for thread in others:
        if thread.ident is not None:
            thread.join()
    if failed:
        raise failed[0]
