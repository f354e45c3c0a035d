"""The stream: header, chunk table, section table, sections. docs/format.md is the specification; writer and parser stand here.

The parser trusts nothing: it reads lengths, checks them against caps and against each other, and only then looks at sections;
the last section ends exactly where the stream ends. No length in a stream allocates memory by itself.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from .coding.lossless import CODER_IDS, CODER_NAMES, compress, decompress
from .errors import CorruptStream, InvalidArgument, TruncatedStream, UnsupportedVersion

MAGIC = b"KVTC"
FORMAT_VERSION = 1
MAX_CHUNKS = 1 << 20
MAX_CHUNK_TOKENS = 1 << 15
MAX_POSITION = 1 << 31
DIGEST_BYTES = 8
STREAM_WIDE = 0xFFFFFFFF

_HEADER = struct.Struct("<4sBBBB16sHHHHHHIIIII")
_CHUNK = struct.Struct("<IHHHH8s")
_SECTION = struct.Struct("<BBHIIII")
HEADER_BYTES, CHUNK_BYTES, SECTION_BYTES = _HEADER.size, _CHUNK.size, _SECTION.size

PROFILES = {"paper": 1}
PROFILE_NAMES = {number: name for name, number in PROFILES.items()}
DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
DTYPE_OF = {number: dtype for dtype, number in DTYPES.items()}

_HAS_DIGESTS, _IS_TRANSFORMERS, _HAS_GAPS = 1, 2, 4
_EXPLICIT_POSITIONS, _FP8_SINKS = 1, 2


class SectionType(IntEnum):
    """What a section holds; sections of a chunk stand in this order, the allocation first of all."""

    ALLOCATION = 1
    POSITIONS = 2
    SINK = 3
    BODY = 4
    WINDOW = 5


@dataclass(frozen=True)
class Header:
    """What holds for the whole stream."""

    profile: str
    dtype: torch.dtype
    fingerprint: bytes
    first_layer: int
    n_layers: int
    first_kv_head: int
    n_kv_heads: int
    head_dim: int
    chunk_tokens: int
    rope_length: int
    has_digests: bool
    is_transformers: bool
    # Whether positions of the encoding skip any; `write_stream` sets it. Without gaps a chunk that is missing shows.
    has_gaps: bool = False

    @property
    def row_features(self) -> int:
        """p: values of one token's keys, or values."""
        return self.n_layers * self.n_kv_heads * self.head_dim

    @property
    def original_bits(self) -> int:
        """Bits a value counts in the original: 16, or 8 where the cache is fp8."""
        return 8 if self.dtype.itemsize == 1 else 16


@dataclass(frozen=True)
class Chunk:
    """One entry of the chunk table: the tokens inside one cell of the grid of positions."""

    first_position: int
    n_sink: int
    n_body: int
    n_window: int
    explicit_positions: bool
    fp8_sinks: bool
    token_digest: bytes

    @property
    def n_tokens(self) -> int:
        return self.n_sink + self.n_body + self.n_window

    def sections(self) -> list[SectionType]:
        """The sections this chunk must have, in order."""
        present = {
            SectionType.POSITIONS: self.explicit_positions,
            SectionType.SINK: self.n_sink > 0,
            SectionType.BODY: self.n_body > 0,
            SectionType.WINDOW: self.n_window > 0,
        }
        return [section for section, is_there in present.items() if is_there]


@dataclass(frozen=True)
class Section:
    """One entry of the section table, and where its bytes stand in the stream."""

    type: SectionType
    coder: str
    chunk: int
    raw_bytes: int
    stored_bytes: int
    checksum: int
    offset: int


@dataclass(frozen=True)
class Payload:
    """Section bytes before lossless coding, on their way into a stream."""

    type: SectionType
    chunk: int
    raw: bytes


