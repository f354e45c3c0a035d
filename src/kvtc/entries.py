"""Entries of a store, for callers who must not fail because of them: what is a miss, what is
damage, what is counted and logged.

    read, decode, count_leading, present    an error is a miss
    save, forget                            an error means that it is not done
    fetch, put, write, delete               an error is raised, as `StoreError` whatever the store raised

Every error is counted. The fault of an entry, found by its store or by decoding, decides whether it
stays:

    damaged         it fails a checksum, contradicts itself or ends too early: it is deleted, and the next save stores it again
    other           it is of a newer format, or of another encryption key, calibration or text: it stays, others read it
    decode_errors   there was no memory to decode it, or code failed: it stays, it may be sound

Every error is logged with the entry and its cause, one of each kind a minute, and begins with the request if it happens inside of
`concerning`; an entry that is missing is logged as information. Only `KeyboardInterrupt` and
`SystemExit` (`PROGRAM_ENDS`) reach the caller of the first two groups.
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
from .store.base import read_count, read_flags, read_values, telling_unreadable

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Entries:
    """The entries of one user of a store. Safe to share between threads.

    Parameters:
        store: The store, which may be anybody's and may raise anything.

    Attributes:
        counts: Counters of `counts.COUNTERS`; the user adds counters of its own.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.counts = Counts()

    def read(self, keys: Sequence[str], *, is_resident: bool = False) -> list[Any]:
        """Read entries.

        Parameters:
            keys: Of a chain, first to last.
            is_resident: Whether entries on a device may come as tensors, as of
                `Store.resident_many`.

        Returns:
            One entry for each key, None where it is missing or the store fails.
        """
        try:
            return self.fetch(keys, is_resident=is_resident)
        except StoreError:
            return [None] * len(keys)

    def decode(self, key: str, entry: Any, decode: Callable[[Any], T]) -> T | None:
        """Decode an entry.

        Parameters:
            key: Of the entry.
            entry: As `read` gives it, None too.
            decode: Makes of an entry what is wanted.

        Returns:
            What `decode` returns; None, a counted miss, where the entry is None or `decode` raises.
        """
        if entry is None:
            self.counts.add(misses=1)
            log_once(logger, "missing", "entry %s is missing, or the store did not give it", key, level=logging.INFO)
            return None
        decoded = self.parse(key, entry, decode)
        if decoded is not None:
            self.counts.add(entries_loaded=1)
        return decoded

    def parse(self, key: str, entry: Any, decode: Callable[[Any], T]) -> T | None:
        """As `decode`, for an entry that is not None and holds no cache: success is not counted."""
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
            with self._asking("tell whether it has", keys):
                return read_count(self.store.contains_prefix(keys), len(keys))
        except StoreError:
            return 0

    def present(self, keys: Sequence[str]) -> list[bool]:
        """Which keys have entries; none where the store fails."""
        self.counts.add(lookups=1)
        try:
            with self._asking("tell whether it has", keys):
                return read_flags(self.store.contains_many(keys), len(keys))
        except StoreError:
            return [False] * len(keys)

    def save(self, key: str, encode: Callable[[], bytes], original_bytes: int = 0) -> int | None:
        """As `put`, but None, counted and logged, where anything fails."""
        with self.giving_up("save_errors", "entry %s is not saved", key):
            return self.put(key, encode, original_bytes)
        return None

    def forget(self, key: str) -> None:
        """Delete an entry, if the store does not fail."""
        with suppress(StoreError):
            self.delete(key)

    def fetch(self, keys: Sequence[str], *, is_resident: bool = False) -> list[Any]:
        """As `read`, but raises `StoreError` where the store fails."""
        with self._asking("read", keys), telling_unreadable(self._count_unreadable):
            entries = (self.store.resident_many if is_resident else self.store.get_many)(keys)
            entries = read_values(entries, len(keys), is_resident=is_resident)
        self.counts.add(bytes_read=sum(len(entry) for entry in entries if entry is not None))
        return entries

    def put(self, key: str, encode: Callable[[], bytes], original_bytes: int = 0, *, replace: bool = False) -> int:
        """Store an entry unless the key has one.

        Parameters:
            key: Of the entry.
            encode: Gives the entry; called only if it is stored.
            original_bytes: Bytes of the cache that is stored, to be counted.
            replace: Whether it is stored in place of an entry that the key has.

        Returns:
            Bytes of the entry; 0 if the key had one, which is not read.

        Raises:
            StoreError: The store failed.
            BaseException: Whatever `encode` raises.
        """
        if not replace:
            with self._asking("tell whether it has", [key]):
                is_there = self.store.contains(key)
            if is_there:
                self.counts.add(entries_shared=1)
                return 0
        entry = encode()
        self.write(key, entry)
        self.counts.add(entries_saved=1, bytes_saved=len(entry), original_bytes=original_bytes)
        return len(entry)

    def write(self, key: str, value: bytes) -> None:
        """Store an entry that holds no cache and is not counted. Raises `StoreError`."""
        with self._asking("write", [key]):
            self.store.put(key, value)

    def delete(self, key: str) -> None:
        """Delete an entry, if the key has one. Raises `StoreError`."""
        with self._asking("delete", [key]):
            self.store.delete(key)

    @contextmanager
    def giving_up(self, counter: str, message: str, *arguments: object) -> Iterator[None]:
        """A block that ends where it raises an error, which is counted and logged and goes no
        further.

        Parameters:
            counter, message, arguments: As of `count_error`.
        """
        try:
            yield
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001
            self.count_error(counter, error, message, *arguments)

    def count_error(self, counter: str, error: BaseException, message: str, *arguments: object) -> None:
        """Count and log an error because of which something was given up.

        Parameters:
            counter: Of `COUNTERS`.
            error: Logged with its traceback unless it is a `KvtcError`, which somebody raised on
                purpose.
            message, arguments: As of `logging.Logger.warning`. One message and one class of errors
                are one kind for `log_once`.
        """
        self.counts.add(**{counter: 1})
        name, unexpected = type(error).__name__, None if isinstance(error, KvtcError) else error
        log_once(logger, f"{message} {name}", f"{message}: %s: %s", *arguments, name, error, exc_info=unexpected)

    def _count_unreadable(self, found: str) -> None:
        """Of what a store finds and logs itself."""
        self.counts.add(**{"other" if found == "foreign" else found: 1})

    def _miss(self, counter: str, error: BaseException, message: str, key: str) -> None:
        self.counts.add(misses=1)
        self.count_error(counter, error, message, key)

    @contextmanager
    def _asking(self, to_do: str, keys: Sequence[str]) -> Iterator[None]:
        """Whatever a store raises is a counted, logged `StoreError`."""
        try:
            yield
        except PROGRAM_ENDS:
            raise
        except BaseException as error:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            self.count_error(
                "store_errors", error, f"the store did not {to_do} %s%s", keys[0] if keys else "nothing", more
            )
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the store did not {to_do} an entry: {type(error).__name__}: {error}") from error
