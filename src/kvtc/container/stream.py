"""The stream: its writer and its parser.

The parser trusts nothing. It reads lengths, checks them against caps and against each other, and only then looks at
sections; the last section ends exactly where the stream ends. No length in a stream allocates memory by itself:
parsing takes time and memory by the bytes that are there (docs/format.md, "Bounds").
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..coding.exact.channels import LEAST_TOKENS, compress_channels, decompress_channels
from ..coding.exact.floats import FloatLayout, compress_floats, decompress_floats
from ..coding.exact.tokens import exact_layout
from ..coding.lossless import (
    CHANNELS,
    FLOATS,
    PROFILE,
    ROUNDED,
    BlockCoder,
    compress,
    compress_all,
    decompress,
    decompress_all,
)
from ..coding.states.rounding import compress_state, decompress_state
from ..errors import CorruptStream, InvalidArgument
from ..process.log_limits import log_once
from ..process.workers import side_by_side
from .groups import pack_groups
from .stream_data import StreamData, open_data
from .tables import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    HEADER_BYTES,
    MAX_CHUNKS,
    SECTION_BYTES,
    STREAM_WIDE,
    Chunk,
    ChunkTable,
    Counts,
    Header,
    Section,
    SectionTable,
    SectionType,
    pack_chunk,
    pack_header,
    pack_section,
    parse_chunks,
    parse_header,
    parse_sections,
)

logger = logging.getLogger(__name__)

_OF_NUMBERS = {FLOATS: decompress_floats, ROUNDED: decompress_state, CHANNELS: decompress_channels}
"""Coders of numbers, which need their layout."""

Wanted = tuple[SectionType, int, int | None]
"""A section that is to be read: type, chunk, and how many bytes it must hold; None for a final one, whose length is its own."""

_WORTH_THREADS = 1 << 20
"""Stored bytes from which checksums and lossless coders are worth starting threads for; they release the interpreter lock."""


@dataclass(frozen=True)
class Payload:
    """Section bytes before lossless coding, on their way into a stream.

    is_final: they are entropy-coded already. layout: of exact tokens, which have a coder of their own; None: others.
    rounded_bits: of a number of a state that is rounded, 0: others. raw_bytes: of rows that a profile coded, of another group than
    the first, before that; None: of all else.
    """

    type: SectionType
    chunk: int
    raw: bytes
    is_final: bool = False
    layout: FloatLayout | None = None
    group: int = 0
    rounded_bits: int = 0
    raw_bytes: int | None = None


@dataclass(frozen=True)
class CodedSection:
    """A section as it is stored, and its entry of the table (whose offset counts for nothing yet)."""

    entry: Section
    stored: bytes

    @property
    def n_bytes(self) -> int:
        """What it costs, the entry included."""
        return len(self.stored) + SECTION_BYTES


@dataclass(frozen=True)
class Stream:
    """A parsed stream: tables checked, sections not yet read. data: its bytes, which may lie on a device."""

    header: Header
    chunks: ChunkTable
    sections: SectionTable
    data: StreamData

    @property
    def n_bytes(self) -> int:
        return self.data.n_bytes

    @property
    def n_tokens(self) -> int:
        return sum(self.chunks.region_tokens())

    def find(self, section_type: SectionType, chunk: int = STREAM_WIDE) -> Section:
        """The section of a type and chunk; the parser guarantees those that `Chunk.sections` names."""
        return self.sections.find(section_type, chunk)

    def stored(self, section: Section) -> memoryview:
        """The bytes of a section as they are stored."""
        return self.data.on_host([section.span])[0]

    def read(self, section_type: SectionType, chunk: int, raw_bytes: int | None) -> bytes:
        """Verify and decode a section that must hold `raw_bytes` bytes; None for a final one, whose length is its own."""
        return self.read_all([(section_type, chunk, raw_bytes)])[0]

    def read_all(self, wanted: Sequence[Wanted], block_coder: BlockCoder | None = None) -> list[bytes]:
        """`read` of several sections. Side by side where they are large.

        block_coder: decodes the blocks of all of them at once, where it takes them. What it refuses is read without it, which
        also says what is wrong with a section.
        """
        sections = [self._checked(*one) for one in wanted]
        stored = self.data.on_host([section.span for section in sections])
        read = {} if block_coder is None else _decoded_with(block_coder, sections, stored)
        left = [index for index in range(len(sections)) if index not in read]
        its_sections, its_bytes = [sections[index] for index in left], [stored[index] for index in left]
        layouts = [self._layout(section.type, section.chunk) for section in its_sections]
        if sum(map(len, its_bytes)) < _WORTH_THREADS:
            rest = list(map(_decoded, its_sections, its_bytes, layouts))
        else:
            rest = side_by_side(_decoded, _threads(), its_sections, its_bytes, layouts)
        read |= zip(left, rest, strict=True)
        return [read[index] for index in range(len(sections))]

    def read_group(self, index: int, first_chunk: int, stop_chunk: int) -> list[tuple[Section, bytes]]:
        """The sections of another group in the chunks first_chunk .. stop_chunk - 1, in order, verified and decoded.

        What a profile coded stays as it is.
        """
        group = self.header.groups[index]
        sections = [self.sections[number] for number in self.sections.of_group(index, stop_chunk).tolist()]
        sections = [section for section in sections if section.chunk >= first_chunk]
        stored = self.data.on_host([section.span for section in sections])
        layouts = [group.layout(section.raw_bytes // group.row_bytes) for section in sections]
        return list(zip(sections, side_by_side(_decoded, _threads(), sections, stored, layouts), strict=True))

    def leave(self, wanted: Sequence[Wanted]) -> dict[tuple[SectionType, int], Tensor]:
        """Those of the sections that can be used where they lie: on a device, and without a lossless coder.

        Their checksums are not verified there: that was done, if at all, before the stream came to the device.
        """
        if (whole := self.data.whole) is None:
            return {}
        sections = [self._checked(*one) for one in wanted]
        return {(section.type, section.chunk): whole[section.span] for section in sections if section.coder == "none"}

    def verify(self) -> None:
        """Raise `CorruptStream` unless every section has the bytes that its checksum was made of."""
        offsets = self.sections.offsets.tolist()
        for number, (span, checksum) in enumerate(
            zip(map(slice, offsets, offsets[1:]), self.sections.entries["checksum"].tolist(), strict=False)
        ):
            if zlib.crc32(self.data.on_host([span])[0]) != checksum:
                raise CorruptStream(f"{self.sections[number].describe()} fails its checksum")

    def _checked(self, section_type: SectionType, chunk: int, raw_bytes: int | None) -> Section:
        """A section whose entry says what it must."""
        section = self.find(section_type, chunk)
        if raw_bytes is None and (section.coder != "none" or section.raw_bytes != section.stored_bytes):
            raise CorruptStream(
                f"{section.describe()} is coded twice (coder {section.coder}); it must be stored as it is"
            )
        if raw_bytes is not None and section.raw_bytes != raw_bytes:
            raise CorruptStream(f"{section.describe()} claims {section.raw_bytes} bytes; its tokens need {raw_bytes}")
        if section.coder in _OF_NUMBERS and self._layout(section_type, chunk) is None:
            raise CorruptStream(f"{section.describe()} holds no exact tokens, but has their coder")
        if section.coder == "none" and section.raw_bytes != section.stored_bytes:
            raise CorruptStream(
                f"{section.describe()}: {section.raw_bytes} bytes expected, {section.stored_bytes} stored without a coder"
            )
        return section

    def _layout(self, section_type: SectionType, chunk: int) -> FloatLayout | None:
        """How the exact tokens of a section are ordered; None where it holds none."""
        n_exact = 0 if chunk == STREAM_WIDE else self.chunks[chunk].exact_tokens(section_type, self.header.profile)
        return exact_layout(n_exact, self.header.dims, self.header.dtype) if n_exact else None


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _decoded_with(
    block_coder: BlockCoder, sections: Sequence[Section], stored: Sequence[memoryview]
) -> dict[int, bytes]:
    """What a block coder decodes of sections, by their index; their checksums are verified first."""
    read: dict[int, bytes] = {}
    for coder in sorted({section.coder for section in sections} - {"none"}):
        mine = [index for index, section in enumerate(sections) if section.coder == coder]
        sizes = [sections[index].raw_bytes for index in mine]
        if not block_coder.reads(coder, sum(sizes)):
            continue
        for index in mine:
            _verify(sections[index], stored[index])
        coded = [(stored[index], size) for index, size in zip(mine, sizes, strict=True)]
        try:
            read |= zip(mine, decompress_all(coded, coder, block_coder), strict=True)
        except CorruptStream as refusal:
            log_once(logger, "no device", "%d sections are read without a device: %s", len(mine), refusal)
    return read


def _decoded(section: Section, stored: memoryview, layout: FloatLayout | None) -> bytes:
    """The bytes behind a section's own, verified. layout: of exact tokens."""
    _verify(section, stored)
    if section.coder == PROFILE:
        return bytes(stored)
    try:
        if layout is not None and section.coder in _OF_NUMBERS:
            return _OF_NUMBERS[section.coder](stored, section.raw_bytes, layout)
        return decompress(stored, section.raw_bytes, section.coder)
    except CorruptStream as error:
        raise CorruptStream(f"{section.describe()}: {error}") from error


