"""What stores that keep bytes in one place have in common: names, frames, counting, and what an
error means."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from ..errors import PROGRAM_ENDS, KvtcError, StoreError, StoreFull, StoreUnavailable
from .base import Names, Store, Value, check_value
from .frame import DamagedEntry, ForeignEntry, Frame, Head, seal, unseal
from .urls import StoreUrl

T = TypeVar("T")
MAX_SKEW_SECONDS = 60.0  # between clocks, from which on it is told as wrong
PROBE_NAME = "kvtc-probe"  # of no entry; to ask whether a place answers


class Listed(NamedTuple):
    """An entry as its place lists it.

    Parameters:
        name: As of `Names`, of any namespace, or of no entry.
        n_bytes: Of the frame.
        used_at: When it was used last, or where the place does not know that, written: seconds since
            the epoch. None: not known, and the first to be evicted.
    """

    name: str
    n_bytes: int
    used_at: float | None


class Finding(NamedTuple):
    """What an examination of a place found.

    Parameters:
        what: Was examined.
        is_right: Whether nothing need be done about it.
        told: The facts, in words.
    """

    what: str
    is_right: bool
    told: str


class FramedStore(Store):
    """A store whose subclass keeps frames under names.

    Parameters:
        url: Names the place of storage and its options, of which a subclass takes its own before
            it calls this: here are `namespace`, for entries of different namespaces in one place
            never meet, and `entry_bytes`, the longest value that is put or read. A longer entry is
            foreign and is not read.

    Raises:
        InvalidArgument: An option is unknown or not allowed.
    """

    def __init__(self, url: StoreUrl) -> None:
        super().__init__()
        self.namespace, self.entry_bytes = url.take_common()
        self._names = Names(self.namespace)

    # What a subclass provides. Each may raise whatever its place of storage does: `_attempt` makes
    # StoreError of it.

    @abstractmethod
    def _read(self, names: Sequence[str]) -> Sequence[Frame | None]:
        """Frames as they lie there, None where there is none; marks them as used. `Head` for what
        need not be read whole."""

    @abstractmethod
    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        """Keep one frame for each name, in this order, each there whole or not at all."""

    @abstractmethod
    def _leading(self, names: Sequence[str]) -> int:
        """How many leading names have entries."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Forget one entry, if it is there."""

    @abstractmethod
    def _discard(self, name: str, frame: Frame) -> None:
        """Forget an entry if it still is this damaged frame, and not a sound one written since."""

    @abstractmethod
    def _list(self) -> Iterator[Listed]:
        """All entries, those of other namespaces too."""

    budget_bytes: int | None = None
    """The byte budget that the store keeps itself; None: it has none."""

    @property
    def filled_bytes(self) -> int | None:
        """How much of the byte budget is in use right after an eviction; None: there is no budget."""
        return self.budget_bytes

    def cost(self, n_bytes: int) -> int:
        """What a frame of so many bytes takes of a byte budget."""
        return n_bytes

    def _present(self, names: Sequence[str]) -> list[bool]:
        """Which names have entries."""
        return [self._leading([name]) == 1 for name in names]

    def recover(self) -> None:
        """Make the place ready for use, and clean up after those that died there: when it is opened."""

    def check_place(self) -> None:
        """Raise `StoreUnavailable` where there is no such place; nothing is made."""

    def diagnose(self) -> list[Finding]:
        """What is right and wrong with the place, its entries apart; nothing is changed. Raises `StoreUnavailable`."""
        began = time.monotonic()
        self.contains(PROBE_NAME)
        return [Finding("answers", True, f"within {time.monotonic() - began:.3f} seconds")]

    def _look(self, name: str) -> Frame | None:
        """As `_read` of one name, which does not count as a use where the place allows that."""
        return self._read([name])[0]

    def _heads(self, names: Sequence[str], n_bytes: int) -> list[bytes]:
        """The first bytes of frames, as many as there are and n_bytes at most; b"" for a name without
        an entry. Does not count as a use, as in `_look`."""
        frames = (self._look(name) for name in names)
        heads = (frame.head if isinstance(frame, Head) else frame or b"" for frame in frames)
        return [head[:n_bytes] for head in heads]

    # The contract in terms of these.

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self._check_open()
        names = [self._names.name(key) for key in keys]
        if not names:
            return []
        return self._counted(self._attempt(lambda: self._open_all(names)))

    def put_many(self, entries: Iterable[tuple[str, Value]]) -> None:
        self._check_open()
        checked = [(self._names.name(key), check_value(value)) for key, value in entries]
        names = [name for name, _ in checked]
        frames = (self._seal(name, value) for name, value in checked)  # one by one: a batch is not in memory twice
        self._attempt(lambda: self._write(names, frames))
        written = sum(memoryview(value).nbytes for _, value in checked)
        self._counters.add(puts=len(checked), bytes_written=written)

    def contains_prefix(self, keys: Sequence[str]) -> int:
        self._check_open()
        names = [self._names.name(key) for key in keys]
        return self._attempt(lambda: self._leading(names)) if names else 0

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        self._check_open()
        names = [self._names.name(key) for key in keys]
        return self._attempt(lambda: self._present(names)) if names else []

    def delete(self, key: str) -> None:
        self._check_open()
        name = self._names.name(key)
        self._attempt(lambda: self._remove(name))

    def keys(self) -> Iterator[str]:
        self._check_open()
        found = self._attempt(lambda: list(self._list()))
        return (key for one in found if (key := self._names.key(one.name)) is not None)

    def _seal(self, name: str, value: Value) -> bytes:
        n_bytes = memoryview(value).nbytes
        if n_bytes > self.entry_bytes:
            raise StoreFull(f"a value of {n_bytes} bytes; {self!r} takes up to {self.entry_bytes} (entry_bytes)")
        return seal(name, value)

    def _open_all(self, names: Sequence[str]) -> list[bytes | None]:
        return [self._open(name, frame) for name, frame in zip(names, self._read(names), strict=True)]

    def _open(self, name: str, frame: Frame | None) -> bytes | None:
        """The value of a frame, or None for a miss; a damaged entry is removed, one of others is
        left alone."""
        if frame is None:
            return None
        try:
            return unseal(name, frame, self.entry_bytes)
        except ForeignEntry as error:
            self._found_foreign(name, error)
        except DamagedEntry as error:
            self._found_damaged(name, error, lambda: self._discard(name, frame))
        return None

    def _attempt(self, call: Callable[[], T]) -> T:
        """What the call returns; whatever it raises is counted."""
        try:
            return self._translated(call)
        except StoreError:
            self._counters.add(errors=1)
            raise

    def _translated(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except KvtcError as error:
            if not self._is_closed or not isinstance(error, StoreError):
                raise
            raise StoreUnavailable(f"{self!r} is closed") from error  # meanwhile
        except MemoryError as error:
            raise StoreUnavailable(f"{self!r}: no memory to do this") from error
        except PROGRAM_ENDS:
            raise
        except BaseException as error:
            raise StoreUnavailable(f"{self!r}: {type(error).__name__}: {error}") from error