@dataclass(frozen=True)
class Stream:
    """A parsed stream: tables checked, sections not yet read."""

    header: Header
    chunks: tuple[Chunk, ...]
    sections: tuple[Section, ...]
    data: memoryview

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)

    def find(self, section_type: SectionType, chunk: int = STREAM_WIDE) -> Section:
        """The section of a type and chunk; the parser guarantees those that `Chunk.sections` names."""
        return self._index[section_type, chunk]

    def read(self, section_type: SectionType, chunk: int, raw_bytes: int) -> bytes:
        """Verify and decode a section that must hold `raw_bytes` bytes."""
        section = self.find(section_type, chunk)
        where = f"section {section_type.name.lower()}" + ("" if chunk == STREAM_WIDE else f" of chunk {chunk}")
        if section.raw_bytes != raw_bytes:
            raise CorruptStream(f"{where} claims {section.raw_bytes} bytes; its tokens need {raw_bytes}")
        stored = self.data[section.offset : section.offset + section.stored_bytes]
        if zlib.crc32(stored) != section.checksum:
            raise CorruptStream(f"{where} fails its checksum")
        try:
            return decompress(stored, raw_bytes, section.coder)
        except CorruptStream as error:
            raise CorruptStream(f"{where}: {error}") from error

    @cached_property
    def _index(self) -> dict[tuple[SectionType, int], Section]:
        return {(section.type, section.chunk): section for section in self.sections}


def token_digest(token_ids: npt.NDArray[np.int64]) -> bytes:
    """Names the token ids of a chunk: first 8 bytes of the SHA-256 of them as little-endian int64."""
    return hashlib.sha256(token_ids.astype("<i8").tobytes()).digest()[:DIGEST_BYTES]


def write_stream(header: Header, chunks: Sequence[Chunk], payloads: Sequence[Payload], coder: str) -> bytes:
    """Code each payload and put the stream together; a payload that coding would lengthen is stored as it is."""
    for payload in payloads:
        if len(payload.raw) >= 1 << 32:
            raise InvalidArgument(
                f"a section of {len(payload.raw)} bytes; 4 GiB is the limit: use a smaller chunk_tokens"
            )
    # The coders release the interpreter lock: sections are coded side by side.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        coded = list(pool.map(lambda payload: compress(payload.raw, coder), payloads))
    entries, stored = [], []
    for payload, data in zip(payloads, coded, strict=True):
        is_shorter = len(data) < len(payload.raw)
        stored.append(data if is_shorter else payload.raw)
        used = coder if is_shorter else "none"
        entries.append(
            Section(payload.type, used, payload.chunk, len(payload.raw), len(stored[-1]), zlib.crc32(stored[-1]), 0)
        )
    has_gaps = any(chunk.explicit_positions for chunk in chunks) or any(
        after.first_position != before.first_position + before.n_tokens for before, after in pairwise(chunks)
    )
    return _assemble(replace(header, has_gaps=has_gaps), chunks, entries, stored)


def parse_stream(data: bytes | bytearray | memoryview) -> Stream:
    """Read and check the tables of a stream. Raises `TruncatedStream`, `CorruptStream` or `UnsupportedVersion`."""
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)]:
            raise CorruptStream("this is not a kvtc stream: it does not begin with KVTC")
        raise TruncatedStream(f"a stream has a header of {HEADER_BYTES} bytes; only {len(view)} bytes are here")
    fields = _HEADER.unpack_from(view)
    magic, version, profile, dtype, flags, fingerprint = fields[:6]
    first_layer, n_layers, first_kv_head, n_kv_heads, head_dim, reserved = fields[6:12]
    chunk_tokens, rope_length, n_chunks, n_sections, checksum = fields[12:]
    if magic != MAGIC:
        raise CorruptStream(f"this is not a kvtc stream: it begins with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(
            f"the stream has format version {version}; this kvtc reads version {FORMAT_VERSION}: upgrade kvtc"
        )
    if n_chunks > MAX_CHUNKS or n_sections > 4 * n_chunks + 1:
        raise CorruptStream(
            f"{n_chunks} chunks and {n_sections} sections are claimed; at most {MAX_CHUNKS} and 4 a chunk are possible"
        )
    tables_end = HEADER_BYTES + n_chunks * CHUNK_BYTES + n_sections * SECTION_BYTES
    if len(view) < tables_end:
        raise TruncatedStream(f"header and tables take {tables_end} bytes; only {len(view)} bytes are here")
    if zlib.crc32(view[HEADER_BYTES:tables_end], zlib.crc32(view[: HEADER_BYTES - 4])) != checksum:
        raise CorruptStream("header and tables fail their checksum")
    if profile not in PROFILE_NAMES or dtype not in DTYPE_OF or flags > 7 or reserved:
        raise CorruptStream(
            f"profile {profile}, dtype {dtype}, flags {flags}, reserved {reserved}: some value is unknown"
        )
    if not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS or 0 in (n_layers, n_kv_heads, head_dim) or rope_length > MAX_POSITION:
        raise CorruptStream(
            f"{n_layers} layers, {n_kv_heads} kv heads, head_dim {head_dim}, chunks of {chunk_tokens} tokens, "
            f"rope_length {rope_length}: some value is out of range"
        )
    header = Header(
        PROFILE_NAMES[profile],
        DTYPE_OF[dtype],
        fingerprint,
        first_layer,
        n_layers,
        first_kv_head,
        n_kv_heads,
        head_dim,
        chunk_tokens,
        rope_length,
        bool(flags & _HAS_DIGESTS),
        bool(flags & _IS_TRANSFORMERS),
        bool(flags & _HAS_GAPS),
    )
    chunks = tuple(_parse_chunk(view, HEADER_BYTES + index * CHUNK_BYTES, index, header) for index in range(n_chunks))
    _check_order(chunks, header)
    sections = _parse_sections(view, HEADER_BYTES + n_chunks * CHUNK_BYTES, n_sections, tables_end, chunks)
    return Stream(header, chunks, sections, view)


