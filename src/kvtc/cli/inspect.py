"""The subcommand `inspect`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..layer_runs import describe_layers
from .arguments import Outcome, Subcommands, read_stream

if TYPE_CHECKING:
    from ..codec.inspection import GroupInfo, StreamInfo


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `inspect`."""
    parser = subcommands.add(inspect)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sections", action="store_true", help="list every section of a stream")


def inspect(options: argparse.Namespace) -> Outcome:
    """Describe a stream or a calibration file.

    The checksums of a stream's sections are verified by decode.
    """
    from ..calibration import load_calibration
    from ..codec import inspection
    from ..container.tables import MAGIC
    from ..report.table import format_fields
    from .calibration_fields import describe_calibration

    stream = read_stream(options.file)
    if not stream.startswith(MAGIC) and options.file.suffix == ".safetensors":
        result, fields = describe_calibration(load_calibration(options.file), options.file)
        return result, format_fields(fields)
    info = inspection.inspect(stream)
    result = asdict(info)
    if not options.sections:
        del result["sections"]
    return result, _describe_stream(info, options.sections)


def _describe_stream(info: StreamInfo, with_sections: bool) -> str:
    from ..report.table import format_fields, format_ratio, format_table

    parts = f"{info.sink_tokens} sink, {info.body_tokens:,} body, {info.window_tokens} window"
    fields = [
        ("stream", f"format version {info.format_version}, profile {info.profile}"),
        ("tokens", f"{info.n_tokens:,}: {parts}; {info.n_chunks} chunks of at most {info.chunk_tokens}"),
        ("first position", "-" if info.first_position is None else info.first_position),
        *(("group", _describe_group(group)) for group in info.groups),
        *([("resume points", _describe_points(info.resume_points))] if info.resume_points else []),
        ("calibration", info.fingerprint),
        ("sinks, window", f"{info.sink_format}, {info.window_format}"),
        ("token ids", "named by a digest: decode can compare them" if info.has_token_digests else "not known"),
    ]
    stored: dict[str, tuple[int, int, int]] = {}
    for section in info.sections:
        n, raw, size = stored.get(section.kind, (0, 0, 0))
        stored[section.kind] = (n + 1, raw + section.raw_bytes, size + section.stored_bytes)
    rows = [
        [kind, n, f"{raw:,}", f"{size:,}", f"{size / info.total_bytes:.1%}"] for kind, (n, raw, size) in stored.items()
    ]
    tables = info.total_bytes - sum(size for _, _, size in stored.values())
    rows.append(["header and tables", "-", f"{tables:,}", f"{tables:,}", f"{tables / info.total_bytes:.1%}"])
    rows.append(["stream", len(info.sections), "-", f"{info.total_bytes:,}", "100.0%"])
    bits = 8 if info.groups[0].dtype.startswith("float8") else 16
    body, total = (f"{format_ratio(one):>6}" for one in (info.body_ratio, info.total_ratio))
    ratios = [
        ("original", f"{info.original_bytes:,} bytes, at {bits} bits a value"),
        ("body_ratio", f"{body}  coded tokens against {info.body_bytes:,} bytes: all but sinks and window"),
        ("total_ratio", f"{total}  all tokens against {info.total_bytes:,} bytes"),
    ]
    blocks = [
        format_fields(fields),
        format_table(["sections", "number", "raw bytes", "stored bytes", "share"], rows),
        format_fields(ratios),
    ]
    if with_sections:
        every = [
            ["-" if s.chunk is None else s.chunk, s.kind, s.coder, f"{s.raw_bytes:,}", f"{s.stored_bytes:,}"]
            for s in info.sections
        ]
        blocks.append(format_table(["chunk", "section", "coder", "raw bytes", "stored bytes"], every))
    return "\n\n".join(blocks)


def _describe_points(points: tuple[int, ...]) -> str:
    """All of them where they are few."""
    first = ", ".join(f"{point:,}" for point in points[:8])
    return first if len(points) <= 8 else f"{len(points)}: {first} .. {points[-1]:,}"


def _describe_group(group: GroupInfo) -> str:
    from ..report.table import format_ratio

    heads, key_dim, value_dim = group.shape
    if group.part == "keys and values":
        shape = f"kv heads {group.first_kv_head}..{group.first_kv_head + heads - 1}, key_dim {key_dim}, value_dim {value_dim}"
    else:
        shape = f"{group.part}, {' x '.join(str(axis) for axis in group.shape if axis) or 'nothing'}"
    how = "coded" if group.is_coded else "rounded" if group.is_rounded else "exact"
    cost = f"{how}: {group.original_bytes:,} -> {group.stored_bytes:,} bytes, ratio {format_ratio(group.ratio)}"
    return f"{group.kind}, {group.dtype}, layers {describe_layers(group.layers)}, {shape}; {cost}"
