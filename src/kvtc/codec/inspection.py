"""What a stream holds and what it costs, read from its tables alone: no calibration, no decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..coding.lossless import CODER_NAMES, ROUNDED
from ..container.stream import Stream, parse_stream
from ..container.tables import FORMAT_VERSION, HEADER_BYTES, SECTION_BYTES, SectionType, table_bytes
from .exact_groups import resume_points


@dataclass(frozen=True)
class GroupInfo:
    """One group of layers, and what it costs.

    kind, part: what of a layer it holds, in words. dtype: of its numbers. layers: of the model. shape: heads, features of a key and
    of a value; of a state its axes, 0 where it has fewer. first_kv_head: where its heads stand. is_coded: whether the profile codes
    it; the others are exact, but for states that are rounded. original_bytes: of what is stored of it, at 16 bits a value, or 8
    where it is fp8. stored_bytes: its sections with their table entries. ratio: of the two; None where it holds nothing.
    is_rounded: whether its numbers are (states alone).
    """

    kind: str
    part: str
    dtype: str
    layers: tuple[int, ...]
    shape: tuple[int, int, int]
    first_kv_head: int
    is_coded: bool
    original_bytes: int
    stored_bytes: int
    ratio: float | None
    is_rounded: bool = False


@dataclass(frozen=True)
class SectionInfo:
    """One section: its kind, group, chunk (None: of the whole stream), coder, and bytes before and after lossless coding."""

    kind: str
    group: int
    chunk: int | None
    coder: str
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class StreamInfo:
    """Groups of layers, regions and honest cost of a stream.

    body_bytes: all that the coded tokens cost: every byte of the stream, padding included, but the sections of sinks, window and
    exact groups and their table entries. resume_points: the ends of chunks after which the cache can be restored; empty where it
    can be after any token.
    sink_format: "exact" or "fp8". window_format: "exact" or "coded". padding_bytes: zeros that fill a stream
    of fixed size. total_bytes: the length of the stream. Ratios count the original at 16 bits a value (8 where the cache is fp8),
    even where it is fp32; body_ratio is None where nothing is coded, total_ratio where there are no tokens.
    """

    format_version: int
    profile: str
    fingerprint: str
    groups: tuple[GroupInfo, ...]
    first_position: int | None
    last_chunk_position: int | None
    n_tokens: int
    sink_tokens: int
    body_tokens: int
    window_tokens: int
    chunk_tokens: int
    n_chunks: int
    has_token_digests: bool
    sink_format: str
    window_format: str
    padding_bytes: int
    original_bytes: int
    body_bytes: int
    total_bytes: int
    body_ratio: float | None
    total_ratio: float | None
    resume_points: tuple[int, ...]
    sections: tuple[SectionInfo, ...]


def inspect(stream: bytes | memoryview) -> StreamInfo:
    """Describe a stream; raises `TruncatedStream`, `CorruptStream` or `UnsupportedVersion`. Section checksums are not verified."""
    return describe(parse_stream(stream))


def describe(stream: Stream) -> StreamInfo:
    """Describe a parsed stream."""
    header, chunks = stream.header, stream.chunks
    has_coded = header.coded is not None
    token_bytes = 2 * header.row_features * header.original_bits // 8 if has_coded else 0
    n_exact, exact_bytes = stream.sections.stored_bytes(SectionType.SINK, SectionType.WINDOW)
    total = stream.n_bytes
    sink_tokens, body_tokens, window_tokens = chunks.region_tokens()
    n_tokens = sink_tokens + body_tokens + window_tokens
    groups = tuple(_group(stream, index) for index in range(len(header.groups)))
    of_others = sum(
        groups[index].stored_bytes + table_bytes([header.groups[index].layers], []) - HEADER_BYTES - SECTION_BYTES
        for index in header.exact
    )
    body_bytes = total - exact_bytes - SECTION_BYTES * n_exact - of_others if body_tokens and has_coded else 0
    original = sum(group.original_bytes for group in groups)
    is_partial = any(not group.is_complete for group in header.groups)
    return StreamInfo(
        format_version=FORMAT_VERSION,
        profile=header.profile,
        fingerprint=header.fingerprint.hex(),
        groups=groups,
        first_position=chunks[0].first_position if chunks else None,
        last_chunk_position=chunks[-1].first_position if chunks else None,
        n_tokens=n_tokens,
        sink_tokens=sink_tokens,
        body_tokens=body_tokens,
        window_tokens=window_tokens,
        chunk_tokens=header.chunk_tokens,
        n_chunks=len(chunks),
        has_token_digests=header.has_digests,
        window_format="coded" if chunks.coded_window else "exact",
        sink_format="fp8" if chunks.fp8_sinks else "exact",
        padding_bytes=stream.sections.stored_bytes(SectionType.PADDING)[1],
        original_bytes=original,
        body_bytes=body_bytes,
        total_bytes=total,
        body_ratio=body_tokens * token_bytes / body_bytes if body_bytes else None,
        total_ratio=original / total if n_tokens else None,
        resume_points=tuple(resume_points(stream)) if is_partial else (),
        sections=_sections(stream),
    )


def _group(stream: Stream, index: int) -> GroupInfo:
    header, entries = stream.header, stream.sections.entries
    group, is_coded = header.groups[index], header.coded is not None and index == 0
    mine = entries[1:][entries["group"][1:] == index]
    mine = mine[mine["type"] != SectionType.PADDING]
    stored = int(mine["stored"].sum(dtype=np.int64)) + SECTION_BYTES * len(mine)
    if is_coded:
        original = stream.n_tokens * 2 * header.row_features * header.original_bits // 8
    else:
        original = int(mine["raw"].sum(dtype=np.int64)) * min(2, group.dtype.itemsize) // group.dtype.itemsize
    dtype = str(group.dtype).removeprefix("torch.")
    is_rounded = ROUNDED in {CODER_NAMES[coder] for coder in mine["coder"].tolist()}
    ratio = original / stored if stored else None
    part, head = group.part.name.lower().replace("_", " "), group.first_kv_head
    return GroupInfo(
        group.kind, part, dtype, group.layers, group.shape, head, is_coded, original, stored, ratio, is_rounded
    )


def _sections(stream: Stream) -> tuple[SectionInfo, ...]:
    """All of them: a stream may have millions, so that they are made column by column."""
    entries = stream.sections.entries
    names = {kind.value: kind.name.lower() for kind in SectionType}
    kinds = map(names.__getitem__, entries["type"].tolist())
    chunks = [None, *entries["chunk"][1:].tolist()]
    coders = map(CODER_NAMES.__getitem__, entries["coder"].tolist())
    groups = entries["group"].tolist()
    return tuple(map(SectionInfo, kinds, groups, chunks, coders, entries["raw"].tolist(), entries["stored"].tolist()))
