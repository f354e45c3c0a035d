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

    Parameters:
        kind: the kind of layer, in words.
        part: what of each layer the group holds, in words.
        dtype: of its numbers, as torch names it.
        layers: numbers of its layers in the model.
        shape: heads, features of a key and of a value; of a state its axes, 0 where it has fewer.
        first_kv_head: number of its first key-value head in the model.
        is_coded: whether the profile codes it; the others are exact, but for states that are rounded.
        original_bytes: size of what is stored of it, at 16 bits a number, or 8 where it is fp8.
        stored_bytes: size of its sections and of their entries in the table.
        ratio: original over stored bytes; None: it holds nothing.
        is_rounded: whether its numbers are rounded (of states alone).

    Example:
        >>> (group,) = kvtc.inspect(stream).groups
        >>> group.kind, group.dtype, group.shape, group.is_coded
        ('full attention', 'bfloat16', (3, 32, 32), True)
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
    """One section of a stream.

    Parameters:
        kind: what it holds, in words.
        group: index of its group of layers.
        chunk: index of its chunk; None: it belongs to the whole stream.
        coder: the lossless coder of its bytes.
        raw_bytes: bytes before lossless coding.
        stored_bytes: bytes after it.

    Example:
        >>> [(section.kind, section.chunk) for section in kvtc.inspect(stream).sections]
        [('rate', None), ('sink', 0), ('body', 0), ('body', 1), ('window', 1), ('window', 2)]
    """

    kind: str
    group: int
    chunk: int | None
    coder: str
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class StreamInfo:
    """What a stream holds, and all that it costs.

    Parameters:
        format_version: version of the stream format.
        profile: the profile that coded it.
        fingerprint: of its calibration, in hexadecimal digits.
        groups: its groups of layers, the coded one first.
        first_position: position of its first token; None: there are no tokens.
        last_chunk_position: position of the first token of its last chunk; None: there are no tokens.
        n_tokens: tokens of the cache.
        sink_tokens: tokens of them that are sinks.
        body_tokens: tokens of them that are coded.
        window_tokens: tokens of them in the window.
        chunk_tokens: positions in a cell of the grid of chunks.
        n_chunks: number of chunks.
        has_token_digests: whether token ids are compared on decode.
        sink_format: "exact" or "fp8".
        window_format: "exact" or "coded".
        padding_bytes: zeros that fill a stream of fixed size.
        original_bytes: size of the cache at 16 bits a number, also where it is float32; at 8 where it is fp8.
        body_bytes: all that the coded tokens of all coded groups cost: every byte of the stream, padding included, but
            the sections of sinks, window and exact groups and their entries in the table.
        total_bytes: length of the stream.
        body_ratio: original size of the body over body_bytes; None: nothing is coded.
        total_ratio: original_bytes over total_bytes; None: there are no tokens.
        resume_points: ends of chunks after which the cache can be restored; empty: it can be after any token.
        sections: its sections, in their order.

    Example:
        >>> info = kvtc.inspect(stream)
        >>> info.n_tokens == info.sink_tokens + info.body_tokens + info.window_tokens
        True
        >>> info.total_ratio == info.original_bytes / info.total_bytes
        True
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
    """Describe a stream. Nothing is decoded, no calibration is needed, and the checksums of sections are not verified.

    Parameters:
        stream: the stream.

    Returns:
        What it holds and costs.

    Raises:
        TruncatedStream, CorruptStream, UnsupportedVersion: the stream cannot be read.

    Example:
        >>> info = kvtc.inspect(stream)
        >>> info.profile, info.n_chunks, info.sink_tokens, info.body_tokens, info.window_tokens
        ('joint', 3, 4, 468, 128)
        >>> round(info.body_ratio)
        16
    """
    return describe(parse_stream(stream))


def describe(stream: Stream) -> StreamInfo:
    """Describe a parsed stream."""
    header, chunks = stream.header, stream.chunks
    coded = [
        index for index in range(len(header.groups)) if index not in header.others or header.groups[index].is_coded
    ]
    n_exact, exact_bytes = stream.sections.stored_bytes(coded, SectionType.SINK, SectionType.WINDOW)
    total = stream.n_bytes
    sink_tokens, body_tokens, window_tokens = chunks.region_tokens()
    n_tokens = sink_tokens + body_tokens + window_tokens
    groups = tuple(_group(stream, index) for index in range(len(header.groups)))
    of_others = sum(
        groups[index].stored_bytes + table_bytes([header.groups[index].layers], []) - HEADER_BYTES - SECTION_BYTES
        for index in header.others
        if index not in coded
    )
    original_body = sum(_original_body(stream, index) for index in coded)
    body_bytes = total - exact_bytes - SECTION_BYTES * n_exact - of_others if original_body else 0
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
        padding_bytes=stream.sections.stored_bytes([0], SectionType.PADDING)[1],
        original_bytes=original,
        body_bytes=body_bytes,
        total_bytes=total,
        body_ratio=original_body / body_bytes if body_bytes else None,
        total_ratio=original / total if n_tokens else None,
        resume_points=tuple(resume_points(stream)) if is_partial else (),
        sections=_sections(stream),
    )


def _original_body(stream: Stream, index: int) -> int:
    """Bytes of the body tokens of a coded group in the cache."""
    header = stream.header
    if index not in header.others:
        return stream.chunks.region_tokens()[1] * header.joint_features * header.original_bits // 8
    entries, dtype = stream.sections.entries, header.groups[index].dtype
    raw = entries["raw"][(entries["group"] == index) & (entries["type"] == SectionType.BODY)]
    return int(raw.sum(dtype=np.int64)) * min(2, dtype.itemsize) // dtype.itemsize


def _group(stream: Stream, index: int) -> GroupInfo:
    header, entries = stream.header, stream.sections.entries
    group, is_first = header.groups[index], index not in header.others
    mine = entries[1:][entries["group"][1:] == index]
    mine = mine[mine["type"] != SectionType.PADDING]
    stored = int(mine["stored"].sum(dtype=np.int64)) + SECTION_BYTES * len(mine)
    if is_first:
        original = stream.n_tokens * header.joint_features * header.original_bits // 8
    else:
        original = int(mine["raw"].sum(dtype=np.int64)) * min(2, group.dtype.itemsize) // group.dtype.itemsize
    dtype = str(group.dtype).removeprefix("torch.")
    is_rounded = ROUNDED in {CODER_NAMES[coder] for coder in mine["coder"].tolist()}
    ratio, is_coded = original / stored if stored else None, is_first or group.is_coded
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
