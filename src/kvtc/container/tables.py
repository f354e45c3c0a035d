"""The tables of a stream (header, groups, chunks, sections): how each is written, and which values it may have.

docs/format.md is the specification. Nothing here looks into a section. The chunk table and the section table are
checked as arrays over their bytes, all entries at once. An entry becomes an object when it is looked at, so a table
of a million entries costs little more than its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from ..coding.lossless import CODER_NAMES, LOSSLESS_NUMBERS, PROFILE, ROUNDED
from ..errors import CorruptStream, InvalidArgument, TruncatedStream, UnsupportedVersion
from ..layer_runs import layer_runs
from .groups import GROUP_BYTES, MAX_LENGTH, RUN_BYTES, WINDOW, Group, count_runs, parse_groups

MAGIC = b"KVTC"
FORMAT_VERSION = 3
MAX_CHUNKS = 1 << 20
MAX_CHUNK_TOKENS = 1 << 15
MAX_POSITION = MAX_LENGTH
DIGEST_BYTES = 8
STREAM_WIDE = 0xFFFFFFFF

_HEADER = struct.Struct("<4sBBBB16sIIII")
_CHUNK = struct.Struct("<IHHHH8s")
_SECTION = struct.Struct("<BBHIIII")
HEADER_BYTES, CHUNK_BYTES, SECTION_BYTES = _HEADER.size, _CHUNK.size, _SECTION.size
# The same layouts for many entries at once.
_CHUNKS = np.dtype(
    [("position", "<u4"), ("sink", "<u2"), ("body", "<u2"), ("window", "<u2"), ("flags", "<u2"), ("digest", "<u8")]
)
_SECTIONS = np.dtype(
    [
        ("type", "u1"),
        ("coder", "u1"),
        ("group", "<u2"),
        ("chunk", "<u4"),
        ("raw", "<u4"),
        ("stored", "<u4"),
        ("checksum", "<u4"),
    ]
)

JOINT = "joint"
"""The only profile that codes several groups."""
PROFILES = {"paper": 1, JOINT: 2, "conditional": 3}
"""Those that code a body; 4 is the number of lossless streams."""
LOSSLESS = "lossless"
"""What headers call a stream all of whose tokens are exact: there is no body."""
_LOSSLESS_NUMBER = 4
PROFILE_NAMES = {number: name for name, number in PROFILES.items()} | {_LOSSLESS_NUMBER: LOSSLESS}


def name_profile(name: str, number: int) -> None:
    """Let headers name another profile. Raises `InvalidArgument` unless the number is one of 1 to 255, and both are free."""
    taken = PROFILE_NAMES.get(number, name), {own: its for its, own in PROFILE_NAMES.items()}.get(name, number)
    if taken != (name, number) or not 1 <= number <= 255:
        raise InvalidArgument(
            f"the profile {name} with number {number}; expected a number of 1 to 255, and neither a name nor a number of "
            f"{', '.join(f'{own} ({its})' for its, own in sorted(PROFILE_NAMES.items()))}"
        )
    PROFILES[name], PROFILE_NAMES[number] = number, name


_CODER_NUMBERS = {name: number for number, name in CODER_NAMES.items()}

_HAS_DIGESTS, _IS_TRANSFORMERS, _HAS_GAPS = 1, 2, 4
_EXPLICIT_POSITIONS, _FP8_SINKS, _PADDED, _CODED_WINDOW = 1, 2, 4, 8
_ALL_CHUNK_FLAGS = 15
SECTIONS_OF_A_CHUNK = 5
"""At most, but for those of other groups than the first coded one."""
SECTIONS_OF_A_GROUP = 3
"""Of a chunk, at most."""


class SectionType(IntEnum):
    """What a section holds; sections of a chunk stand in this order, the rate (how bits are spent) first of all.

    Those of other groups than the one that a profile codes, bodies and states, come before the padding.
    """

    RATE = 1
    POSITIONS = 2
    SINK = 3
    BODY = 4
    WINDOW = 5
    PADDING = 6
    STATE = 7


REGIONS = (SectionType.SINK, SectionType.BODY, SectionType.WINDOW)
_GROUP_TYPES = (*REGIONS, SectionType.STATE)
"""Of what the other groups have: an exact one a body for each chunk, or a state where it can be resumed; a coded one regions."""


@dataclass(frozen=True)
class Header:
    """What holds for the whole stream. groups: see `coded`, which has the properties that are of one group."""

    profile: str
    fingerprint: bytes
    groups: tuple[Group, ...]
    chunk_tokens: int
    has_digests: bool
    is_transformers: bool
    # Whether positions of the encoding skip any; `write_stream` sets it. Without gaps a chunk that is missing shows.
    has_gaps: bool = False

    @property
    def coded(self) -> Group | None:
        """The group that the profile codes, which is the first one where it can be: of full attention, or of latents."""
        return self.groups[0] if self.groups[0].is_codable else None

    @property
    def others(self) -> range:
        """The indexes of the other groups: further ones that the profile codes, and those that are kept exactly."""
        return range(0 if self.coded is None else 1, len(self.groups))

    @property
    def further(self) -> list[int]:
        """The indexes of the others that the profile codes."""
        return [index for index, group in enumerate(self.groups) if group.is_coded]

    @property
    def dtype(self) -> torch.dtype:
        return self.groups[0].dtype

    @property
    def layers(self) -> tuple[int, ...]:
        return self.groups[0].layers

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def first_kv_head(self) -> int:
        return self.groups[0].first_kv_head

    @property
    def n_kv_heads(self) -> int:
        return self.groups[0].shape[0]

    @property
    def dims(self) -> tuple[int, int]:
        """Features of a head's key, and of its value."""
        return self.groups[0].shape[1:]

    @property
    def rope_length(self) -> int:
        return self.groups[0].extent

    @property
    def joint_features(self) -> int:
        """P: numbers of one token, keys and values."""
        return self.groups[0].row_numbers

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

    def sections(self, has_coded: bool = True) -> list[SectionType]:
        """The sections this chunk must have, in order, but for those of exact groups. has_coded: whether a group is coded."""
        present = {
            SectionType.POSITIONS: self.explicit_positions,
            SectionType.SINK: has_coded and self.n_sink > 0,
            SectionType.BODY: has_coded and self.n_body > 0,
            SectionType.WINDOW: has_coded and self.n_window > 0,
            SectionType.PADDING: self.is_padded,
        }
        return [section for section, is_there in present.items() if is_there]

    def exact_tokens(self, kind: SectionType, profile: str) -> int:
        """Tokens that a section holds bit for bit; 0 where it holds others, or none. profile: of the stream."""
        counts = {
            SectionType.SINK: 0 if self.fp8_sinks else self.n_sink,
            SectionType.BODY: self.n_body if profile == LOSSLESS else 0,
            SectionType.WINDOW: 0 if self.coded_window else self.n_window,
        }
        return counts.get(kind, 0)


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
    group: int = 0

    @property
    def span(self) -> slice:
        """Where it stands in the stream."""
        return slice(self.offset, self.offset + self.stored_bytes)

    def describe(self) -> str:
        """Which one it is, for messages."""
        chunk = "" if self.chunk == STREAM_WIDE else f" of chunk {self.chunk}"
        return f"section {self.type.name.lower()}{chunk}" + (f" of group {self.group}" if self.group else "")


