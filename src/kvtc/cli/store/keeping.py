"""The subcommands `verify` and `evict` of `store`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from ..arguments import Outcome, Subcommands
from .common import FAULT_FOUND, add, add_prefix, key_facts, opened, shown_key

if TYPE_CHECKING:
    from ...maintenance.verification import Fault

_AGE = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)", re.ASCII)
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def add_subcommands(subcommands: Subcommands) -> None:
    """Add them."""
    parser = add(subcommands, verify)
    parser.add_argument("--remove", action="store_true", help="remove damaged entries; others always stay")
    parser = add(subcommands, evict)
    parser.add_argument("--bytes", type=_size, metavar="SIZE", help="until the entries take so much, such as 50GB")
    parser.add_argument(
        "--older-than", type=_age, metavar="AGE", help="what was not used for so long: 90s, 30min, 12h or 7d"
    )
    add_prefix(parser)
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, and say what would be removed")


def verify(options: argparse.Namespace) -> Outcome:
    """Read every entry of a store, and check all checksums and the structure of streams.

    No calibration is needed. The exit status is 1 if an entry is damaged, also if it was removed.
    Entries of a newer format, of another encryption key or longer than is read are reported and
    stay; without the key, of an encrypted entry only the frame is checked.
    """
    from ...maintenance.verification import verify as verify_place
    from ...report.table import format_bytes, format_fields, format_table
    from ...store.place import DAMAGED, FOREIGN

    with opened(options) as place:
        found = verify_place(place, removes=options.remove)
    n_damaged, n_foreign = found.count(DAMAGED), found.count(FOREIGN)
    n_removed = sum(fault.is_removed for fault in found.faults)
    if n_damaged:
        options.exit_code = FAULT_FOUND
    result = {
        "n_entries": found.n_entries,
        "n_bytes": found.n_bytes,
        "sound": dict(found.forms),
        "n_damaged": n_damaged,
        "n_foreign": n_foreign,
        "n_removed": n_removed,
        "faults": [_fault_facts(fault) for fault in found.faults],
    }
    forms = ", ".join(f"{n:,} {form}" for form, n in sorted(found.forms.items()))
    fields = [
        ("read", f"{found.n_entries:,} entries, {format_bytes(found.n_bytes)}"),
        ("sound", f"{found.forms.total():,}{f': {forms}' if forms else ''}"),
        ("damaged", f"{n_damaged:,}, {n_removed:,} of them removed"),
        ("left alone", f"{n_foreign:,} that cannot be read here"),
    ]
    rows = [[shown_key(fault.entry), f"{fault.entry.n_bytes:,}", _state(fault), fault.cause] for fault in found.faults]
    table = [format_table(["key", "bytes", "state", "cause"], rows)] if rows else []
    return result, "\n\n".join([*table, format_fields(fields)])


def evict(options: argparse.Namespace) -> Outcome:
    """Remove the entries of a store that were used longest ago; of equals the largest goes first.

    Entries whose frames are damaged or of a newer format are left alone, and so are files and
    objects that are not kvtc's.
    """
    if options.bytes is None and options.older_than is None:
        options.usage_error("nothing to do: give --bytes SIZE or --older-than AGE, or both")
    from ...maintenance.eviction import evict as evict_from
    from ...report.table import format_fields

    with opened(options) as place:
        found = evict_from(place, options.bytes, options.older_than, options.prefix, is_rehearsal=options.dry_run)
        budget = place.store.budget_bytes
    n_bytes = sum(entry.n_bytes for entry in found.removed)
    result = {
        "n_removed": len(found.removed),
        "removed_bytes": n_bytes,
        "n_left_alone": len(found.left_alone),
        "n_entries": found.n_entries,
        "n_charged": found.n_bytes,
        "budget_bytes": budget,
        "is_dry_run": options.dry_run,
        "removed": [key_facts(entry) for entry in found.removed],
    }
    fields = [
        ("would be removed" if options.dry_run else "removed", f"{len(found.removed):,} entries of {n_bytes:,} bytes"),
        ("left alone", f"{len(found.left_alone):,} damaged or of a newer format"),
        ("stay", f"{found.n_entries:,} entries, which take {found.n_bytes:,} bytes of a budget"),
    ]
    return result, format_fields(fields)


def _size(text: str) -> int:
    """Option type: 500MB or 2GiB in bytes."""
    from ...store.urls import parse_bytes

    try:
        return 0 if text == "0" else parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _age(text: str) -> float:
    """Option type: 90s, 30min, 12h or 7d in seconds."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age such as 90s, 30min, 12h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def _fault_facts(fault: Fault) -> dict[str, Any]:
    return key_facts(fault.entry) | {"state": fault.state, "cause": fault.cause, "removed": fault.is_removed}


def _state(fault: Fault) -> str:
    return f"{fault.state}, removed" if fault.is_removed else fault.state
