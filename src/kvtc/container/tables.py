"""The tables of a stream: header, chunk table, section table; how each is written and what each may say.

docs/format.md is the specification. Nothing here looks into a section.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from ..coding.lossless import CODER_IDS, CODER_NAMES
from ..errors import CorruptStream, TruncatedStream, UnsupportedVersion

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

PROFILES = {"paper": 1, "joint": 2, "conditional": 3}
PROFILE_NAMES = {number: name for name, number in PROFILES.items()}
DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
DTYPE_OF = {number: dtype for dtype, number in DTYPES.items()}

_HAS_DIGESTS, _IS_TRANSFORMERS, _HAS_GAPS = 1, 2, 4
_EXPLICIT_POSITIONS, _FP8_SINKS, _PADDED, _CODED_WINDOW = 1, 2, 4, 8
SECTIONS_OF_A_CHUNK = 5


class SectionType(IntEnum):
    """What a section holds; sections of a chunk stand in this order, the rate (how bits are spent) first of all."""

    RATE = 1
    POSITIONS = 2
    SINK = 3
    BODY = 4
    WINDOW = 5
    PADDING = 6


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
    is_padded: bool = False
    coded_window: bool = False

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
            SectionType.PADDING: self.is_padded,
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

    @property
    def span(self) -> slice:
        """Where it stands in the stream."""
        return slice(self.offset, self.offset + self.stored_bytes)

    def describe(self) -> str:
        """Which one it is, for messages."""
        return f"section {self.type.name.lower()}" + ("" if self.chunk == STREAM_WIDE else f" of chunk {self.chunk}")


@dataclass(frozen=True)
class Counts:
    """What the header says of the tables behind it: entries, and the checksum over header and tables."""

    n_chunks: int
    n_sections: int
    checksum: int

    @property
    def chunks_end(self) -> int:
        """Offset of the section table."""
        return HEADER_BYTES + self.n_chunks * CHUNK_BYTES

    @property
    def tables_end(self) -> int:
        """Offset of the first section."""
        return self.chunks_end + self.n_sections * SECTION_BYTES


def pack_header(header: Header, n_chunks: int, n_sections: int) -> bytes:
    """The header without its last field, the checksum."""
    flags = header.has_digests * _HAS_DIGESTS + header.is_transformers * _IS_TRANSFORMERS + header.has_gaps * _HAS_GAPS
    return _HEADER.pack(
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
        n_chunks,
        n_sections,
        0,
    )[:-4]


def parse_counts(view: memoryview, n_bytes: int) -> Counts:
    """Check magic, version and the size of the tables, before anything of them is believed.

    view: the header at least, of a stream of n_bytes bytes.
    """
    if len(view) < HEADER_BYTES:
        if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)]:
            raise CorruptStream("this is not a kvtc stream: it does not begin with KVTC")
        raise TruncatedStream(f"a stream has a header of {HEADER_BYTES} bytes; only {len(view)} bytes are here")
    fields = _HEADER.unpack_from(view)
    magic, version = fields[:2]
    n_chunks, n_sections, checksum = fields[14:]
    if magic != MAGIC:
        raise CorruptStream(f"this is not a kvtc stream: it begins with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(
            f"the stream has format version {version}; this kvtc reads version {FORMAT_VERSION}: upgrade kvtc"
        )
    if n_chunks > MAX_CHUNKS or n_sections > SECTIONS_OF_A_CHUNK * n_chunks + 1:
        raise CorruptStream(
            f"{n_chunks} chunks and {n_sections} sections are claimed; at most {MAX_CHUNKS} and {SECTIONS_OF_A_CHUNK} "
            "a chunk are possible"
        )
    counts = Counts(n_chunks, n_sections, checksum)
    if n_bytes < counts.tables_end:
        raise TruncatedStream(f"header and tables take {counts.tables_end} bytes; only {n_bytes} bytes are here")
    return counts


def parse_header(view: memoryview) -> Header:
    """The header of a stream whose checksum holds."""
    fields = _HEADER.unpack_from(view)
    profile, dtype, flags, fingerprint = fields[2:6]
    first_layer, n_layers, first_kv_head, n_kv_heads, head_dim, reserved = fields[6:12]
    chunk_tokens, rope_length = fields[12:14]
    if profile not in PROFILE_NAMES or dtype not in DTYPE_OF or flags > 7 or reserved:
        raise CorruptStream(
            f"profile {profile}, dtype {dtype}, flags {flags}, reserved {reserved}: some value is unknown"
        )
    if not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS or 0 in (n_layers, n_kv_heads, head_dim) or rope_length > MAX_POSITION:
        raise CorruptStream(
            f"{n_layers} layers, {n_kv_heads} kv heads, head_dim {head_dim}, chunks of {chunk_tokens} tokens, "
            f"rope_length {rope_length}: some value is out of range"
        )
    return Header(
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


def pack_chunk(chunk: Chunk) -> bytes:
    flags = (
        chunk.explicit_positions * _EXPLICIT_POSITIONS
        + chunk.fp8_sinks * _FP8_SINKS
        + chunk.is_padded * _PADDED
        + chunk.coded_window * _CODED_WINDOW
    )
    return _CHUNK.pack(chunk.first_position, chunk.n_sink, chunk.n_body, chunk.n_window, flags, chunk.token_digest)


def pack_section(section: Section) -> bytes:
    """One entry of the section table."""
    coder = CODER_IDS[section.coder]
    return _SECTION.pack(
        section.type, coder, 0, section.chunk, section.raw_bytes, section.stored_bytes, section.checksum
    )


def table_bytes(chunks: Sequence[Chunk]) -> int:
    """Bytes of header, chunk table and section table."""
    n_sections = 1 + sum(len(chunk.sections()) for chunk in chunks)
    return HEADER_BYTES + CHUNK_BYTES * len(chunks) + SECTION_BYTES * n_sections


def parse_chunk(view: memoryview, offset: int, index: int, header: Header) -> Chunk:
    first_position, n_sink, n_body, n_window, flags, digest = _CHUNK.unpack_from(view, offset)
    n_tokens = n_sink + n_body + n_window
    room = min(header.chunk_tokens - first_position % header.chunk_tokens, MAX_POSITION - first_position)
    if flags > 15 or not 1 <= n_tokens <= room or (not header.has_digests and any(digest)):
        raise CorruptStream(
            f"chunk {index} claims {n_tokens} tokens from position {first_position} (flags {flags}); 1 .. {room} fit its cell"
        )
    return Chunk(
        first_position,
        n_sink,
        n_body,
        n_window,
        bool(flags & _EXPLICIT_POSITIONS),
        bool(flags & _FP8_SINKS),
        digest,
        bool(flags & _PADDED),
        bool(flags & _CODED_WINDOW),
    )


def check_order(chunks: Sequence[Chunk], header: Header) -> None:
    """Cells ascend, without gaps chunks adjoin, and the regions follow one another: sinks first, then body, then window."""
    size, region = header.chunk_tokens, 0
    formats = {chunk.coded_window for chunk in chunks if chunk.n_window}
    if len(formats) > 1 or (True in formats and header.profile == "paper"):
        raise CorruptStream(f"windows of the profile {header.profile} are coded in some chunks: expected all or none")
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


def parse_sections(view: memoryview, counts: Counts, chunks: Sequence[Chunk], n_bytes: int) -> tuple[Section, ...]:
    """The section table in view, of a stream of n_bytes bytes."""
    wanted = [(SectionType.RATE, STREAM_WIDE)]
    wanted += [(section, index) for index, chunk in enumerate(chunks) for section in chunk.sections()]
    if len(wanted) != counts.n_sections:
        raise CorruptStream(f"the chunks need {len(wanted)} sections; {counts.n_sections} are in the table")
    sections, start = [], counts.tables_end
    for number, (section_type, chunk) in enumerate(wanted):
        kind, coder, reserved, owner, raw, stored, checksum = _SECTION.unpack_from(
            view, counts.chunks_end + number * SECTION_BYTES
        )
        if (kind, owner) != (section_type, chunk) or coder not in CODER_NAMES or reserved:
            raise CorruptStream(
                f"section {number} is type {kind} of chunk {owner} (coder {coder}); expected {section_type.name} of chunk {chunk}"
            )
        sections.append(Section(section_type, CODER_NAMES[coder], chunk, raw, stored, checksum, start))
        start += stored
    if n_bytes < start:
        raise TruncatedStream(f"the tables describe {start} bytes; only {n_bytes} bytes are here")
    if n_bytes > start:
        raise CorruptStream(f"{n_bytes - start} bytes follow the last section")
    return tuple(sections)