def _verify(section: Section, stored: memoryview) -> None:
    if zlib.crc32(stored) != section.checksum:
        raise CorruptStream(f"{section.describe()} fails its checksum")


def token_digest(token_ids: npt.NDArray[np.int64]) -> bytes:
    """Names the token ids of a chunk: first 8 bytes of the SHA-256 of them as little-endian int64."""
    return hashlib.sha256(token_ids.astype("<i8").tobytes()).digest()[:DIGEST_BYTES]


def code_payloads(payloads: Sequence[Payload], coder: str, block_coder: BlockCoder | None = None) -> list[CodedSection]:
    """Each payload as it will be stored; one that coding would lengthen is stored as it is.

    coder: of all but exact tokens and rounded states, which have their own; "none" leaves exact tokens as they are, too.
    block_coder: codes the blocks of all of them at once, where it takes them. Raises `InvalidCache` for a state that cannot be
    rounded.
    """
    for payload in payloads:
        if max(len(payload.raw), payload.raw_bytes or 0) >= 1 << 32:
            raise InvalidArgument(
                f"a section of {len(payload.raw)} bytes; 4 GiB is the limit: use a smaller chunk_tokens"
            )
    coders = [_coder_of(payload, coder) for payload in payloads]
    own = [(payload, its) for payload, its in zip(payloads, coders, strict=True) if its in _OF_NUMBERS]
    others = [payload.raw for payload, its in zip(payloads, coders, strict=True) if its == coder]
    coded_others = iter(_compressed(others, coder, block_coder))
    coded_own = iter(side_by_side(_compressed_numbers, _threads(), own))
    sections = []
    for payload, its in zip(payloads, coders, strict=True):
        data = next(coded_others) if its == coder else payload.raw if its == "none" else next(coded_own)
        is_shorter = len(data) < len(payload.raw)
        stored, used = (data, its) if is_shorter else (payload.raw, "none")
        n_raw = len(payload.raw)
        if payload.raw_bytes is not None:
            used, n_raw = PROFILE, payload.raw_bytes
        entry = Section(payload.type, used, payload.chunk, n_raw, len(stored), zlib.crc32(stored), 0, payload.group)
        sections.append(CodedSection(entry, stored))
    return sections


