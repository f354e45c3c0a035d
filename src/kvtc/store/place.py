"""A store as those see it who look after it: the entries of all its users, which are told apart, read without being used, and
left alone unless somebody asks for their removal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import StoreUnavailable
from .base import Store, Value, split_name
from .frame import ENCRYPTED_MAGIC, FRAME_BYTES, DamagedEntry, ForeignEntry, Frame, check_head, unseal
from .framed import FramedStore

SOUND, DAMAGED, FOREIGN, GONE = "sound", "damaged", "foreign", "gone"
"""What reading an entry may find: its value; that it is truncated, corrupted or swapped; that it is of a newer format, another
encryption key, or too long; and that it was there when the place was listed."""


class PlacedEntry(NamedTuple):
    """An entry of a place.

    Parameters:
        name: Under which it lies there.
        namespace: Of its key; None: none.
        key: As its users know it.
        n_bytes: That it takes, its frame included.
        used_at: As of `Listed`.
    """

    name: str
    namespace: str | None
    key: str
    n_bytes: int
    used_at: float | None


class Reading(NamedTuple):
    """What reading an entry found.

    Parameters:
        state: `SOUND`, `DAMAGED`, `FOREIGN` or `GONE`.
        cause: Why it is not sound.
        value: Of a sound entry, decrypted if there is a key.
        frame: As it lies there.
    """

    state: str
    cause: str = ""
    value: bytes = b""
    frame: Frame | None = None


class Place:
    """The place of one store. Nothing that is read counts as used where the place allows that (Redis does not), is counted, or is
    removed.

    Parameters:
        store: As it was left, not recovered; closed with the place.
        keys: Of encrypted values; none: values are taken as they are.
    """

    def __init__(self, store: FramedStore, keys: Sequence[bytes] = ()) -> None:
        self.store = store
        self._encrypted = None
        if keys:
            from .encryption import EncryptedStore

            self._encrypted = EncryptedStore(store, keys)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    @property
    def users(self) -> Store:
        """The store as its users have it: what is read there counts as used."""
        return self.store if self._encrypted is None else self._encrypted

    def own_entries(self, prefix: str = "") -> list[PlacedEntry]:
        """Those `entries` that have the namespace of the URL, or none as the URL."""
        return [entry for entry in self.entries(prefix) if entry.namespace == self.store.namespace]

    def entry(self, key: str) -> PlacedEntry:
        """What is under a key, of unknown size and age; perhaps nothing."""
        return PlacedEntry(self.store._names.name(key), self.store.namespace, key, 0, None)

    def entries(self, prefix: str = "") -> list[PlacedEntry]:
        """Entries by name, those of all namespaces unless the URL names one. Files and objects whose names kvtc does not give are
        left out.

        Parameters:
            prefix: What their keys begin with.
        """
        namespace = self.store.namespace
        listed = self.store._attempt(lambda: {one.name: one for one in self.store._list()})
        found = []
        for name in sorted(listed):
            known = split_name(name)
            if known is not None and namespace in (None, known[0]) and known[1].startswith(prefix):
                found.append(PlacedEntry(name, *known, listed[name].n_bytes, listed[name].used_at))
        return found

    def heads(self, entries: Sequence[PlacedEntry], n_bytes: int) -> list[tuple[str, bytes]]:
        """The first n_bytes bytes of values, as they lie there, each behind the state of its entry, as far as these bytes tell."""
        names = [entry.name for entry in entries]
        heads = self.store._attempt(lambda: self.store._heads(names, FRAME_BYTES + n_bytes))
        return [_value_head(entry, head) for entry, head in zip(entries, heads, strict=True)]

    def read(self, entry: PlacedEntry) -> Reading:
        """Read an entry. Raises `StoreUnavailable`."""
        frame = self.store._attempt(lambda: self.store._look(entry.name))
        if frame is None:
            return Reading(GONE)
        try:
            value = unseal(entry.name, frame, self.store.entry_bytes)
            if self._encrypted is not None:
                value = self._encrypted.decrypted(entry.name, value)
        except DamagedEntry as error:
            return Reading(DAMAGED, str(error), frame=frame)
        except ForeignEntry as error:
            return Reading(FOREIGN, str(error), frame=frame)
        return Reading(SOUND, value=value, frame=frame)

    def discard(self, entry: PlacedEntry, reading: Reading) -> None:
        """Remove an entry if it is still what was read. Raises `StoreUnavailable`."""
        frame = reading.frame
        if frame is not None:
            self.store._attempt(lambda: self.store._discard(entry.name, frame))

    def remove(self, entry: PlacedEntry) -> None:
        """Remove an entry. Raises `StoreUnavailable`."""
        self.store._attempt(lambda: self.store._remove(entry.name))


class PlaceView(Store):
    """A place as a store that its users can only read: nothing counts as used, and nothing is removed or written.

    Parameters:
        place: The place; it is not closed.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place
        self.namespace = place.store.namespace

    def __repr__(self) -> str:
        return f"PlaceView({self._place.store!r})"

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Sound values; None for what is encrypted and has no key here, too."""
        readings = [self._place.read(self._place.entry(key)) for key in keys]
        is_had = [one.state == SOUND and not one.value.startswith(ENCRYPTED_MAGIC) for one in readings]
        return self._counted([one.value if had else None for one, had in zip(readings, is_had, strict=True)])

    def contains_prefix(self, keys: Sequence[str]) -> int:
        store, names = self._place.store, [self._place.entry(key).name for key in keys]
        return store._attempt(lambda: store._leading(names)) if names else 0

    def keys(self) -> Iterator[str]:
        return (entry.key for entry in self._place.own_entries())

    def put_many(self, entries: Iterable[tuple[str, Value]]) -> None:  # noqa: ARG002
        raise StoreUnavailable(f"{self!r} is only looked at")

    def delete(self, key: str) -> None:  # noqa: ARG002
        raise StoreUnavailable(f"{self!r} is only looked at")


def _value_head(entry: PlacedEntry, head: bytes) -> tuple[str, bytes]:
    try:
        check_head(entry.name, head[:FRAME_BYTES], entry.n_bytes)
    except (DamagedEntry, ForeignEntry) as error:
        return (FOREIGN if isinstance(error, ForeignEntry) else DAMAGED), b""
    return SOUND, head[FRAME_BYTES:]
