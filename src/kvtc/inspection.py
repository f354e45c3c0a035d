"""What a stream holds and what it costs, read from its tables alone: no calibration, no decoding."""

from __future__ import annotations

from dataclasses import dataclass

from .container import FORMAT_VERSION, SECTION_BYTES, SectionType, Stream, parse_stream


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
    """Geometry, regions and honest cost of a stream.

    body_bytes: all that the coded tokens cost: every byte of the stream, padding included, but the sections of sinks and window and
    their table entries. sink_format: "exact" or "fp8". window_format: "exact" or "coded". padding_bytes: zeros that fill a stream
    of fixed size. total_bytes: the length of the stream. Ratios count the original at 16 bits a value (8 where the cache is fp8),
    even where it is fp32; body_ratio is None where nothing is coded, total_ratio where there are no tokens.
    """

    format_version: int
    profile: str
    dtype: str
    fingerprint: str
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    head_dim: int
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
    exact = [s for s in stream.sections if s.type in (SectionType.SINK, SectionType.WINDOW)]
    total = stream.n_bytes
    body_tokens = sum(chunk.n_body for chunk in chunks)
    body_bytes = total - sum(s.stored_bytes + SECTION_BYTES for s in exact) if body_tokens else 0
    return StreamInfo(
        format_version=FORMAT_VERSION,
        profile=header.profile,
        dtype=str(header.dtype).removeprefix("torch."),
        fingerprint=header.fingerprint.hex(),
        layers=(header.first_layer, header.first_layer + header.n_layers),
        kv_heads=(header.first_kv_head, header.first_kv_head + header.n_kv_heads),
        head_dim=header.head_dim,
        first_position=chunks[0].first_position if chunks else None,
        last_chunk_position=chunks[-1].first_position if chunks else None,
        n_tokens=stream.n_tokens,
        sink_tokens=sum(chunk.n_sink for chunk in chunks),
        body_tokens=body_tokens,
        window_tokens=sum(chunk.n_window for chunk in chunks),
        chunk_tokens=header.chunk_tokens,
        n_chunks=len(chunks),
        has_token_digests=header.has_digests,
        window_format="coded" if any(chunk.coded_window for chunk in chunks) else "exact",
        sink_format="fp8" if any(chunk.fp8_sinks for chunk in chunks) else "exact",
        padding_bytes=sum(s.stored_bytes for s in stream.sections if s.type is SectionType.PADDING),
        original_bytes=stream.n_tokens * token_bytes,
        body_bytes=body_bytes,
        total_bytes=total,
        body_ratio=body_tokens * token_bytes / body_bytes if body_tokens else None,
        total_ratio=stream.n_tokens * token_bytes / total if stream.n_tokens else None,
        sections=tuple(
            SectionInfo(
                s.type.name.lower(),
                None if s.type is SectionType.RATE else s.chunk,
                s.coder,
                s.raw_bytes,
                s.stored_bytes,
            )
            for s in stream.sections
        ),
    )
