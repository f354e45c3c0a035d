"""What the subcommands of `store` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arguments import Outcome, Subcommands

if TYPE_CHECKING:
    from ...store.place import Place, PlacedEntry

FAULT_FOUND = 1
"""The exit code of a subcommand that has done what it should, and found a fault."""


def add(subcommands: Subcommands, run: Callable[[argparse.Namespace], Outcome]) -> Any:
    """The parser of a subcommand, with the URL of a store."""
    parser = subcommands.add(run)
    parser.add_argument(
        "url", metavar="URL", help="file:///absolute/path, redis://host or s3://bucket/prefix, with options; not tiers"
    )
    return parser


def add_prefix(parser: Any) -> None:
    """--prefix."""
    parser.add_argument("--prefix", default="", metavar="TEXT", help="only entries whose keys begin so")


def opened(options: argparse.Namespace, *, recovers: bool = False) -> Place:
    """The place that the URL names; opening it changes nothing unless it recovers."""
    from ...store import open_place

    return open_place(options.url, recovers=recovers)


def shown_key(entry: PlacedEntry) -> str:
    """A key with its namespace."""
    return entry.key if entry.namespace is None else f"{entry.namespace}={entry.key}"


def key_facts(entry: PlacedEntry) -> dict[str, Any]:
    """An entry in JSON."""
    return {"namespace": entry.namespace, "key": entry.key, "n_bytes": entry.n_bytes}


def format_age(used_at: float | None, now: float) -> str:
    """Time since then in its largest unit; "-" where it is not known."""
    if used_at is None:
        return "-"
    seconds = max(0.0, now - used_at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
