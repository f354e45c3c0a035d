"""What a prefix cache has done so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Statistics:
    """Counts since the prefix cache was made.

    loads, hits: calls of `load`, and those that found tokens. tokens_asked, tokens_loaded: summed over loads. saves, saves_skipped:
    saves done, and those of texts too short. chunks_coded, chunks_shared: whole chunks newly coded, and found there already.
    tails_saved. bytes_written, bytes_read: of entries. unusable: entries that could not be decoded; each was deleted and counts as
    a miss. store_errors: failed calls of the store; on load they are misses.
    """

    loads: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_loaded: int = 0
    saves: int = 0
    saves_skipped: int = 0
    chunks_coded: int = 0
    chunks_shared: int = 0
    tails_saved: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    unusable: int = 0
    store_errors: int = 0


class Counters:
    """Statistics being counted, by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {field.name: 0 for field in fields(Statistics)}

    def add(self, **counts: int) -> None:
        """Add to counts by name."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def read(self) -> Statistics:
        """The counts at this moment."""
        with self._lock:
            return Statistics(**self._counts)