def _coder_of(payload: Payload, coder: str) -> str:
    if payload.rounded_bits:
        return ROUNDED
    if payload.is_final or coder == "none":
        return "none"
    if payload.layout is None:
        return coder
    return CHANNELS if payload.layout.n_tokens >= LEAST_TOKENS else FLOATS


def _compressed_numbers(one: tuple[Payload, str]) -> bytes:
    """With the coder of numbers of that name."""
    payload, coder = one
    if payload.layout is None:
        return payload.raw
    if coder == ROUNDED:
        return compress_state(payload.raw, payload.layout, payload.rounded_bits)
    return (compress_channels if coder == CHANNELS else compress_floats)(payload.raw, payload.layout)


def _compressed(parts: Sequence[bytes], coder: str, block_coder: BlockCoder | None) -> list[bytes]:
    if block_coder is not None and block_coder.writes(coder, sum(map(len, parts))):
        return compress_all(parts, coder, block_coder)
    # The coders release the interpreter lock: sections are coded side by side.
    return side_by_side(lambda part: compress(part, coder), _threads(), parts)


def write_stream(header: Header, chunks: Sequence[Chunk], sections: Sequence[CodedSection]) -> bytes:
    """Put a stream together.

    Parameters:
        header: of the whole stream; `has_gaps` is set here, from the chunks.
        chunks: by ascending positions.
        sections: the rate, and then the sections of each chunk, in the order of `Chunk.sections` and, among them, of the groups.

    Raises:
        InvalidArgument: for more chunks than a stream may hold.
    """
    has_gaps = any(chunk.explicit_positions for chunk in chunks) or any(
        after.first_position != before.first_position + before.n_tokens for before, after in pairwise(chunks)
    )
    tables = b"".join(map(pack_chunk, chunks)), b"".join(pack_section(section.entry) for section in sections)
    return assemble(
        replace(header, has_gaps=has_gaps),
        pack_groups(header.groups),
        *tables,
        [section.stored for section in sections],
    )


