"""The subcommand `store`: what operators of a store need."""

from __future__ import annotations

from ..arguments import Subcommands
from . import carrying, keeping, viewing


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `store` and its subcommands."""
    of_stores = subcommands.group("store", "Look at a store, verify it, make room, and carry entries elsewhere.")
    for module in (viewing, keeping, carrying):
        module.add_subcommands(of_stores)
