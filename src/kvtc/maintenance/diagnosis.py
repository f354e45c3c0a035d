"""What is right and wrong with a store, and with what is in it."""

from __future__ import annotations

import time
from collections import Counter

from ..store.framed import MAX_SKEW_SECONDS, Finding
from ..store.place import DAMAGED, FOREIGN, Place
from .contents import ENCRYPTED
from .survey import describe_entries


def diagnose(place: Place) -> list[Finding]:
    """Examine the place and the first bytes of every entry; nothing is changed.

    Returns:
        What was found, right and wrong.

    Raises:
        StoreUnavailable: The storage does not answer.
    """
    found = place.store.diagnose()
    forms: Counter[str] = Counter()
    latest, now = 0.0, time.time()
    for described in describe_entries(place):
        forms[described.contents.form] += 1
        latest = max(latest, described.entry.used_at or 0.0)
    ahead = latest - now
    if ahead > MAX_SKEW_SECONDS:
        told = f"the latest entry was used {ahead:,.0f} seconds from now, by this machine's clock"
        found.append(Finding("times of entries", False, told))
    n_encrypted = f", {forms[ENCRYPTED]:,} of them encrypted" if forms[ENCRYPTED] else ""
    return [
        *found,
        Finding("entries", True, f"{forms.total():,}{n_encrypted}"),
        Finding(
            "entries that begin damaged",
            not forms[DAMAGED],
            f"{forms[DAMAGED]:,}; `kvtc store verify` reads all of them",
        ),
        Finding("entries of unknown versions", not forms[FOREIGN], f"{forms[FOREIGN]:,}; upgrade kvtc to read them"),
    ]