def parse_stream(data: bytes | bytearray | memoryview | Tensor) -> Stream:
    """Read and check the tables of a stream.

    Parameters:
        data: bytes, or uint8 [bytes] on a device, where sections then stay until they are read.

    Raises:
        TruncatedStream: if bytes are missing at the end.
        CorruptStream: if the tables break a rule of the format or fail their checksum.
        UnsupportedVersion: for another format version, or groups of layers that this kvtc does not read.
        InvalidArgument: if data is of another type.
    """
    opened, counts = open_data(data)
    view = opened.head
    header, chunks = parse_tables(view, counts)
    return Stream(header, chunks, parse_sections(view, counts, header, chunks, opened.n_bytes), opened)


def parse_tables(view: memoryview, counts: Counts) -> tuple[Header, ChunkTable]:
    """Header and chunks, from the first bytes of a stream, all tables among them; errors as of `parse_stream`."""
    if zlib.crc32(view[HEADER_BYTES : counts.tables_end], zlib.crc32(view[: HEADER_BYTES - 4])) != counts.checksum:
        raise CorruptStream("header and tables fail their checksum")
    header = parse_header(view, counts)
    return header, parse_chunks(view, counts, header)


def assemble(
    header: Header, groups: bytes, chunks: bytes, sections: bytes, stored: Iterable[bytes | memoryview]
) -> bytes:
    """Header, the bytes of the three tables, and the stored bytes of the sections in the order of their table."""
    n_chunks, n_sections = len(chunks) // CHUNK_BYTES, len(sections) // SECTION_BYTES
    if n_chunks > MAX_CHUNKS:
        raise InvalidArgument(f"{n_chunks} chunks; a stream holds {MAX_CHUNKS} at most: use a larger chunk_tokens")
    head = pack_header(header, n_chunks, n_sections)
    checksum = zlib.crc32(sections, zlib.crc32(chunks, zlib.crc32(groups, zlib.crc32(head))))
    return b"".join([head, struct.pack("<I", checksum), groups, chunks, sections, *stored])
