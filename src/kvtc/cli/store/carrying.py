"""The subcommands `export` and `import` of `store`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Outcome, Subcommands, add_calibration, add_model, add_output, check_output
from ..encode import add_codec, make_codec
from ..models import find_calibration, load_tokenizer
from ..texts import add_truncate, text_ids
from .common import FAULT_FOUND, add, add_prefix, opened

if TYPE_CHECKING:
    from ...store.place import Place


def add_subcommands(subcommands: Subcommands) -> None:
    """Add them."""
    parser = add(subcommands, export)
    add_output(parser, "the file to write")
    add_prefix(parser)
    group = parser.add_argument_group(
        "a text", "Instead of --prefix: what a prefix cache has of a text. The codec must be that of the prefix cache."
    )
    group.add_argument("--text", type=Path, metavar="FILE", help="the text or conversation; needs --model")
    group.add_argument("--namespace", default="", metavar="NAME", help="of the prefix cache (not of the URL)")
    group.add_argument("--identity", default="", metavar="TEXT", help="of the model, as the prefix cache was given it")
    add_model(group, "the codec is")
    add_calibration(group)
    add_truncate(group)
    add_codec(group)
    parser = add(subcommands, import_)
    parser.add_argument("file", type=Path, metavar="FILE", help="as `kvtc store export` writes it")


def export(options: argparse.Namespace) -> Outcome:
    """Write entries of a store into one file: all, those of a prefix of keys, or what a text needs.

    Values are in clear, and the file is its owner's alone. If the URL of an encrypted store has no
    key, values stay encrypted. Damaged entries are left out, and the exit status is then 1.
    """
    if options.text is not None and options.model is None:
        options.usage_error("--text needs --model, for its tokenizer")
    if options.text is not None and options.prefix:
        options.usage_error("--text and --prefix are both given; expected one")
    check_output(options.output, options.force)
    from ...maintenance import archive
    from ...report.table import format_bytes, format_fields

    with opened(options) as place:
        wanted = _of_prefix(place, options.prefix) if options.text is None else _of_text(place, options)
        states = archive.export(place, wanted, options.output)
    n_written = states.pop("written", 0)
    if states["damaged"]:
        options.exit_code = FAULT_FOUND
    n_bytes = options.output.stat().st_size
    result = {"path": str(options.output), "file_bytes": n_bytes, "n_entries": n_written, "left_out": dict(states)}
    left_out = ", ".join(f"{n:,} {state}" for state, n in sorted(states.items()) if n) or "nothing"
    fields = [
        ("saved", f"{options.output}, {format_bytes(n_bytes)}"),
        ("entries", f"{n_written:,}"),
        ("left out", left_out),
    ]
    return result, format_fields(fields)


def import_(options: argparse.Namespace) -> Outcome:
    """Put the entries of a file into a store.

    The whole file is checked first. Entries that the store has stay as they are. The byte budget in
    the URL holds: a file that exceeds it is refused, and other entries are evicted for it.
    """
    from ...maintenance.archive import import_entries
    from ...report.table import format_bytes, format_fields

    with opened(options, recovers=True) as place:
        done = import_entries(place, options.file)
    result = {"n_written": done["written"], "n_there": done["there"], "written_bytes": done["bytes"]}
    fields = [
        ("written", f"{done['written']:,} entries, {format_bytes(done['bytes'])}"),
        ("were there", f"{done['there']:,}"),
    ]
    return result, format_fields(fields)


def _of_prefix(place: Place, prefix: str) -> list[tuple[str, bytes | None]]:
    """Entries by key, those used longest ago first."""
    entries = sorted(place.own_entries(prefix), key=lambda entry: entry.used_at or 0.0)
    return [(entry.key, None) for entry in entries]


def _of_text(place: Place, options: argparse.Namespace) -> list[tuple[str, bytes | None]]:
    """What a prefix cache has of a text, the head of its chain last."""
    from ...errors import InvalidArgument
    from ...prefix_cache import PrefixCache
    from ...store.place import PlaceView

    codec = make_codec(options, find_calibration(options))
    token_ids = text_ids(options, options.text, load_tokenizer(options.model))
    with PrefixCache(codec, PlaceView(place), namespace=options.namespace, identity=options.identity) as prefixes:
        found = prefixes.portable(token_ids)
    if not found:
        raise InvalidArgument(
            f"{options.text}: the store has nothing of this text by this model, codec, namespace and identity"
        )
    return found[::-1]
