"""Entries of a store, for callers who must not fail because of them: what is a miss, what is damage, what is counted and logged.

    load, decode, count_leading    whatever fails is a miss, counted
    save, forget                   whatever fails is not done, counted
    fetch, put, write, delete      for callers who are to be told: `StoreError`, whatever the store raised, counted too

What is wrong with an entry decides what becomes of it:

    damaged         the entry contradicts itself, or ends too early: it is deleted, so that it is stored anew
    other           it is of a newer format, or of another calibration or text than asked for: left alone, somebody else reads it
    decode_errors   there was no memory for it, or code failed: left alone, the entry may be sound

What fails is logged with its cause, one of each kind a minute. `KeyboardInterrupt` and `SystemExit` pass, and nothing else does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from .counts import Counts
from .errors import PROGRAM_ENDS, CorruptStream, KvtcError, StoreError, TruncatedStream
from .process.log_limits import log_once
from .store import Store
from .store.base import read_count, read_values

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Entries:
    """What one user of a store does with it; the store may be anybody's. Safe to share between threads.

    counts: see `counts.COUNTERS`; whoever uses this adds counts of its own.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.counts = Counts()

    def load(self, keys: Sequence[str], *, is_resident: bool = False) -> list[Any]:
        """Entries, each None where it cannot be had. is_resident: as `Store.resident_many` gives them."""
        try:
            return self.fetch(keys, is_resident=is_resident)
        except StoreError:
            return [None] * len(keys)

    def decode(self, key: str, entry: Any, decode: Callable[[Any], T]) -> T | None:
        """What `decode` makes of an entry of `load`; None, a counted miss, where there is none and where it raises."""
        if entry is None:
            self.counts.add(misses=1)
            return None
        decoded = self.parse(key, entry, decode)
        if decoded is not None:
            self.counts.add(entries_loaded=1)
        return decoded

    def parse(self, key: str, entry: Any, decode: Callable[[Any], T]) -> T | None:
        """As `decode`, but of what is there and is no cache: where it is read, nothing is counted."""
        try:
            return decode(entry)
        except (CorruptStream, TruncatedStream) as error:
            self._miss("damaged", error, "entry %s is damaged and is deleted", key)
            self.forget(key)
        except KvtcError as error:
            self._miss("other", error, "entry %s is not what was asked for and is left alone", key)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  no fault of the entry, and none of the caller's
            self._miss("decode_errors", error, "entry %s is not decoded", key)
        return None

    def count_leading(self, keys: Sequence[str]) -> int:
        """How many leading keys have entries; 0 where the store fails."""
        self.counts.add(lookups=1)
        try:
            with self._asking("tell what it has"):
                return read_count(self.store.contains_prefix(keys), len(keys))
        except StoreError:
            return 0

    def save(self, key: str, encode: Callable[[], bytes], original_bytes: int = 0) -> int | None:
        """As `put`, but None where anything fails."""
        try:
            return self.put(key, encode, original_bytes)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  what is not saved is a later miss, no more
            self.count_error("save_errors", error, "entry %s is not saved", key)
            return None

    def forget(self, key: str) -> None:
        """Delete an entry, if the store does."""
        with suppress(StoreError):
            self.delete(key)

    def fetch(self, keys: Sequence[str], *, is_resident: bool = False) -> list[Any]:
        """As `load`. Raises `StoreError`."""
        with self._asking("read"):
            entries = (self.store.resident_many if is_resident else self.store.get_many)(keys)
            entries = read_values(entries, len(keys), is_resident=is_resident)
        self.counts.add(bytes_read=sum(len(entry) for entry in entries if entry is not None))
        return entries

    def put(self, key: str, encode: Callable[[], bytes], original_bytes: int = 0, *, replace: bool = False) -> int:
        """Store what `encode` gives; its bytes, or 0 where the key had an entry already, which is not looked at.

        original_bytes: what it takes as a cache, to be counted. replace: store it in any case.
        Raises `StoreError`, and what `encode` raises.
        """
        if not replace:
            with self._asking("tell what it has"):
                is_there = self.store.contains(key)
            if is_there:
                self.counts.add(entries_shared=1)
                return 0
        entry = encode()
        self.write(key, entry)
        self.counts.add(entries_saved=1, bytes_saved=len(entry), original_bytes=original_bytes)
        return len(entry)

    def write(self, key: str, value: bytes) -> None:
        """Put what is no cache, and not counted. Raises `StoreError`."""
        with self._asking("write"):
            self.store.put(key, value)

    def delete(self, key: str) -> None:
        """Delete an entry, if there is one. Raises `StoreError`."""
        with self._asking("delete"):
            self.store.delete(key)

    def count_error(self, counter: str, error: BaseException, message: str, *arguments: object) -> None:
        """Count what was given up because of an error, and log it: with its traceback, where nobody raised it on purpose.

        message, arguments: as of `logging.Logger.warning`; one message and class of errors are one kind.
        """
        self.counts.add(**{counter: 1})
        name, unexpected = type(error).__name__, None if isinstance(error, KvtcError) else error
        log_once(logger, f"{message} {name}", f"{message}: %s: %s", *arguments, name, error, exc_info=unexpected)

    def _miss(self, counter: str, error: BaseException, message: str, key: str) -> None:
        self.counts.add(misses=1)
        self.count_error(counter, error, message, key)

    @contextmanager
    def _asking(self, to_do: str) -> Iterator[None]:
        """Whatever a store raises is a counted, logged `StoreError`."""
        try:
            yield
        except PROGRAM_ENDS:
            raise
        except BaseException as error:
            self.count_error("store_errors", error, f"the store did not {to_do}")
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the store did not {to_do}: {type(error).__name__}: {error}") from error
