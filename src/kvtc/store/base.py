"""The contract of every store: opaque bytes under short keys.

A store may forget anything at any time (it is a cache), but never returns other bytes than were put
under that key. All methods may be called from any number of threads.
"""

from __future__ import annotations

import logging
import operator
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, TypeVar

from ..errors import PROGRAM_ENDS, InvalidArgument, StoreError, StoreUnavailable
from ..process.forks import in_child
from ..process.log_limits import log_once

logger = logging.getLogger(__name__)

MAX_KEY_LENGTH = 200
MAX_NAMESPACE_LENGTH = 48
_KEY = re.compile(rf"[a-z0-9/._-]{{1,{MAX_KEY_LENGTH}}}", re.ASCII)
_NAMESPACE = re.compile(rf"[a-z0-9._-]{{1,{MAX_NAMESPACE_LENGTH}}}", re.ASCII)

Value: TypeAlias = bytes | bytearray | memoryview
Listener: TypeAlias = Callable[[str], None]
T = TypeVar("T")
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def telling_unreadable(listener: Listener) -> Iterator[None]:
    """A block whose reads call `listener` with "damaged" or "foreign", as in `StoreStatistics`, for
    each entry that a store of kvtc finds so. To the reader such an entry is None, as a missing one.
    """
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


@dataclass(frozen=True)
class StoreStatistics:
    """What a store has done for all its users since it was opened; each user has counters of its
    own, `kvtc.counts.COUNTERS`. Other processes on the same storage count for themselves.

    Parameters:
        hits: Values that were found.
        misses: Values that were not: absent, damaged, foreign or out of reach.
        puts: Values of calls that kept all they were given.
        bytes_read: Bytes of the values found.
        bytes_written: Bytes of the values kept.
        evictions: Entries removed to keep the byte budget.
        errors: Calls that the place of storage refused or did not answer.
        damaged: Entries that were truncated, corrupted or swapped, and are removed.
        foreign: Entries of a newer format, of another encryption key or longer than is read;
            they stay.
        stored_entries: Entries in the store now; None: counting them takes long.
        stored_bytes: Bytes of all entries, frames included; None: as for `stored_entries`.

    Example:
        >>> with kvtc.open_store("memory:") as store:
        ...     store.put("name", b"value")
        ...     found = store.get("name"), store.get("another")
        ...     statistics = store.statistics()
        >>> statistics.puts, statistics.hits, statistics.misses, statistics.stored_entries
        (1, 1, 1, 1)
    """

    hits: int = 0
    misses: int = 0
    puts: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evictions: int = 0
    errors: int = 0
    damaged: int = 0
    foreign: int = 0
    stored_entries: int | None = None
    stored_bytes: int | None = None


