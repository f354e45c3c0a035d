"""What is counted while caches go to a store and come back, in one vocabulary for all users of
stores."""

from __future__ import annotations

from collections import Counter

from .process.forks import in_child
from .process.locks import ForkSafeLock

COUNTERS = {
    "lookups": "Questions to the store about what it has.",
    "misses": "Entries asked for that could not be had, for whatever reason.",
    "entries_loaded": "Entries fetched and decoded.",
    "bytes_read": "Bytes of entries fetched.",
    "damaged": "Entries found damaged, and deleted.",
    "other": "Entries of another format, calibration or text than asked for, left alone.",
    "decode_errors": "Entries not decoded for lack of memory or because of an unexpected error, left alone.",
    "entries_saved": "Entries coded and stored.",
    "entries_shared": "Entries that were in the store already.",
    "bytes_saved": "Bytes of entries stored.",
    "original_bytes": "Bytes that the stored entries take as caches.",
    "save_errors": "Entries, or prefixes of a prefix cache, not stored because of an error.",
    "saves_dropped": "Entries not stored because too many were waiting.",
    "store_errors": "Calls that the store refused, did not answer or failed in.",
    "loads": "Loads that have ended.",
    "load_errors": "Loads ended by an unexpected error.",
    "hits": "Loads, or requests of an engine, for which tokens were found.",
    "tokens_asked": "Tokens of the prompts that were looked up.",
    "tokens_found": "Leading tokens of prompts found in the store.",
    "tokens_promised": "Tokens that an engine asked to load.",
    "tokens_loaded": "Tokens loaded.",
    "tokens_missed": "Tokens that could not be loaded and were left to the engine.",
    "saves": "Prefixes saved.",
    "saves_skipped": "Prefixes too short to be saved.",
    "requests_unknown": "Requests neither looked up nor saved, because their adapter cannot be told from others.",
    "other_models": "Chunks of other models than the one served, left alone.",
    "starts_searched": "Chunks stored whose position was searched, because the engine did not give it.",
}


class Counts:
    """Numbers that only grow, counted by many threads. A forked child counts for itself, from
    nothing."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._totals, self._taken = Counter[str](), Counter[str]()
        in_child(self._renew)

    def add(self, **amounts: int) -> None:
        """Add to counters of `COUNTERS` by name."""
        if unknown := amounts.keys() - COUNTERS.keys():
            raise KeyError(f"there is no counter {', '.join(sorted(unknown))}")
        with self._lock:
            self._totals.update(amounts)

    def read(self) -> Counter[str]:
        """All of them so far; 0 for what never happened."""
        with self._lock:
            return Counter(self._totals)

    def take(self) -> dict[str, int]:
        """What was added since the last take."""
        with self._lock:
            news = self._totals - self._taken
            self._taken = Counter(self._totals)
        return dict(news)

    def _renew(self) -> None:
        self._totals, self._taken = Counter[str](), Counter[str]()
