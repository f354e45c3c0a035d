"""Streams split into self-contained streams of one chunk, and joined again; nothing is recoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import CorruptStream, InvalidArgument, StreamTooLarge
from .groups import pack_groups
from .stream import Stream, assemble, parse_stream
from .tables import CHUNK_BYTES, SECTION_BYTES, ChunkTable, SectionType, check_order

_LARGEST_GROWTH = 64
"""How many times the stream the rates of all its parts may take: every part repeats it."""


def split_stream(data: bytes | memoryview) -> list[bytes]:
    """Split a stream into streams of one chunk, each of which decodes alone. Stored bytes are copied; nothing is encoded
    again.

    Parameters:
        data: the stream.

    Returns:
        One stream for each chunk, in order; none for an empty cache.

    Raises:
        TruncatedStream, CorruptStream, UnsupportedVersion: the stream cannot be read.
        StreamTooLarge: the parts would take far more bytes than the stream, because each repeats a large rate.

    Example:
        >>> parts = kvtc.split_stream(stream)
        >>> [kvtc.inspect(part).n_tokens for part in parts]
        [256, 256, 88]
        >>> codec.decode(parts[1], token_ids[256:512]).get_seq_length()
        256
    """
    stream = parse_stream(data)
    rate_entry, rate = stream.sections.entries[:1].tobytes(), stream.stored(stream.find(SectionType.RATE))
    if len(rate) * len(stream.chunks) > _LARGEST_GROWTH * stream.n_bytes:
        raise StreamTooLarge(
            f"{len(stream.chunks)} parts would each repeat the {len(rate)} bytes of the rate; a stream of {stream.n_bytes} bytes "
            f"may be split into parts whose rates take {_LARGEST_GROWTH} times as much"
        )
    sections = stream.sections.entries.copy()
    sections["chunk"] = 0
    groups, chunk_table, section_table = (
        pack_groups(stream.header.groups),
        stream.chunks.entries.tobytes(),
        sections.tobytes(),
    )
    firsts = stream.sections.firsts
    spans = map(slice, stream.sections.offsets[firsts[:-1]].tolist(), stream.sections.offsets[firsts[1:]].tolist())
    rows = map(slice, (SECTION_BYTES * firsts[:-1]).tolist(), (SECTION_BYTES * firsts[1:]).tolist())
    starts = range(0, len(chunk_table), CHUNK_BYTES)
    return [
        assemble(
            stream.header,
            groups,
            chunk_table[start : start + CHUNK_BYTES],
            rate_entry + section_table[row],
            [rate, *stream.data.on_host([span])],
        )
        for start, row, span in zip(starts, rows, spans, strict=True)
    ]


def join_streams(parts: Sequence[bytes | memoryview]) -> bytes:
    """Join streams of consecutive chunks of one encoding. Stored bytes are copied; nothing is encoded again.

    Parameters:
        parts: the streams, in the order of their positions; at least one.

    Returns:
        One stream of all chunks.

    Raises:
        TruncatedStream, CorruptStream, UnsupportedVersion: a part cannot be read.
        InvalidArgument: the parts do not belong together, or there are none.

    Example:
        >>> parts = kvtc.split_stream(stream)
        >>> kvtc.join_streams(parts) == stream
        True
        >>> kvtc.inspect(kvtc.join_streams(parts[:2])).n_tokens
        512
    """
    if not parts:
        raise InvalidArgument("there are no streams to join")
    streams = [parse_stream(part) for part in parts]
    first = streams[0]
    rate = _rate_bytes(first)
    n_chunks = 0
    sections = [first.sections.entries[:1]]
    stored = [rate]
    for index, stream in enumerate(streams):
        if stream.header != first.header or _rate_bytes(stream) != rate:
            raise InvalidArgument(
                f"stream {index} was not made by the encoding of stream 0: their headers or rates differ"
            )
        its_own = stream.sections.entries[1:].copy()
        its_own["chunk"] += n_chunks
        sections.append(its_own)
        stored += stream.data.on_host([slice(int(stream.sections.offsets[1]), stream.n_bytes)])
        n_chunks += len(stream.chunks)
    chunks = np.concatenate([stream.chunks.entries for stream in streams])
    try:
        check_order(ChunkTable(chunks), first.header)
    except CorruptStream as error:
        raise InvalidArgument(f"the streams do not follow one another: {error}") from error
    return assemble(
        first.header, pack_groups(first.header.groups), chunks.tobytes(), np.concatenate(sections).tobytes(), stored
    )


def _rate_bytes(stream: Stream) -> memoryview:
    return stream.stored(stream.find(SectionType.RATE))
