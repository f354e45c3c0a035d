"""The subcommands `list`, `size` and `doctor` of `store`, which change nothing."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..arguments import Outcome, Subcommands
from .common import FAULT_FOUND, add, add_prefix, format_age, key_facts, opened, shown_key

if TYPE_CHECKING:
    from ...maintenance.contents import Contents
    from ...maintenance.survey import Description


def add_subcommands(subcommands: Subcommands) -> None:
    """Add them."""
    parser = add(subcommands, list_)
    add_prefix(parser)
    parser.add_argument("--sort", choices=("key", "age", "bytes"), default="key", help="oldest or largest first")
    add(subcommands, size)
    add(subcommands, doctor)


def list_(options: argparse.Namespace) -> Outcome:
    """List the entries of a store, with what each says of itself.

    The age is the time since an entry was used, in S3 since it was written. Only the first bytes of
    entries are read; of encrypted entries these tell nothing.
    """
    from ...maintenance.survey import describe_entries
    from ...report.table import format_bytes, format_table

    with opened(options) as place:
        found = list(describe_entries(place, options.prefix))
    orders = {"key": lambda one: one.entry.name, "age": _age_order, "bytes": lambda one: -one.entry.n_bytes}
    found.sort(key=orders[options.sort])
    now, n_bytes = time.time(), sum(one.entry.n_bytes for one in found)
    rows = [
        [shown_key(one.entry), f"{one.entry.n_bytes:,}", format_age(one.entry.used_at, now), _holds(one.contents)]
        for one in found
    ]
    result = {"entries": [_facts(one, now) for one in found], "n_entries": len(found), "n_bytes": n_bytes}
    total = f"{len(found):,} entries, {format_bytes(n_bytes)}"
    return result, "\n\n".join([*([format_table(["key", "bytes", "age", "holds"], rows)] if rows else []), total])


def size(options: argparse.Namespace) -> Outcome:
    """Say how many bytes of a store are whose.

    Entries are counted together that have one namespace, kind of key, profile, calibration and
    layout, as far as their first bytes say.
    """
    from ...maintenance.survey import shares
    from ...report.table import format_bytes, format_fields, format_table

    with opened(options) as place:
        found, budget = shares(place), place.store.budget_bytes
    n_entries, n_bytes = (sum(getattr(share, name) for share in found.values()) for name in ("n_entries", "n_bytes"))
    n_charged = sum(share.n_charged for share in found.values())
    facts = [owner._asdict() | asdict(share) for owner, share in found.items()]
    result = {
        "n_entries": n_entries,
        "n_bytes": n_bytes,
        "n_charged": n_charged,
        "budget_bytes": budget,
        "owners": facts,
    }
    now = time.time()
    rows = [
        [
            owner.namespace or "-",
            owner.kind,
            owner.profile or owner.form,
            (owner.calibration or "-")[:8],
            f"{share.n_entries:,}",
            f"{share.n_bytes:,}",
            f"{share.n_tokens:,}" if share.n_tokens else "-",
            f"{format_age(share.used_last, now)} .. {format_age(share.used_first, now)}",
            owner.layout or "-",
        ]
        for owner, share in found.items()
    ]
    header = ["namespace", "kind", "holds", "calibration", "entries", "bytes", "tokens", "age", "layout"]
    fields = [
        ("entries", f"{n_entries:,}, {format_bytes(n_bytes)}"),
        ("of the budget", f"{n_charged:,} bytes of {'no budget' if budget is None else f'{budget:,}'}"),
    ]
    return result, "\n\n".join([*([format_table(header, rows)] if rows else []), format_fields(fields)])


def doctor(options: argparse.Namespace) -> Outcome:
    """Say what is right and wrong with a store: free space, permissions, budget, clocks, locks, what others left.

    Of every entry the first bytes are read. The exit status is 1 if something is wrong.
    """
    from ...maintenance.diagnosis import diagnose
    from ...report.table import format_table

    with opened(options) as place:
        found = diagnose(place)
    if not all(finding.is_right for finding in found):
        options.exit_code = FAULT_FOUND
    rows = [[finding.what, "" if finding.is_right else "WRONG", finding.told] for finding in found]
    result = {
        "is_right": all(finding.is_right for finding in found),
        "findings": [finding._asdict() for finding in found],
    }
    return result, format_table(["examined", "", "found"], rows)


def _age_order(one: Description) -> float:
    return one.entry.used_at or 0.0


def _facts(one: Description, now: float) -> dict[str, Any]:
    used_at = one.entry.used_at
    age = None if used_at is None else max(0.0, now - used_at)
    return key_facts(one.entry) | {"age_seconds": age, "kind": one.kind} | asdict(one.contents)


def _holds(contents: Contents) -> str:
    if contents.n_tokens is None:
        return contents.form
    return f"{contents.profile}, {contents.n_tokens:,} tokens from {contents.first_position or 0:,}"
