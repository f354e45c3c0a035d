"""The stream: writer and parser, side by side.

The parser trusts nothing: it reads lengths, checks them against caps and against each other, and only then looks at sections;
the last section ends exactly where the stream ends. No length in a stream allocates memory by itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..coding.lossless import BlockCoder, compress, compress_all, decompress, decompress_all
from ..errors import CorruptStream, InvalidArgument
from .tables import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    HEADER_BYTES,
    SECTION_BYTES,
    STREAM_WIDE,
    Chunk,
    Header,
    Section,
    SectionType,
    check_order,
    pack_chunk,
    pack_header,
    pack_section,
    parse_chunk,
    parse_counts,
    parse_header,
    parse_sections,
)

logger = logging.getLogger(__name__)

_WORTH_THREADS = 1 << 20
"""Stored bytes from which checksums and lossless coders are worth starting threads for; they release the interpreter lock."""


@dataclass(frozen=True)
class Payload:
    """Section bytes before lossless coding, on their way into a stream; is_final: they are entropy-coded already."""

    type: SectionType
    chunk: int
    raw: bytes
    is_final: bool = False


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

    def read(self, section_type: SectionType, chunk: int, raw_bytes: int | None) -> bytes:
        """Verify and decode a section that must hold `raw_bytes` bytes; None for a final one, whose length is its own."""
        stored = self._stored(section_type, chunk, raw_bytes)
        section = self.find(section_type, chunk)
        try:
            return decompress(stored, section.raw_bytes, section.coder)
        except CorruptStream as error:
            raise CorruptStream(f"{_name(section_type, chunk)}: {error}") from error

    def _stored(self, section_type: SectionType, chunk: int, raw_bytes: int | None) -> memoryview:
        """A section as it is stored, its claims and its checksum verified."""
        section, where = self.find(section_type, chunk), _name(section_type, chunk)
        if raw_bytes is None and (section.coder != "none" or section.raw_bytes != section.stored_bytes):
            raise CorruptStream(f"{where} is coded twice (coder {section.coder}); it must be stored as it is")
        if raw_bytes is not None and section.raw_bytes != raw_bytes:
            raise CorruptStream(f"{where} claims {section.raw_bytes} bytes; its tokens need {raw_bytes}")
        stored = self.data[section.offset : section.offset + section.stored_bytes]
        if zlib.crc32(stored) != section.checksum:
            raise CorruptStream(f"{where} fails its checksum")
        return stored

    def read_all(
        self, wanted: Sequence[tuple[SectionType, int, int | None]], block_coder: BlockCoder | None = None
    ) -> list[bytes]:
        """`read` of several sections: type, chunk and raw bytes of each. Side by side where they are large.

        block_coder: decodes the blocks of all of them at once, where it takes them. What it refuses is read without it, which
        also says what is wrong with a section.
        """
        ahead = {} if block_coder is None else self._read_with(block_coder, wanted)
        left = [one for one in wanted if one[:2] not in ahead]
        if sum(self.find(kind, chunk).stored_bytes for kind, chunk, _ in left) < _WORTH_THREADS:
            read = [self.read(*one) for one in left]
        else:
            with ThreadPoolExecutor(max_workers=_threads()) as pool:
                read = list(pool.map(lambda one: self.read(*one), left))
        ahead |= zip([one[:2] for one in left], read, strict=True)
        return [ahead[one[:2]] for one in wanted]

    def _read_with(
        self, block_coder: BlockCoder, wanted: Sequence[tuple[SectionType, int, int | None]]
    ) -> dict[tuple[SectionType, int], bytes]:
        """Those sections that a block coder decodes, by type and chunk."""
        read: dict[tuple[SectionType, int], bytes] = {}
        for coder in sorted({self.find(*one[:2]).coder for one in wanted} - {"none"}):
            mine = [one for one in wanted if self.find(*one[:2]).coder == coder]
            sizes = [self.find(*one[:2]).raw_bytes for one in mine]
            if not block_coder.reads(coder, sum(sizes)):
                continue
            stored = [self._stored(*one) for one in mine]
            try:
                decoded = decompress_all(list(zip(stored, sizes, strict=True)), coder, block_coder)
            except CorruptStream as refusal:
                logger.warning("%d sections are read without a device: %s", len(mine), refusal)
                continue
            read |= zip([one[:2] for one in mine], decoded, strict=True)
        return read

    @cached_property
    def _index(self) -> dict[tuple[SectionType, int], Section]:
        return {(section.type, section.chunk): section for section in self.sections}


def _name(section_type: SectionType, chunk: int) -> str:
    return f"section {section_type.name.lower()}" + ("" if chunk == STREAM_WIDE else f" of chunk {chunk}")


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def token_digest(token_ids: npt.NDArray[np.int64]) -> bytes:
    """Names the token ids of a chunk: first 8 bytes of the SHA-256 of them as little-endian int64."""
    return hashlib.sha256(token_ids.astype("<i8").tobytes()).digest()[:DIGEST_BYTES]


def code_payloads(payloads: Sequence[Payload], coder: str, block_coder: BlockCoder | None = None) -> list[CodedSection]:
    """Each payload as it will be stored; one that coding would lengthen is stored as it is.

    block_coder: codes the blocks of all of them at once, where it takes them.
    """
    for payload in payloads:
        if len(payload.raw) >= 1 << 32:
            raise InvalidArgument(
                f"a section of {len(payload.raw)} bytes; 4 GiB is the limit: use a smaller chunk_tokens"
            )
    coded = iter(_compressed([payload.raw for payload in payloads if not payload.is_final], coder, block_coder))
    sections = []
    for payload in payloads:
        data = payload.raw if payload.is_final else next(coded)
        is_shorter = len(data) < len(payload.raw)
        stored, used = (data, coder) if is_shorter else (payload.raw, "none")
        entry = Section(payload.type, used, payload.chunk, len(payload.raw), len(stored), zlib.crc32(stored), 0)
        sections.append(CodedSection(entry, stored))
    return sections


def _compressed(parts: Sequence[bytes], coder: str, block_coder: BlockCoder | None) -> list[bytes]:
    if block_coder is not None and block_coder.writes(coder, sum(map(len, parts))):
        return compress_all(parts, coder, block_coder)
    # The coders release the interpreter lock: sections are coded side by side.
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        return list(pool.map(lambda part: compress(part, coder), parts))


def write_stream(header: Header, chunks: Sequence[Chunk], sections: Sequence[CodedSection]) -> bytes:
    """Put a stream together from its sections, in the order of the format."""
    has_gaps = any(chunk.explicit_positions for chunk in chunks) or any(
        after.first_position != before.first_position + before.n_tokens for before, after in pairwise(chunks)
    )
    entries, stored = [section.entry for section in sections], [section.stored for section in sections]
    return assemble(replace(header, has_gaps=has_gaps), chunks, entries, stored)


def parse_stream(data: bytes | bytearray | memoryview) -> Stream:
    """Read and check the tables of a stream. Raises `TruncatedStream`, `CorruptStream` or `UnsupportedVersion`."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidArgument(f"a stream is bytes; got {type(data).__name__}")
    view = memoryview(data).cast("B")
    counts = parse_counts(view)
    if zlib.crc32(view[HEADER_BYTES : counts.tables_end], zlib.crc32(view[: HEADER_BYTES - 4])) != counts.checksum:
        raise CorruptStream("header and tables fail their checksum")
    header = parse_header(view)
    starts = range(HEADER_BYTES, counts.chunks_end, CHUNK_BYTES)
    chunks = tuple(parse_chunk(view, offset, index, header) for index, offset in enumerate(starts))
    check_order(chunks, header)
    sections = parse_sections(view, counts.chunks_end, counts.n_sections, counts.tables_end, chunks)
    return Stream(header, chunks, sections, view)


def assemble(header: Header, chunks: Sequence[Chunk], entries: Sequence[Section], stored: Sequence[bytes]) -> bytes:
    """Header, tables and the stored bytes of the sections, in the order of `entries`."""
    head = pack_header(header, len(chunks), len(entries))
    tables = b"".join([*map(pack_chunk, chunks), *map(pack_section, entries)])
    checksum = zlib.crc32(tables, zlib.crc32(head))
    return b"".join([head, struct.pack("<I", checksum), tables, *stored])