class Counters:
    """The running numbers behind `StoreStatistics`."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close a store, which counts, while its thread counts

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] = self._counts.get(name, 0) + amount

    def snapshot(self, stored_entries: int | None = None, stored_bytes: int | None = None) -> StoreStatistics:
        with self._lock:
            return StoreStatistics(**self._counts, stored_entries=stored_entries, stored_bytes=stored_bytes)


class Store(ABC):
    """A mapping of keys to bytes. All methods may be called from any number of threads.

    A key has 1 to 200 characters of `a-z 0-9 / . _ -`; a value is any bytes, also none. A child
    of `os.fork` may use a store that its parent has used: it has locks, threads and connections
    of its own, or says at once that it cannot.

    Every method but `statistics` and `close` raises `InvalidArgument` if a key or value is not
    of this kind, and `StoreUnavailable` if the storage cannot be reached or has not answered,
    or the store is closed.

    Attributes:
        namespace: Of its keys; None: none.
        is_of_process: Whether its entries are in the memory of this process, so that such a
            store that another process opens does not have them.

    Example:
        >>> store = kvtc.open_store("memory:")
        >>> store.put_many([("a/1", b"one"), ("a/2", b"two")])
        >>> store.get_many(["a/1", "a/2", "a/3"]), store.contains_prefix(["a/1", "a/2", "a/3"])
        ([b'one', b'two', None], 2)
        >>> store.put("a/3", b"three")
        >>> store.get("a/3"), store.statistics().puts
        (b'three', 3)
        >>> store.delete("a/1")
        >>> store.contains("a/1"), store.contains_many(["a/1", "a/2"]), list(store.keys())
        (False, [False, True], ['a/2', 'a/3'])
        >>> store.flush()
        >>> store.close()
    """

    namespace: str | None = None
    is_of_process = False  # entries lie in this process, and are not to be had by opening such a store in another

    def __init__(self) -> None:
        self._counters = Counters()
        self._is_closed = False
        self._opened_by: tuple[Any, dict[str, Any]] | None = None  # `open_store`'s arguments, to do so again elsewhere

    def get(self, key: str) -> bytes | None:
        """Read a value.

        Parameters:
            key: Of the entry.

        Returns:
            The value; None: a miss.
        """
        return self.get_many([key])[0]

    @abstractmethod
    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Read values.

        Parameters:
            keys: Of a chain, first to last, so that its first entry is evicted last.

        Returns:
            One value for each key, None for a miss.
        """

    def resident_many(self, keys: Sequence[str]) -> list[Any]:
        """As `get_many`, but a value on a device may come as it lies there, not copied.

        Parameters:
            keys: As in `get_many`.

        Returns:
            One value for each key: bytes, a uint8 tensor [bytes] on the device, or None for a
                miss.
        """
        return self.get_many(keys)

    def put(self, key: str, value: Value) -> None:
        """Keep a value in place of an older one.

        Parameters:
            key: Of the entry.
            value: Its bytes.

        Raises:
            StoreFull: There is no room for it.
        """
        self.put_many([(key, value)])

    @abstractmethod
    def put_many(self, entries: Iterable[tuple[str, Value]]) -> None:
        """Keep values, in this order.

        Parameters:
            entries: (key, value); those of a chain first to last, as in `get_many`.

        Raises:
            StoreFull: There is no room for a value. The values before it are kept, here as after
                any error.
        """

    def contains(self, key: str) -> bool:
        """Whether a key has an entry. It is not read: only `get` finds out whether it is sound.

        Parameters:
            key: Of the entry.

        Returns:
            True or False.
        """
        return self.contains_prefix([key]) == 1

    @abstractmethod
    def contains_prefix(self, keys: Sequence[str]) -> int:
        """How many leading keys have entries, for lookups along a chain; one round trip where
        possible.

        Parameters:
            keys: Of a chain, first to last.

        Returns:
            The number of keys before the first that has no entry.
        """

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Which keys have entries, where those behind a missing one are of use too; few round trips
        where possible.

        Parameters:
            keys: Of any entries.

        Returns:
            One truth value for each key.
        """
        return [self.contains(key) for key in keys]

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an entry; no error if the key has none.

        Parameters:
            key: Of the entry.
        """

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """Every key of this namespace, in no order. Reads the whole store: for maintenance."""

    def flush(self) -> None:
        """Wait until all values that were put are where they belong."""
        self._check_open()  # nothing is pending in most stores

    def statistics(self) -> StoreStatistics:
        """What the store has done since it was opened."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Flush, and close files and connections. May be called twice."""
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, dict[str, Any]]]:
        """What is written of it holds the URL and options of the store, passwords too; unpickled, it is opened
        again."""
        if self._opened_by is None or self.is_of_process:
            reason = "its entries lie in this process" if self.is_of_process else "it was not opened by a URL"
            raise InvalidArgument(f"{self!r} cannot be pickled: {reason}; open a store where it is used")
        return _open_again, self._opened_by

    def _counted(self, values: list[T]) -> list[T]:
        """Values that were read, of which None is a miss."""
        found: list[Any] = [value for value in values if value is not None]
        n_bytes = sum(len(value) for value in found)
        self._counters.add(hits=len(found), misses=len(values) - len(found), bytes_read=n_bytes)
        return values

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable(f"{self!r} is closed")

    def _found_damaged(self, name: str, cause: object, discard: Callable[[], None]) -> None:
        """Count, log and delete an entry that is damaged; where that fails, it is a miss again the
        next time."""
        self._tell_unreadable("damaged", "is damaged and is deleted", name, cause)
        try:
            discard()
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001
            self._counters.add(errors=1)
            kind = type(error).__name__
            log_once(logger, f"discard {kind}", "%r: damaged entry %s is not deleted: %s: %s", self, name, kind, error)

    def _found_foreign(self, name: str, cause: object) -> None:
        """Count and log an entry that is left alone."""
        self._tell_unreadable("foreign", "cannot be read here and is left alone", name, cause)

    def _tell_unreadable(self, counter: str, message: str, name: str, cause: object) -> None:
        self._counters.add(**{counter: 1})
        if listener := _listener.get():
            listener(counter)
        log_once(logger, counter, "%r: entry %s %s: %s", self, name, message, cause)


