"""Reading every entry of a store, to find those that are damaged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..errors import CorruptStream, TruncatedStream, UnsupportedVersion
from ..process.progress import track
from ..store.place import DAMAGED, FOREIGN, GONE, SOUND, Place, PlacedEntry, Reading
from .contents import check


@dataclass(frozen=True)
class Fault:
    """An entry that cannot be read.

    Parameters:
        entry: The entry.
        state: `DAMAGED`, or `FOREIGN` where others can perhaps read it.
        cause: What is wrong with it.
        is_removed: Whether it was removed.
    """

    entry: PlacedEntry
    state: str
    cause: str
    is_removed: bool


@dataclass
class Verification:
    """What was found.

    Parameters:
        n_entries: Entries that were read.
        n_bytes: That they take.
        forms: How many sound entries are of each form, as of `Contents`. Of an encrypted one without its key only the frame was
            checked.
        faults: The others.
    """

    n_entries: int = 0
    n_bytes: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def count(self, state: str) -> int:
        """How many entries are `DAMAGED` or `FOREIGN`."""
        return sum(fault.state == state for fault in self.faults)


def verify(place: Place, *, removes: bool = False) -> Verification:
    """Read every entry, and check all of its checksums and its structure; no calibration is needed.

    Parameters:
        place: The store.
        removes: Whether damaged entries are removed. Foreign ones always stay.

    Returns:
        What was found.

    Raises:
        StoreUnavailable: The storage cannot be read.
    """
    found = Verification()
    for entry in track(place.entries(), "verifying", "entries"):
        reading = place.read(entry)
        if reading.state == GONE:
            continue
        found.n_entries += 1
        found.n_bytes += entry.n_bytes
        state, told = _checked(entry.key, reading)
        if state == SOUND:
            found.forms[told] += 1
            continue
        is_removed = removes and state == DAMAGED
        if is_removed:
            place.discard(entry, reading)
        found.faults.append(Fault(entry, state, told, is_removed))
    return found


def _checked(key: str, reading: Reading) -> tuple[str, str]:
    """The state of an entry that was read; and the form of a sound one, or what is wrong."""
    if reading.state != SOUND:
        return reading.state, reading.cause
    try:
        return SOUND, check(key, reading.value)
    except (CorruptStream, TruncatedStream) as error:
        return DAMAGED, str(error)
    except UnsupportedVersion as error:
        return FOREIGN, str(error)
