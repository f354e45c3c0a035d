"""The contract of every store: opaque bytes under short keys.

A store may forget anything at any time (it is a cache), but never returns other bytes than were put under that key.
All methods may be called from any number of threads.
"""

from __future__ import annotations

import operator
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from ..errors import InvalidArgument, StoreError, StoreUnavailable
from ..process.forks import in_child

MAX_KEY_LENGTH = 200
MAX_NAMESPACE_LENGTH = 48
_KEY = re.compile(rf"[a-z0-9/._-]{{1,{MAX_KEY_LENGTH}}}", re.ASCII)
_NAMESPACE = re.compile(rf"[a-z0-9._-]{{1,{MAX_NAMESPACE_LENGTH}}}", re.ASCII)

Value: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class StoreStatistics:
    """What a store object has done since it was opened; other processes on the same store count for themselves."""

    hits: int = 0
    misses: int = 0  # absent, damaged, foreign and unreachable entries alike
    puts: int = 0  # entries of calls that kept all they were given
    bytes_read: int = 0  # of values returned
    bytes_written: int = 0  # of values taken
    evictions: int = 0  # entries removed to keep the byte budget
    errors: int = 0  # operations that the place of storage refused or did not answer
    damaged: int = 0  # entries found truncated, corrupted or swapped, and removed
    foreign: int = 0  # entries of a newer format, of another encryption key or longer than is read, left alone
    stored_entries: int | None = None  # what lies in the store now; None where counting it is not cheap
    stored_bytes: int | None = None  # of entries, frames included

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)


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
    """A mapping of keys to bytes. Keys: 1 to 200 of `a-z 0-9 / . _ -`. Values: any bytes, empty ones too.

    Every method raises `InvalidArgument` for a key that is none, and `StoreUnavailable` once the store is closed; `statistics` and
    `close` do not. A child of `os.fork` may use a store that its parent has used: it has locks, threads and connections of its own,
    or says at once that it cannot.
    """

    namespace: str | None = None
    is_of_process = False  # entries lie in this process, and are not to be had by opening such a store in another

    def __init__(self) -> None:
        self._counters = Counters()
        self._is_closed = False
        self._opened_by: tuple[Any, dict[str, Any]] | None = None  # `open_store`'s arguments, to do so again elsewhere

    def get(self, key: str) -> bytes | None:
        """The value, or None for a miss."""
        return self.get_many([key])[0]

    @abstractmethod
    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """One value or None for each key. Keys of a chain come first to last: its head is then evicted last."""

    def resident_many(self, keys: Sequence[str]) -> list[Any]:
        """As `get_many`, but values that lie on a device may be given as they lie there: uint8 tensors, read without a copy."""
        return self.get_many(keys)

    def put(self, key: str, value: Value) -> None:
        """Keep a value, in place of an older one; `StoreFull` where it has no room."""
        self.put_many([(key, value)])

    @abstractmethod
    def put_many(self, entries: Iterable[tuple[str, Value]]) -> None:
        """Keep values in this order; after an error, those before it are kept. Chains come first to last, as in `get_many`."""

    def contains(self, key: str) -> bool:
        """Whether there is an entry; only `get` reads it and can say whether it is sound."""
        return self.contains_prefix([key]) == 1

    @abstractmethod
    def contains_prefix(self, keys: Sequence[str]) -> int:
        """How many leading keys have entries: the question of a prefix lookup, in one round trip where possible."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Forget an entry; no error where there is none."""

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """Every key of this namespace, in no order. Walks the whole store: for maintenance, not for lookups."""

    def flush(self) -> None:
        """Wait until everything put so far lies where it belongs."""
        self._check_open()  # nothing is pending in most stores

    def statistics(self) -> StoreStatistics:
        return self._counters.snapshot()

    def close(self) -> None:
        """Flush and let go of files and connections. Closing twice is allowed."""
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, dict[str, Any]]]:
        """Pickled, a store is what it was opened with, and is opened again: URL and options, passwords in them too."""
        if self._opened_by is None or self.is_of_process:
            reason = "its entries lie in this process" if self.is_of_process else "it was not opened by a URL"
            raise InvalidArgument(f"{self!r} cannot be pickled: {reason}; open a store where it is used")
        return _open_again, self._opened_by

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable(f"{self!r} is closed")


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
    """What a store gives for a key, as bytes or None; is_resident: or a uint8 tensor [bytes], as it is.

    Raises `StoreError` for anything else.
    """
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if is_resident and str(getattr(value, "dtype", None)) == "torch.uint8" and value.ndim == 1:
        return value
    raise StoreError(f"a store gives {type(value).__name__} as a value; expected bytes")


def read_values(values: Iterable[Any], n_keys: int, *, is_resident: bool = False) -> list[Any]:
    """What a store gives for so many keys, each as `read_value` says. Raises `StoreError` for more or fewer."""
    found = [read_value(value, is_resident=is_resident) for value in values]
    if len(found) != n_keys:
        raise StoreError(f"a store gives {len(found)} values for {n_keys} keys")
    return found


def read_count(count: Any, n_keys: int) -> int:
    """How many leading ones of so many keys a store says that it has: 0 to all. Raises `StoreError` for what is no integer."""
    try:
        return min(max(operator.index(count), 0), n_keys)
    except TypeError:
        raise StoreError(f"a store gives {type(count).__name__} as a number of entries; expected int") from None


class Names:
    """Keys of one namespace as names of entries, and back.

    A name serves as a file name and as an object key alike: `/` becomes `!`, and the namespace stands before `=`.
    Neither sign occurs in keys, so that no two keys of any namespaces share a name.
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
