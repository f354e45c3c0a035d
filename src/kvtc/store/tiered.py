"""Stores over stores, the fastest first:
`tiered:memory:?bytes=1GB|file:///var/cache/kvtc|redis://host`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import compress
from typing import Any, TypeVar

from ..errors import PROGRAM_ENDS, InvalidArgument, KvtcError, StoreError, StoreFull, StoreUnavailable
from ..process.forks import in_child
from ..process.log_limits import log_once
from .base import Store, StoreStatistics, Value, check_key, check_value, read_count, read_flags, read_values
from .circuit import CircuitBreaker
from .framed import PROBE_NAME
from .write_back import WriteBack

T = TypeVar("T")
WRITE = ("through", "back")
DEFAULT_QUEUE_BYTES = 256 << 20
N_STRIPES = 1024
logger = logging.getLogger(__name__)


class Tier:
    """A store whose failures, of whatever kind, are counted and logged, and hinder no other tier.
    If it has made a caller wait in vain, it is asked again in the background, as `CircuitBreaker`
    says.

    Parameters:
        store: Anybody's.
        count_error: Called for each failure.
    """

    def __init__(self, store: Store, count_error: Callable[[], None]) -> None:
        self.store, self._count_error = store, count_error
        self._circuit = CircuitBreaker(lambda: store.contains(PROBE_NAME))

    def attempt(self, call: Callable[[Store], T], otherwise: T) -> T:
        if self._circuit.is_open():
            self._count_error()
            return otherwise
        begin = time.monotonic()
        result, error = self._tried(call, otherwise)
        if error is not None:
            self._count_error()
            if not isinstance(error, StoreFull):
                self._circuit.failed(time.monotonic() - begin)
        return result

    def _tried(self, call: Callable[[Store], T], otherwise: T) -> tuple[T, BaseException | None]:
        try:
            return call(self.store), None
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  a store of somebody else's may raise anything
            unexpected = None if isinstance(error, KvtcError) else error
            name, kind = type(self.store).__name__, type(error).__name__
            log_once(logger, f"{name} {kind}", "tier %s: %s: %s", name, kind, error, exc_info=unexpected)
            return otherwise, error

    def read(self, keys: Sequence[str], *, is_resident: bool = False) -> list[Any]:
        """One value or None for each key."""

        def read(store: Store) -> list[Any]:
            values = store.resident_many(keys) if is_resident else store.get_many(keys)
            return read_values(values, len(keys), is_resident=is_resident)

        return self.attempt(read, [None] * len(keys))

    def leading(self, keys: Sequence[str]) -> int:
        """How many leading keys have entries."""
        return self.attempt(lambda store: read_count(store.contains_prefix(keys), len(keys)), 0)

    def present(self, keys: Sequence[str]) -> list[bool]:
        """Which keys have entries."""
        return self.attempt(lambda store: read_flags(store.contains_many(keys), len(keys)), [False] * len(keys))

    def put(self, entries: Sequence[tuple[str, bytes]]) -> list[bool]:
        """Which of the entries it has kept. An entry for which it has no room does not hinder the
        others."""

        def put_all(store: Store) -> list[bool]:
            try:
                store.put_many(entries)
            except StoreFull:
                if len(entries) == 1:
                    store.delete(entries[0][0])  # an older value must not outlive one that has no room
                    raise
                return [self.put([entry])[0] for entry in entries]
            return [True] * len(entries)

        return self.attempt(put_all, [False] * len(entries))

    def statistics(self) -> StoreStatistics:
        return self._tried(lambda store: _checked(store.statistics()), StoreStatistics())[0]

    def close(self) -> None:
        if self._tried(lambda store: store.close(), None)[1] is not None:
            self._count_error()


def _checked(statistics: StoreStatistics) -> StoreStatistics:
    if not isinstance(statistics, StoreStatistics):
        raise StoreError(f"a store gives {type(statistics).__name__} as statistics; expected StoreStatistics")
    return statistics


class TieredStore(Store):
    """A store over several. Reads ask one tier after the other, and a hit is copied into the tiers
    above. A tier that fails is a counted miss.

    A key names its content: if another process gives a key another value, the tiers of this process
    may go on with the old one.

    Parameters:
        tiers: The stores, the fastest first; they are closed with this one.
        write: `through`: all tiers have the value before `put` returns. `back`: the first one has,
            and the others get it in the background.
        queue_bytes: Bytes that may wait in the background; with more, `put` waits.

    Raises:
        InvalidArgument: There are no tiers, or `write` is another word.
    """

    def __init__(self, tiers: Sequence[Store], write: str = "through", queue_bytes: int = DEFAULT_QUEUE_BYTES) -> None:
        super().__init__()
        if not tiers:
            raise InvalidArgument("a tiered store needs at least one tier")
        if write not in WRITE:
            raise InvalidArgument(f"write is {write!r}; expected one of {', '.join(WRITE)}")
        self._tiers = [Tier(store, lambda: self._counters.add(errors=1)) for store in tiers]
        self._versions = [0] * N_STRIPES  # how often a key of that stripe has been written
        self._write_back = WriteBack(self._put_below, queue_bytes) if write == "back" else None
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._stripes = [threading.Lock() for _ in range(N_STRIPES)]

    def __repr__(self) -> str:
        return f"TieredStore({', '.join(repr(tier.store) for tier in self._tiers)})"

    @property
    def tiers(self) -> tuple[Store, ...]:
        """The stores themselves, each with statistics of its own."""
        return tuple(tier.store for tier in self._tiers)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return self._get(keys)

    def resident_many(self, keys: Sequence[str]) -> list[Any]:
        """What the first tier holds on a device comes as it lies there; what lies below comes as
        bytes."""
        return self._get(keys, is_resident=True)

    def _get(self, keys: Sequence[str], *, is_resident: bool = False) -> list[Any]:
        self._check_open()
        keys = [check_key(key) for key in keys]
        versions = [self._versions[_stripe(key)] for key in keys]
        values: list[Any] = [None] * len(keys)
        absent = list(range(len(keys)))
        for depth, tier in enumerate(self._tiers):
            if not absent:
                break
            wanted = [keys[i] for i in absent]
            found = self._ask(depth, tier, wanted, is_resident=is_resident and depth == 0)
            hits = [i for i, value in zip(absent, found, strict=True) if value is not None]
            for i, value in zip(absent, found, strict=True):
                values[i] = value
            if depth:
                self._promote(depth, [(keys[i], values[i] or b"", versions[i]) for i in hits])
            absent = [i for i in absent if values[i] is None]
        return self._counted(values)

    def put_many(self, entries: Iterable[tuple[str, Value]]) -> None:
        self._check_open()
        checked = [(check_key(key), _own(check_value(value))) for key, value in entries]
        if not checked:
            return
        with self._writing([key for key, _ in checked]):
            taken = self._tiers[0].put(checked)
            if self._write_back is not None and len(self._tiers) > 1:
                for key, value in checked:
                    self._write_back.put(key, value)
                taken = [True] * len(checked)
            else:
                for tier in self._tiers[1:]:
                    taken = [was or now for was, now in zip(taken, tier.put(checked), strict=True)]
        if not all(taken):
            raise StoreUnavailable(f"no tier of {self!r} has taken {taken.count(False)} of {len(taken)} entries")
        self._counters.add(puts=len(checked), bytes_written=sum(len(value) for _, value in checked))

    def contains_prefix(self, keys: Sequence[str]) -> int:
        self._check_open()
        keys = [check_key(key) for key in keys]
        position = 0
        while position < len(keys):
            step = self._leading(keys[position:])
            if step == 0:
                break
            position += step
        return position

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        self._check_open()
        keys = [check_key(key) for key in keys]
        found = set(self._write_back.keys()) if self._write_back is not None else set()
        for tier in self._tiers:
            absent = [key for key in keys if key not in found]
            if not absent:
                break
            found.update(compress(absent, tier.present(absent)))
        return [key in found for key in keys]

    def delete(self, key: str) -> None:
        self._check_open()
        with self._writing([check_key(key)]):
            if self._write_back is not None:
                self._write_back.delete(key)
            self._tiers[0].attempt(lambda store: store.delete(key), None)
            self._delete_below(key)

    def keys(self) -> Iterator[str]:
        self._check_open()
        found: set[str] = set(self._write_back.keys()) if self._write_back is not None else set()
        nothing: set[str] = set()
        for tier in self._tiers:
            found |= tier.attempt(lambda store: set(map(check_key, store.keys())), nothing)
        return iter(found)

    def flush(self) -> None:
        self._check_open()
        if self._write_back is not None:
            self._write_back.flush()
        for tier in self._tiers:
            tier.attempt(lambda store: store.flush(), None)

    def statistics(self) -> StoreStatistics:
        """Of the tiers together: a hit in any is a hit, errors are theirs; what is stored, `tiers`
        say each for itself."""
        below = [tier.statistics() for tier in self._tiers]
        return replace(
            self._counters.snapshot(),
            evictions=sum(one.evictions for one in below),
            damaged=sum(one.damaged for one in below),
            foreign=sum(one.foreign for one in below),
        )

    def close(self) -> None:
        super().close()
        if self._write_back is not None:
            self._write_back.stop()
        for tier in self._tiers:
            tier.close()

    def _ask(self, depth: int, tier: Tier, keys: Sequence[str], *, is_resident: bool) -> list[Any]:
        found = tier.read(keys, is_resident=is_resident)
        if depth == 0 and self._write_back is not None:
            waiting = self._write_back
            return [waiting.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]
        return found

    def _leading(self, keys: Sequence[str]) -> int:
        """The longest run of leading keys that any one tier knows."""
        longest = 0
        if self._write_back is not None:
            waiting = set(self._write_back.keys())
            longest = next((i for i, key in enumerate(keys) if key not in waiting), len(keys))
        for tier in self._tiers:
            if longest == len(keys):
                break
            longest = max(longest, tier.leading(keys))
        return longest

    def _promote(self, depth: int, entries: Sequence[tuple[str, bytes, int]]) -> None:
        """Copy hits into the tiers above, unless their keys have been written since they were
        read."""
        with ExitStack() as stack:
            held: dict[int, bool] = {}
            fresh = []
            for key, value, version in entries:
                stripe = _stripe(key)
                if stripe not in held:
                    held[stripe] = self._stripes[stripe].acquire(blocking=False)  # being written: not worth a wait
                    if held[stripe]:
                        stack.callback(self._stripes[stripe].release)
                if held[stripe] and version == self._versions[stripe]:
                    fresh.append((key, value))
            if fresh:
                for tier in self._tiers[:depth]:
                    tier.put(fresh)

    def _put_below(self, key: str, value: bytes) -> None:
        for tier in self._tiers[1:]:
            tier.put([(key, value)])

    def _delete_below(self, key: str) -> None:
        for tier in self._tiers[1:]:
            tier.attempt(lambda store: store.delete(key), None)

    @contextmanager
    def _writing(self, keys: Sequence[str]) -> Iterator[None]:
        """Writers of one key take turns, so that all tiers end with the same value."""
        stripes = sorted({_stripe(key) for key in keys})
        with ExitStack() as stack:
            for stripe in stripes:
                stack.enter_context(self._stripes[stripe])
            try:
                yield
            finally:
                for stripe in stripes:
                    self._versions[stripe] += 1


def _stripe(key: str) -> int:
    return hash(key) % N_STRIPES


def _own(value: Value) -> bytes:
    """Bytes that the caller cannot change while they wait."""
    return value if isinstance(value, bytes) else bytes(memoryview(value).cast("B"))
