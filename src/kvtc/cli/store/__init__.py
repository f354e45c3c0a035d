"""The subcommand `store`: what operators of a store need."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..arguments import Outcome, Subcommands

if TYPE_CHECKING:
    import argparse

    from ...maintenance.contents import Contents
    from ...maintenance.survey import Description
    from ...maintenance.verification import Fault
    from ...store.place import Place, PlacedEntry

FAULT_FOUND = 1


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `store` and its subcommands."""
    of_stores = subcommands.group("store", "Look at a store, verify it, and carry its entries elsewhere.")
    parser = _add(of_stores, list_)
    parser.add_argument("--prefix", default="", metavar="TEXT", help="only entries whose keys begin so")
    parser.add_argument("--sort", choices=("key", "age", "bytes"), default="key", help="oldest or largest first")
    parser = _add(of_stores, verify)
    parser.add_argument("--remove", action="store_true", help="remove damaged entries; others always stay")


def _add(subcommands: Subcommands, run: Any) -> Any:
    parser = subcommands.add(run)
    parser.add_argument(
        "url", metavar="URL", help="file:///absolute/path, redis://host or s3://bucket/prefix, with options; not tiers"
    )
    return parser


def list_(options: argparse.Namespace) -> Outcome:
    """List the entries of a store, with what each says of itself.

    The age is the time since an entry was used, in S3 since it was written. Only the first bytes of
    entries are read; of encrypted entries these tell nothing.
    """
    from ...maintenance.survey import describe_entries
    from ...report.table import format_bytes, format_table

    with _opened(options) as place:
        found = list(describe_entries(place, options.prefix))
    orders = {"key": lambda one: one.entry.name, "age": _age_order, "bytes": lambda one: -one.entry.n_bytes}
    found.sort(key=orders[options.sort])
    now, n_bytes = time.time(), sum(one.entry.n_bytes for one in found)
    rows = [
        [_shown_key(one.entry), f"{one.entry.n_bytes:,}", format_age(one.entry.used_at, now), _holds(one.contents)]
        for one in found
    ]
    result = {"entries": [_entry_facts(one, now) for one in found], "n_entries": len(found), "n_bytes": n_bytes}
    total = f"{len(found):,} entries, {format_bytes(n_bytes)}"
    return result, "\n\n".join([*([format_table(["key", "bytes", "age", "holds"], rows)] if rows else []), total])


def verify(options: argparse.Namespace) -> Outcome:
    """Read every entry of a store, and check all checksums and the structure of streams.

    No calibration is needed. The exit status is 1 if an entry is damaged, also if it was removed.
    Entries of a newer format, of another encryption key or longer than is read are reported and
    stay; without the key, of an encrypted entry only the frame is checked.
    """
    from ...maintenance.verification import verify as verify_place
    from ...report.table import format_bytes, format_fields, format_table
    from ...store.place import DAMAGED, FOREIGN

    with _opened(options) as place:
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
        ("sound", f"{sum(found.forms.values()):,}{f': {forms}' if forms else ''}"),
        ("damaged", f"{n_damaged:,}, {n_removed:,} of them removed"),
        ("left alone", f"{n_foreign:,} that cannot be read here"),
    ]
    rows = [[_shown_key(fault.entry), f"{fault.entry.n_bytes:,}", _state(fault), fault.cause] for fault in found.faults]
    table = [format_table(["key", "bytes", "state", "cause"], rows)] if rows else []
    return result, "\n\n".join([*table, format_fields(fields)])


def format_age(used_at: float | None, now: float) -> str:
    """Time since then in its largest unit; "-" where it is not known."""
    if used_at is None:
        return "-"
    seconds = max(0.0, now - used_at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _opened(options: argparse.Namespace) -> Place:
    from ...store import open_place

    return open_place(options.url)


def _age_order(one: Description) -> float:
    return one.entry.used_at or 0.0


def _shown_key(entry: PlacedEntry) -> str:
    return entry.key if entry.namespace is None else f"{entry.namespace}={entry.key}"


def _entry_facts(one: Description, now: float) -> dict[str, Any]:
    from dataclasses import asdict

    entry = one.entry
    age = None if entry.used_at is None else max(0.0, now - entry.used_at)
    known = {"namespace": entry.namespace, "key": entry.key, "n_bytes": entry.n_bytes, "age_seconds": age}
    return known | {"kind": one.kind} | asdict(one.contents)


def _holds(contents: Contents) -> str:
    if contents.n_tokens is None:
        return contents.form
    return f"{contents.profile}, {contents.n_tokens:,} tokens from {contents.first_position:,}"


def _fault_facts(fault: Fault) -> dict[str, Any]:
    entry = fault.entry
    known = {"namespace": entry.namespace, "key": entry.key, "n_bytes": entry.n_bytes}
    return known | {"state": fault.state, "cause": fault.cause, "removed": fault.is_removed}


def _state(fault: Fault) -> str:
    return f"{fault.state}, removed" if fault.is_removed else fault.state