class ChunkTable:
    """The chunk table, an entry made when it is looked at. entries: its bytes as an array, checked."""

    def __init__(self, entries: npt.NDArray[np.void]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Chunk:
        position, n_sink, n_body, n_window, flags, digest = self.entries[index].item()
        return Chunk(
            position,
            n_sink,
            n_body,
            n_window,
            bool(flags & _EXPLICIT_POSITIONS),
            bool(flags & _FP8_SINKS),
            digest.to_bytes(DIGEST_BYTES, "little"),
            bool(flags & _PADDED),
            bool(flags & _CODED_WINDOW),
        )

    def region_tokens(self) -> tuple[int, int, int]:
        """Sink, body and window tokens of all chunks."""
        sink, body, window = (int(self.entries[name].sum(dtype=np.int64)) for name in ("sink", "body", "window"))
        return sink, body, window

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each chunk."""
        regions = (self.entries[name] for name in ("sink", "body", "window"))
        return sum(regions, start=np.zeros(len(self), np.int64))

    def has(self, flag: int) -> npt.NDArray[np.bool_]:
        """[n] whether a flag is set."""
        found: npt.NDArray[np.bool_] = (self.entries["flags"] & flag) != 0
        return found

    @property
    def fp8_sinks(self) -> bool:
        """Whether any sinks are fp8."""
        return bool(self.has(_FP8_SINKS).any())

    @property
    def coded_window(self) -> bool:
        """Whether any window is coded."""
        return bool(self.has(_CODED_WINDOW).any())

    def present(self, has_coded: bool) -> npt.NDArray[np.bool_]:
        """[n, 5] which sections each chunk must have, in order: positions, sink, body, window, padding.

        has_coded: whether a group is coded by the profile; the sections of the other groups are not among these.
        """
        found = np.zeros((len(self), SECTIONS_OF_A_CHUNK), np.bool_)
        found[:, 0], found[:, 4] = self.has(_EXPLICIT_POSITIONS), self.has(_PADDED)
        for column, name in enumerate(("sink", "body", "window") if has_coded else (), 1):
            found[:, column] = self.entries[name] > 0
        return found


class SectionTable:
    """The section table, an entry made when it is looked at.

    entries: its bytes as an array, checked. offsets int64 [n + 1]: where each section's bytes begin, and where the last one's end.
    firsts int64 [chunks + 1]: the number of each chunk's first section, and how many there are.
    """

    def __init__(
        self, entries: npt.NDArray[np.void], offsets: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64]
    ) -> None:
        self.entries, self.offsets, self.firsts = entries, offsets, firsts
        self._types = entries["type"].tobytes()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Section:
        kind, coder, group, chunk, raw, stored, checksum = self.entries[index].item()
        return Section(
            SectionType(kind), CODER_NAMES[coder], chunk, raw, stored, checksum, int(self.offsets[:-1][index]), group
        )

    def find(self, section_type: SectionType, chunk: int) -> Section:
        """The section of a type and chunk, of the group that is coded; ValueError where the chunk has none."""
        if chunk == STREAM_WIDE:
            return self[self._types.index(section_type)]
        return self[self._types.index(section_type, self.firsts[chunk], self.firsts[chunk + 1])]

    def of_group(self, group: int, n_chunks: int) -> npt.NDArray[np.int64]:
        """The numbers of the sections of one of the other groups in the first chunks, in order."""
        stop = int(self.firsts[n_chunks])
        is_its = (self.entries["group"][:stop] == group) & np.isin(self.entries["type"][:stop], _GROUP_TYPES)
        return np.flatnonzero(is_its).astype(np.int64)

    def stored_bytes(self, groups: Sequence[int], *types: SectionType) -> tuple[int, int]:
        """How many sections of some groups are of these types, and their stored bytes."""
        is_theirs = np.isin(self.entries["group"], groups)
        mine = [self.entries["stored"][(self.entries["type"] == kind) & is_theirs] for kind in types]
        return sum(map(len, mine)), sum(int(stored.sum(dtype=np.int64)) for stored in mine)


@dataclass(frozen=True)
class Counts:
    """What the header says of the tables behind it: entries, and the checksum over header and tables."""

    n_groups: int
    n_runs: int
    n_chunks: int
    n_sections: int
    checksum: int

    @property
    def groups_end(self) -> int:
        """Offset of the chunk table."""
        return HEADER_BYTES + self.n_groups * GROUP_BYTES + self.n_runs * RUN_BYTES

    @property
    def chunks_end(self) -> int:
        """Offset of the section table."""
        return self.groups_end + self.n_chunks * CHUNK_BYTES

    @property
    def tables_end(self) -> int:
        """Offset of the first section."""
        return self.chunks_end + self.n_sections * SECTION_BYTES


def pack_header(header: Header, n_chunks: int, n_sections: int) -> bytes:
    """The header without its last field, the checksum."""
    flags = header.has_digests * _HAS_DIGESTS + header.is_transformers * _IS_TRANSFORMERS + header.has_gaps * _HAS_GAPS
    profile = _LOSSLESS_NUMBER if header.profile == LOSSLESS else PROFILES[header.profile]
    n_groups = len(header.groups)
    fields = (
        MAGIC,
        FORMAT_VERSION,
        profile,
        flags,
        n_groups,
        header.fingerprint,
        header.chunk_tokens,
        n_chunks,
        n_sections,
    )
    return _HEADER.pack(*fields, 0)[:-4]


def parse_counts(view: memoryview, n_bytes: int) -> Counts:
    """Check magic, version and the size of the tables, before anything of them is believed.

    view: the header at least, of a stream of n_bytes bytes.
    """
    if len(view) < HEADER_BYTES:
        if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)]:
            raise CorruptStream("this is not a kvtc stream: it does not begin with KVTC")
        raise TruncatedStream(f"a stream has a header of {HEADER_BYTES} bytes; only {len(view)} bytes are here")
    magic, version, _, _, n_groups, _, _, n_chunks, n_sections, checksum = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise CorruptStream(f"this is not a kvtc stream: it begins with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        remedy = "upgrade kvtc" if version > FORMAT_VERSION else "encode the cache again"
        raise UnsupportedVersion(
            f"the stream has format version {version}; this kvtc reads version {FORMAT_VERSION}: {remedy}"
        )
    most = SECTIONS_OF_A_CHUNK + SECTIONS_OF_A_GROUP * n_groups
    if not n_groups or n_chunks > MAX_CHUNKS or n_sections > most * n_chunks + 1:
        raise CorruptStream(
            f"{n_groups} groups, {n_chunks} chunks and {n_sections} sections are claimed; expected at least one group, "
            f"at most {MAX_CHUNKS} chunks, and at most {most} sections a chunk"
        )
    if n_bytes < HEADER_BYTES + n_groups * GROUP_BYTES:
        raise TruncatedStream(f"{n_groups} groups are claimed; only {n_bytes} bytes are here")
    counts = Counts(n_groups, count_runs(view, HEADER_BYTES, n_groups), n_chunks, n_sections, checksum)
    if n_bytes < counts.tables_end:
        raise TruncatedStream(f"header and tables take {counts.tables_end} bytes; only {n_bytes} bytes are here")
    return counts


def parse_header(view: memoryview, counts: Counts) -> Header:
    """The header and the group table of a stream whose checksum holds.

    Raises `UnsupportedVersion` for groups that a later kvtc writes, `CorruptStream` for what no kvtc writes.
    """
    groups = parse_groups(view, HEADER_BYTES, counts.n_groups)
    _, _, profile, flags, _, fingerprint, chunk_tokens, *_ = _HEADER.unpack_from(view)
    if profile not in PROFILE_NAMES or flags > 7 or not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise CorruptStream(f"profile {profile}, flags {flags}, chunks of {chunk_tokens} tokens: some value is unknown")
    further = [index for index, group in enumerate(groups) if group.is_coded]
    if PROFILE_NAMES[profile] != LOSSLESS and not groups[0].is_codable and not further:
        raise CorruptStream(f"the profile is {PROFILE_NAMES[profile]}, but there is no group that it codes")
    if further and PROFILE_NAMES[profile] != JOINT:
        raise CorruptStream(f"group {further[0]} is coded beside the first, which {PROFILE_NAMES[profile]} cannot")
    if flags & _HAS_GAPS and len(groups) > 1:
        raise CorruptStream(f"positions have gaps in a stream of {len(groups)} groups; expected one group")
    if any(group.is_codable for group in groups) and not groups[0].is_codable:
        raise CorruptStream(f"group 0 is {groups[0].describe()}, but a later one could be coded; expected it first")
    return Header(
        PROFILE_NAMES[profile],
        fingerprint,
        groups,
        chunk_tokens,
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
    coder = _CODER_NUMBERS[section.coder]
    return _SECTION.pack(
        section.type, coder, section.group, section.chunk, section.raw_bytes, section.stored_bytes, section.checksum
    )


def table_bytes(layers: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> int:
    """Bytes of the header and of all tables, but for the entries of the sections of exact groups. layers: of each group."""
    n_sections = 1 + sum(len(chunk.sections()) for chunk in chunks)
    groups = sum(GROUP_BYTES + RUN_BYTES * len(layer_runs(its)) for its in layers)
    return HEADER_BYTES + groups + CHUNK_BYTES * len(chunks) + SECTION_BYTES * n_sections


def parse_chunks(view: memoryview, counts: Counts, header: Header) -> ChunkTable:
    """The chunk table in view."""
    chunks = ChunkTable(np.frombuffer(view, _CHUNKS, counts.n_chunks, counts.groups_end))
    entries, tokens = chunks.entries, chunks.tokens
    position = entries["position"].astype(np.int64)
    room = np.minimum(header.chunk_tokens - position % header.chunk_tokens, MAX_POSITION - position)
    wrong = (entries["flags"] > _ALL_CHUNK_FLAGS) | (tokens < 1) | (tokens > room)
    if not header.has_digests:
        wrong |= entries["digest"] != 0
    for index in _first(wrong):
        raise CorruptStream(
            f"chunk {index} claims {tokens[index]} tokens from position {position[index]} "
            f"(flags {entries['flags'][index]}); 1 .. {room[index]} fit its cell"
        )
    check_order(chunks, header)
    return chunks


def check_order(chunks: ChunkTable, header: Header) -> None:
    """Cells ascend, without gaps chunks adjoin, and the regions follow one another: sinks first, then body, then window."""
    entries, tokens = chunks.entries, chunks.tokens
    if header.profile == LOSSLESS:
        for index in _first(chunks.has(_FP8_SINKS | _CODED_WINDOW)):
            raise CorruptStream(f"chunk {index} of a lossless stream has flags {entries['flags'][index]}: not exact")
    if header.coded is None and not header.further:
        for index in _first((entries["sink"] > 0) | (entries["window"] > 0) | chunks.has(_FP8_SINKS | _CODED_WINDOW)):
            raise CorruptStream(f"chunk {index} has sinks or a window, but no group is coded")
    coded = chunks.has(_CODED_WINDOW)[entries["window"] > 0]
    if coded.any() and (header.profile == "paper" or not coded.all()):
        raise CorruptStream(f"windows of the profile {header.profile} are coded in some chunks: expected all or none")
    position = entries["position"].astype(np.int64)
    cell = position // header.chunk_tokens
    follows = cell[1:] > cell[:-1]
    if not header.has_gaps:
        follows &= position[1:] == position[:-1] + tokens[:-1]
    for before in _first(~follows):
        raise CorruptStream(
            f"chunk {before + 1} at position {position[before + 1]} does not follow the chunk before it, "
            f"{tokens[before]} tokens from position {position[before]}"
        )
    if not header.has_gaps:
        for index in _first(chunks.has(_EXPLICIT_POSITIONS)):
            raise CorruptStream(f"chunk {index} lists its positions in a stream without gaps")
    regions = np.stack([entries[name] > 0 for name in ("sink", "body", "window")], axis=1)
    # The first and the last region of each chunk: 0 sinks, 1 body, 2 window.
    first, last = regions.argmax(axis=1), 2 - regions[:, ::-1].argmax(axis=1)
    for before in _first(first[1:] < np.maximum.accumulate(last)[:-1]):
        raise CorruptStream(f"chunk {before + 1} holds an earlier region than the chunks before it")


def parse_sections(view: memoryview, counts: Counts, header: Header, chunks: ChunkTable, n_bytes: int) -> SectionTable:
    """The section table in view, of a stream of n_bytes bytes."""
    entries = np.frombuffer(view, _SECTIONS, counts.n_sections, counts.chunks_end)
    present = chunks.present(header.coded is not None)
    others, firsts = entries, np.ones(len(chunks) + 1, np.int64)
    if header.others:
        is_other = (entries["group"] >= header.others.start) & np.isin(entries["type"], _GROUP_TYPES)
        others = entries[~is_other]
    n_needed = 1 + int(present.sum())
    if n_needed != len(others):
        raise CorruptStream(
            f"the chunks need {n_needed} sections; {len(others)} are in the table, but for those of other groups"
        )
    owners, kinds = np.nonzero(present)
    types = np.concatenate([[SectionType.RATE], kinds + SectionType.POSITIONS])
    owners = np.concatenate([[STREAM_WIDE], owners])
    wrong = (others["type"] != types) | (others["chunk"] != owners) | (others["group"] != 0)
    wrong |= ~np.isin(others["coder"], LOSSLESS_NUMBERS)
    for number in _first(wrong):
        found = others[number]
        raise CorruptStream(
            f"section {number} is type {found['type']} of chunk {found['chunk']} (group {found['group']}, coder "
            f"{found['coder']}); expected {SectionType(types[number]).name} of chunk {owners[number]} of group 0"
        )
    if header.others:
        _check_others(entries, is_other, header, chunks)
        firsts += np.searchsorted(entries["chunk"][1:], np.arange(len(chunks) + 1, dtype=np.uint32))
    else:
        firsts[1:] += present.sum(axis=1).cumsum()
    offsets = np.full(len(entries) + 1, counts.tables_end, np.int64)
    offsets[1:] += entries["stored"].cumsum(dtype=np.int64)
    end = int(offsets[-1])
    if n_bytes < end:
        raise TruncatedStream(f"the tables describe {end} bytes; only {n_bytes} bytes are here")
    if n_bytes > end:
        raise CorruptStream(f"{n_bytes - end} bytes follow the last section")
    return SectionTable(entries, offsets, firsts)


def _check_others(
    entries: npt.NDArray[np.void], is_other: npt.NDArray[np.bool_], header: Header, chunks: ChunkTable
) -> None:
    """Each section of another group stands at its place, and its length is one that the tokens of its chunk can have."""
    group, chunk, kind = (entries[name].astype(np.int64) for name in ("group", "chunk", "type"))
    unknown = is_other & (
        (group >= len(header.groups)) | (chunk >= len(chunks)) | ~np.isin(entries["coder"], list(CODER_NAMES))
    )
    for number in _first(unknown):
        raise CorruptStream(
            f"section {number} is of chunk {chunk[number]} of group {group[number]} (coder {entries['coder'][number]}); there "
            f"are {len(chunks)} chunks and {len(header.groups)} groups"
        )
    # Places within a chunk: positions, sink, body and window of the first coded group, then the groups, then padding.
    place = np.where(is_other, SectionType.STATE * (1 + group) + kind, kind)
    place = np.where(kind == SectionType.PADDING, SectionType.STATE * (2 + len(header.groups)), place)
    order = chunk * SectionType.STATE * (3 + len(header.groups)) + place
    for before in _first(order[2:] <= order[1:-1]):
        raise CorruptStream(
            f"section {before + 2} does not stand behind section {before + 1}, as groups and chunks ascend"
        )
    position, tokens = chunks.entries["position"].astype(np.int64), chunks.tokens
    for index in header.others:
        its = header.groups[index]
        mine = np.flatnonzero(is_other & (group == index))
        coder = entries["coder"][mine]
        is_lossless = np.isin(coder, LOSSLESS_NUMBERS)
        rows, rest = np.divmod(entries["raw"][mine].astype(np.int64), max(its.row_bytes, 1))
        wrong = (rest != 0) | (rows < 1)
        if its.is_coded:
            has_coded_window = chunks.has(_CODED_WINDOW)[chunk[mine]]
            is_body, is_window = (kind[mine] == one for one in (SectionType.BODY, SectionType.WINDOW))
            codes = is_body | (is_window & has_coded_window)
            most = _room(kind[mine], chunk[mine], rows, chunks)
            wrong |= (rows > most) | np.where(codes, coder != _CODER_NUMBERS[PROFILE], ~is_lossless)
        else:
            wanted = SectionType.STATE if its.part.is_snapshot else SectionType.BODY
            first, n = position[chunk[mine]], tokens[chunk[mine]]
            most = its.rows_between(first, first + n)
            wrong |= (kind[mine] != wanted) | (rows > most)
            wrong |= ~is_lossless & ((coder != _CODER_NUMBERS[ROUNDED]) | (not its.can_be_rounded))
            if its.kind != WINDOW:
                wrong |= rows != most
        for at in _first(wrong):
            raise CorruptStream(
                f"section {mine[at]} of group {index} ({its.describe()}) is of type {kind[mine[at]]} (coder "
                f"{entries['coder'][mine[at]]}) and has {entries['raw'][mine[at]]} bytes; {most[at]} rows of {its.row_bytes} bytes "
                f"belong to chunk {chunk[mine[at]]}"
            )
        if its.is_complete:
            n_needed = int((its.rows_between(position, position + tokens) > 0).sum())
            if n_needed != len(mine):
                raise CorruptStream(
                    f"group {index} ({its.describe()}) has {len(mine)} sections; it needs {n_needed}, one for each chunk"
                )


def _room(
    kinds: npt.NDArray[np.int64], chunk: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], chunks: ChunkTable
) -> npt.NDArray[np.int64]:
    """How many rows each section of a coded group may have: those of its region, if all of the regions behind it are there."""
    counts = np.stack([chunks.entries[name].astype(np.int64) for name in ("sink", "body", "window")])
    held = [np.bincount(chunk, rows * (kinds == region), len(chunks)) for region in REGIONS]
    counts[1] *= held[2] >= counts[2]
    counts[0] *= (held[2] >= counts[2]) & (held[1] >= counts[1])
    regions = kinds - SectionType.SINK
    room: npt.NDArray[np.int64] = np.where(regions < len(REGIONS), counts[regions.clip(max=2), chunk], 0)
    return room


def _first(wrong: npt.NDArray[np.bool_]) -> list[int]:
    """The index of the first that is, if any."""
    return [int(wrong.argmax())] if wrong.any() else []
