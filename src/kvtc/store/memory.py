"""`memory:` entries in this process, up to a byte budget; those used longest ago go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import StoreFull
from ..process.forks import in_child
from .base import StoreStatistics
from .frame import Frame
from .framed import FramedStore, Listed
from .urls import StoreUrl, parse_bytes

DEFAULT_BYTES = 1 << 30
ENTRY_BYTES = 512  # what Python spends on an entry beside its frame, roughly: empty values too must hit the budget


class MemoryStore(FramedStore):
    """Entries in the memory of this process. A forked child has a copy of its own.

    Parameters:
        url: `memory:`. Option `bytes`: the budget, with 512 bytes for each entry beside its frame.
            The entries that were used longest ago are evicted first.
    """

    is_of_process = True

    def __init__(self, url: StoreUrl) -> None:
        self._take_place(url)
        self._max_bytes = url.take("bytes", parse_bytes, DEFAULT_BYTES)
        super().__init__(url)
        self._frames: OrderedDict[str, Any] = OrderedDict()  # as `_hold` gives them; used longest ago comes first
        self._renew()
        in_child(self._renew)

    def _take_place(self, url: StoreUrl) -> None:
        url.expect_no_path()

    def _renew(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close the store while its thread is in here
        # Counted anew: room may be reserved for what only the parent goes on to put.
        self._bytes = sum(len(held) + ENTRY_BYTES for held in self._frames.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._max_bytes} bytes)"

    def statistics(self) -> StoreStatistics:
        with self._lock:
            return self._counters.snapshot(len(self._frames), self._bytes)

    def close(self) -> None:
        super().close()
        with self._lock:
            self._frames.clear()
            self._bytes = 0

    def _read(self, names: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            self._mark_used(names)
            held = [self._frames.get(name) for name in names]
        return [None if one is None else self._frame(one) for one in held]

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        for name, frame in zip(names, frames, strict=True):
            self._keep(name, frame)
        with self._lock:
            self._mark_used(names)

    def _mark_used(self, names: Sequence[str]) -> None:
        """The head of a chain ends as the most recent: without it the rest is of no use."""
        for name in reversed(names):
            if name in self._frames:
                self._frames.move_to_end(name)

    def _keep(self, name: str, frame: bytes) -> None:
        size = len(frame) + ENTRY_BYTES
        if size > self._max_bytes:
            raise StoreFull(f"an entry of {size} bytes exceeds the byte budget of {self!r}")
        evictions = self._reserve(name, size)
        if evictions:
            self._counters.add(evictions=evictions)
        try:
            held = self._hold(frame)
        except BaseException:
            with self._lock:
                self._bytes -= size
            raise
        with self._lock:
            self._drop(name)  # another thread's
            self._frames[name] = held

    def _reserve(self, name: str, size: int) -> int:
        """Make room for an entry before it is held; entries evicted for it."""
        evictions = 0
        with self._lock:
            self._drop(name)
            while self._frames and self._bytes + size > self._max_bytes:
                self._drop(next(iter(self._frames)))
                evictions += 1
            self._bytes += size
        return evictions

    def _hold(self, frame: bytes) -> Any:
        """What stands for a frame here, of the same length."""
        return frame

    def _frame(self, held: Any) -> bytes:
        """The frame that something stands for."""
        frame: bytes = held
        return frame

    def _drop(self, name: str) -> None:
        frame = self._frames.pop(name, None)
        if frame is not None:
            self._bytes -= len(frame) + ENTRY_BYTES

    def _leading(self, names: Sequence[str]) -> int:
        with self._lock:
            return next((i for i, name in enumerate(names) if name not in self._frames), len(names))

    def _remove(self, name: str) -> None:
        with self._lock:
            self._drop(name)

    def _discard(self, name: str, frame: Frame) -> None:
        with self._lock:
            held = self._frames.get(name)
            if held is not None and self._frame(held) == frame:
                self._drop(name)

    def _list(self) -> Iterator[Listed]:
        with self._lock:
            return iter([Listed(name, len(held), None) for name, held in self._frames.items()])