def _open_again(url: Any, options: dict[str, Any]) -> Store:
    from . import open_store

    return open_store(url, **options)


def check_key(key: str) -> str:
    """The key itself, or `InvalidArgument`."""
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise InvalidArgument(f"key {key!r:.80}: expected 1 to {MAX_KEY_LENGTH} characters of a-z 0-9 / . _ -")
    return key


def check_value(value: Value) -> Value:
    """The value itself, or `InvalidArgument`."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise InvalidArgument(f"value is {type(value).__name__}; expected bytes")
    return value


def read_value(value: Any, *, is_resident: bool = False) -> Any:
    """A value of anybody's store as bytes or None.

    Parameters:
        value: As the store gives it.
        is_resident: Whether a uint8 tensor [bytes] is taken, too, and left as it is.

    Raises:
        StoreError: It is something else.
    """
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if is_resident and str(getattr(value, "dtype", None)) == "torch.uint8" and value.ndim == 1:
        return value
    raise StoreError(f"a store gives {type(value).__name__} as a value; expected bytes")


def read_values(values: Iterable[Any], n_keys: int, *, is_resident: bool = False) -> list[Any]:
    """The values of anybody's store for so many keys, each as of `read_value`; `StoreError` for
    another number of them."""
    found = [read_value(value, is_resident=is_resident) for value in values]
    if len(found) != n_keys:
        raise StoreError(f"a store gives {len(found)} values for {n_keys} keys")
    return found


def read_count(count: Any, n_keys: int) -> int:
    """How many leading keys anybody's store says that it has, within 0 .. n_keys; `StoreError` for
    what is no integer."""
    try:
        return min(max(operator.index(count), 0), n_keys)
    except TypeError:
        raise StoreError(f"a store gives {type(count).__name__} as a number of entries; expected int") from None


def read_flags(flags: Iterable[Any], n_keys: int) -> list[bool]:
    """Which of so many keys anybody's store says that it has; `StoreError` for another number of
    them."""
    found = [bool(flag) for flag in flags]
    if len(found) != n_keys:
        raise StoreError(f"a store tells of {len(found)} keys whether it has them; {n_keys} were asked for")
    return found


class Names:
    """Keys of one namespace as names of entries, and back.

    A name serves as a file name and as an object key alike: `!` stands for `/`, and the namespace
    is written before it with `=`. Neither sign occurs in keys, so no two keys of any namespaces
    have one name.

    Parameters:
        namespace: Of the keys; None: none.

    Raises:
        InvalidArgument: The namespace has other characters, or too many.
    """

    def __init__(self, namespace: str | None) -> None:
        if namespace is not None and _NAMESPACE.fullmatch(namespace) is None:
            raise InvalidArgument(
                f"namespace {namespace!r:.80}: expected 1 to {MAX_NAMESPACE_LENGTH} characters of a-z 0-9 . _ -"
            )
        self.prefix = "" if namespace is None else f"{namespace}="

    def name(self, key: str) -> str:
        return self.prefix + check_key(key).replace("/", "!")

    def key(self, name: str) -> str | None:
        """The key behind a name; None for a name of another namespace or of no entry."""
        if not name.startswith(self.prefix) or "/" in name:
            return None
        key = name[len(self.prefix) :].replace("!", "/")
        return key if _KEY.fullmatch(key) else None


def split_name(name: str) -> tuple[str | None, str] | None:
    """(namespace, key) behind the name of an entry of any namespace; None for a name of no entry."""
    namespace, found, _ = name.rpartition("=")
    if found and _NAMESPACE.fullmatch(namespace) is None:
        return None
    key = Names(namespace if found else None).key(name)
    return None if key is None else (namespace if found else None, key)
