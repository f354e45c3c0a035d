"""Removing the entries of a store that were used longest ago."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..store.place import SOUND, Place, PlacedEntry

_LOOKED_AT_ONCE = 64


@dataclass
class Eviction:
    """What was removed.

    Parameters:
        n_bytes: That the entries which stay take of a byte budget.
        n_entries: How many stay, those that were left alone among them.
        removed: The entries that were removed.
        left_alone: Entries that would have been removed, but whose frames are damaged, or of a newer format.
    """

    n_bytes: int
    n_entries: int
    removed: list[PlacedEntry] = field(default_factory=list)
    left_alone: list[PlacedEntry] = field(default_factory=list)


def evict(
    place: Place,
    max_bytes: int | None = None,
    older_than: float | None = None,
    prefix: str = "",
    *,
    is_rehearsal: bool = False,
) -> Eviction:
    """Remove entries in the order in which a store itself does: those used longest ago, of equals the largest.

    Parameters:
        place: The store; of a URL with a namespace, its entries alone are counted and removed.
        max_bytes: What the entries may take afterwards, as the byte budget counts it; None: any number.
        older_than: Entries that were not used for so many seconds are removed; None: none for that. Those whose age is not known
            stay.
        prefix: What the keys of the entries begin with that are counted and removed.
        is_rehearsal: Whether nothing is removed, and only told what would be.

    Returns:
        What was removed.

    Raises:
        StoreUnavailable: The storage cannot be read or changed.
    """
    store, before = place.store, time.time() - (older_than or 0.0)
    entries = sorted(place.entries(prefix), key=lambda entry: (entry.used_at or 0.0, -entry.n_bytes))
    found = Eviction(sum(store.cost(entry.n_bytes) for entry in entries), len(entries))

    def is_due(entry: PlacedEntry) -> bool:
        is_old = older_than is not None and entry.used_at is not None and entry.used_at < before
        return is_old or (max_bytes is not None and found.n_bytes > max_bytes)

    for start in range(0, len(entries), _LOOKED_AT_ONCE):
        batch = entries[start : start + _LOOKED_AT_ONCE]
        if not any(map(is_due, batch)):
            continue
        for entry, (state, _) in zip(batch, place.heads(batch, 0), strict=True):
            if not is_due(entry):
                continue
            if state != SOUND:
                found.left_alone.append(entry)
                continue
            if not is_rehearsal:
                place.remove(entry)
            found.removed.append(entry)
            found.n_bytes -= store.cost(entry.n_bytes)
            found.n_entries -= 1
    return found