def split_stream(data: bytes | memoryview) -> list[bytes]:
    """One self-contained stream per chunk, nothing recoded: section bytes are copied as they are."""
    stream = parse_stream(data)
    parts = []
    for index, chunk in enumerate(stream.chunks):
        chosen = [s for s in stream.sections if s.chunk in (index, STREAM_WIDE)]
        stored = [bytes(stream.data[s.offset : s.offset + s.stored_bytes]) for s in chosen]
        entries = [s if s.chunk == STREAM_WIDE else replace(s, chunk=0) for s in chosen]
        parts.append(_assemble(stream.header, [chunk], entries, stored))
    return parts


def join_streams(parts: Sequence[bytes | memoryview]) -> bytes:
    """Streams of consecutive chunks of one encoding -> one stream; `join_streams(split_stream(s)) == s`.

    Raises `InvalidArgument` where the parts do not belong together.
    """
    if not parts:
        raise InvalidArgument("there are no streams to join")
    streams = [parse_stream(part) for part in parts]
    first = streams[0]
    chunks: list[Chunk] = []
    entries: list[Section] = []
    stored: list[bytes] = []
    for index, stream in enumerate(streams):
        if stream.header != first.header or _allocation_bytes(stream) != _allocation_bytes(first):
            raise InvalidArgument(
                f"stream {index} was not made by the encoding of stream 0: their headers or allocations differ"
            )
        for section in stream.sections:
            if section.chunk != STREAM_WIDE or index == 0:
                chunk = section.chunk if section.chunk == STREAM_WIDE else section.chunk + len(chunks)
                entries.append(replace(section, chunk=chunk))
                stored.append(bytes(stream.data[section.offset : section.offset + section.stored_bytes]))
        chunks += stream.chunks
    try:
        _check_order(chunks, first.header)
    except CorruptStream as error:
        raise InvalidArgument(f"the streams do not follow one another: {error}") from error
    return _assemble(first.header, chunks, entries, stored)


def _assemble(header: Header, chunks: Sequence[Chunk], entries: Sequence[Section], stored: Sequence[bytes]) -> bytes:
    flags = header.has_digests * _HAS_DIGESTS + header.is_transformers * _IS_TRANSFORMERS + header.has_gaps * _HAS_GAPS
    head = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        PROFILES[header.profile],
        DTYPES[header.dtype],
        flags,
        header.fingerprint,
        header.first_layer,
        header.n_layers,
        header.first_kv_head,
        header.n_kv_heads,
        header.head_dim,
        0,
        header.chunk_tokens,
        header.rope_length,
        len(chunks),
        len(entries),
        0,
    )[:-4]
    tables = b"".join(_pack_chunk(chunk) for chunk in chunks)
    tables += b"".join(
        _SECTION.pack(e.type, CODER_IDS[e.coder], 0, e.chunk, e.raw_bytes, e.stored_bytes, e.checksum) for e in entries
    )
    checksum = zlib.crc32(tables, zlib.crc32(head))
    return b"".join([head, struct.pack("<I", checksum), tables, *stored])


