"""What is in a store: every entry, and how many bytes are whose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..process.progress import task
from ..store.frame import FRAME_BYTES
from ..store.place import Place, PlacedEntry
from .contents import HEAD_BYTES, Contents, describe, kind_of

_READ_AT_ONCE = 64


class Description(NamedTuple):
    """An entry, the kind that its key names, and what it holds."""

    entry: PlacedEntry
    kind: str
    contents: Contents


class Owner(NamedTuple):
    """Whose entries are counted together: of one namespace, kind of key and form, and where streams tell, profile, calibration and
    layout."""

    namespace: str | None
    kind: str
    form: str
    profile: str | None
    calibration: str | None
    layout: str | None


@dataclass
class Share:
    """What the entries of one owner take.

    Parameters:
        n_entries, n_bytes: How many there are, and their bytes.
        n_charged: What they take of a byte budget.
        n_tokens: In those that say how many they hold.
        used_first, used_last: When the ones used longest ago and last were used, in seconds since the epoch; None: not known.
    """

    n_entries: int = 0
    n_bytes: int = 0
    n_charged: int = 0
    n_tokens: int = 0
    used_first: float | None = None
    used_last: float | None = None

    def add(self, described: Description, charged: int) -> None:
        """Count an entry. charged: what it takes of a byte budget."""
        used_at = described.entry.used_at
        self.n_entries += 1
        self.n_bytes += described.entry.n_bytes
        self.n_charged += charged
        self.n_tokens += described.contents.n_tokens or 0
        if used_at is not None:
            self.used_first = min(used_at, self.used_first or used_at)
            self.used_last = max(used_at, self.used_last or used_at)


def describe_entries(place: Place, prefix: str = "") -> Iterator[Description]:
    """Every entry whose key begins with a prefix, by name, described by its first bytes. Raises `StoreUnavailable`."""
    entries = place.entries(prefix)
    with task("reading the first bytes", len(entries), "entries") as advance:
        for start in range(0, len(entries), _READ_AT_ONCE):
            batch = entries[start : start + _READ_AT_ONCE]
            for entry, found in zip(batch, place.heads(batch, HEAD_BYTES), strict=True):
                yield Description(entry, kind_of(entry.key), describe(*found, entry.n_bytes - FRAME_BYTES))
            advance(len(batch))


def shares(place: Place) -> dict[Owner, Share]:
    """What the entries of each owner take, most bytes first. Raises `StoreUnavailable`."""
    found: dict[Owner, Share] = {}
    for described in describe_entries(place):
        contents = described.contents
        owner = Owner(
            described.entry.namespace,
            described.kind,
            contents.form,
            contents.profile,
            contents.calibration,
            contents.layout,
        )
        found.setdefault(owner, Share()).add(described, place.store.cost(described.entry.n_bytes))
    return dict(sorted(found.items(), key=lambda item: -item[1].n_bytes))
