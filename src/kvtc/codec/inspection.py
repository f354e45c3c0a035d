"""What a stream holds and what it costs, read from its tables alone: no calibration, no decoding."""

from __future__ import annotations

from dataclasses import dataclass

from ..coding.lossless import CODER_NAMES
from ..container.stream import Stream, parse_stream
from ..container.tables import FORMAT_VERSION, FULL_ATTENTION, SECTION_BYTES, Header, SectionType


@dataclass(frozen=True)
class GroupInfo:
    """One group of layers: its kind, the dtype of its cache, and half-open ranges (start, stop) of the model's layers and heads.

    key_dim, value_dim: features of a head's key and of its value.
    """

    kind: str
    dtype: str
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class SectionInfo:
    """One section: its kind, its chunk (None: of the whole stream), coder, and bytes before and after lossless coding."""

    kind: str
    chunk: int | None
    coder: str
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class StreamInfo:
    """Groups of layers, regions and honest cost of a stream.

    body_bytes: all that the coded tokens cost: every byte of the stream, padding included, but the sections of sinks and window and
    their table entries. sink_format: "exact" or "fp8". window_format: "exact" or "coded". padding_bytes: zeros that fill a stream
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
    sections: tuple[SectionInfo, ...]


def inspect(stream: bytes | memoryview) -> StreamInfo:
    """Describe a stream; raises `TruncatedStream`, `CorruptStream` or `UnsupportedVersion`. Section checksums are not verified."""
    return describe(parse_stream(stream))


def describe(stream: Stream) -> StreamInfo:
    """Describe a parsed stream."""
    header, chunks = stream.header, stream.chunks
    token_bytes = 2 * header.row_features * header.original_bits // 8
    n_exact, exact_bytes = stream.sections.stored_bytes(SectionType.SINK, SectionType.WINDOW)
    total = stream.n_bytes
    sink_tokens, body_tokens, window_tokens = chunks.region_tokens()
    n_tokens = sink_tokens + body_tokens + window_tokens
    body_bytes = total - exact_bytes - SECTION_BYTES * n_exact if body_tokens else 0
    return StreamInfo(
        format_version=FORMAT_VERSION,
        profile=header.profile,
        fingerprint=header.fingerprint.hex(),
        groups=(_group(header),),
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
        original_bytes=n_tokens * token_bytes,
        body_bytes=body_bytes,
        total_bytes=total,
        body_ratio=body_tokens * token_bytes / body_bytes if body_tokens else None,
        total_ratio=n_tokens * token_bytes / total if n_tokens else None,
        sections=_sections(stream),
    )


def _group(header: Header) -> GroupInfo:
    layers = header.first_layer, header.first_layer + header.n_layers
    heads = header.first_kv_head, header.first_kv_head + header.n_kv_heads
    dtype = str(header.dtype).removeprefix("torch.")
    return GroupInfo(FULL_ATTENTION, dtype, layers, heads, header.head_dim, header.head_dim)


def _sections(stream: Stream) -> tuple[SectionInfo, ...]:
    """All of them: a stream may have millions, so that they are made column by column."""
    entries = stream.sections.entries
    names = {kind.value: kind.name.lower() for kind in SectionType}
    kinds = map(names.__getitem__, entries["type"].tolist())
    chunks = [None, *entries["chunk"][1:].tolist()]
    coders = map(CODER_NAMES.__getitem__, entries["coder"].tolist())
    return tuple(map(SectionInfo, kinds, chunks, coders, entries["raw"].tolist(), entries["stored"].tolist()))