def _pack_chunk(chunk: Chunk) -> bytes:
    flags = chunk.explicit_positions * _EXPLICIT_POSITIONS + chunk.fp8_sinks * _FP8_SINKS
    return _CHUNK.pack(chunk.first_position, chunk.n_sink, chunk.n_body, chunk.n_window, flags, chunk.token_digest)


def _parse_chunk(view: memoryview, offset: int, index: int, header: Header) -> Chunk:
    first_position, n_sink, n_body, n_window, flags, digest = _CHUNK.unpack_from(view, offset)
    n_tokens = n_sink + n_body + n_window
    room = min(header.chunk_tokens - first_position % header.chunk_tokens, MAX_POSITION - first_position)
    if flags > 3 or not 1 <= n_tokens <= room or (not header.has_digests and any(digest)):
        raise CorruptStream(
            f"chunk {index} claims {n_tokens} tokens from position {first_position} (flags {flags}); 1 .. {room} fit its cell"
        )
    return Chunk(
        first_position, n_sink, n_body, n_window, bool(flags & _EXPLICIT_POSITIONS), bool(flags & _FP8_SINKS), digest
    )


def _check_order(chunks: Sequence[Chunk], header: Header) -> None:
    """Cells ascend, without gaps chunks adjoin, and the regions follow one another: sinks first, then body, then window."""
    size, region = header.chunk_tokens, 0
    for index, chunk in enumerate(chunks):
        if index:
            before = chunks[index - 1]
            adjoins = chunk.first_position == before.first_position + before.n_tokens
            if chunk.first_position // size <= before.first_position // size or not (adjoins or header.has_gaps):
                raise CorruptStream(
                    f"chunk {index} at position {chunk.first_position} does not follow the chunk before it, "
                    f"{before.n_tokens} tokens from position {before.first_position}"
                )
        if chunk.explicit_positions and not header.has_gaps:
            raise CorruptStream(f"chunk {index} lists its positions in a stream without gaps")
        for number, count in enumerate((chunk.n_sink, chunk.n_body, chunk.n_window)):
            if count and number < region:
                raise CorruptStream(f"chunk {index} holds an earlier region than the chunks before it")
            region = max(region, number) if count else region


def _parse_sections(
    view: memoryview, offset: int, count: int, data_start: int, chunks: Sequence[Chunk]
) -> tuple[Section, ...]:
    wanted = [(SectionType.ALLOCATION, STREAM_WIDE)]
    wanted += [(section, index) for index, chunk in enumerate(chunks) for section in chunk.sections()]
    if len(wanted) != count:
        raise CorruptStream(f"the chunks need {len(wanted)} sections; {count} are in the table")
    sections, start = [], data_start
    for number, (section_type, chunk) in enumerate(wanted):
        kind, coder, reserved, owner, raw, stored, checksum = _SECTION.unpack_from(
            view, offset + number * SECTION_BYTES
        )
        if (kind, owner) != (section_type, chunk) or coder not in CODER_NAMES or reserved:
            raise CorruptStream(
                f"section {number} is type {kind} of chunk {owner} (coder {coder}); expected {section_type.name} of chunk {chunk}"
            )
        sections.append(Section(section_type, CODER_NAMES[coder], chunk, raw, stored, checksum, start))
        start += stored
    if len(view) < start:
        raise TruncatedStream(f"the tables describe {start} bytes; only {len(view)} bytes are here")
    if len(view) > start:
        raise CorruptStream(f"{len(view) - start} bytes follow the last section")
    return tuple(sections)


def _allocation_bytes(stream: Stream) -> bytes:
    return b"".join(
        bytes(stream.data[s.offset : s.offset + s.stored_bytes]) for s in stream.sections if s.chunk == STREAM_WIDE
    )
