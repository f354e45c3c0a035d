"""The sections of a stream from a cache and its coded rows: exact tokens, positions, token digests, rate, padding.

The counterpart of `opened_stream`. What does not depend on the rate is drafted first, so that the room for coded rows is known
before they are coded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy.typing as npt
from numpy import int64
from torch import Tensor

from ..cache import KVCache
from ..calibration.artifact import FINGERPRINT_BYTES, Calibration
from ..coding.exact.tokens import encode_exact, encode_fp8, exact_layout
from ..coding.lossless import BlockCoder
from ..coding.regions import ChunkSpan
from ..container.groups import Group, Part
from ..container.stream import CodedSection, Payload, code_payloads, token_digest, write_stream
from ..container.tables import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    JOINT,
    LOSSLESS,
    REGIONS,
    SECTION_BYTES,
    STREAM_WIDE,
    Chunk,
    Header,
    SectionType,
    table_bytes,
)
from ..profiles.interface import CodedRows
from .coded_groups import CodedRowsOf, coded_windows
from .exact_groups import LOSSLESS_STATES, group_payloads
from .transformers_cache import SplitCache

Place = tuple[int, int, SectionType]
"""Chunk, group and type of a section."""


@dataclass(frozen=True)
class StreamSettings:
    """What a codec lays down for the streams it writes."""

    profile: str
    chunk_tokens: int
    coder: str
    fp8_sinks: bool
    fixed_size: bool = False
    coded_window: bool = False
    states: str = LOSSLESS_STATES


def exact_settings(settings: StreamSettings) -> StreamSettings:
    """Those of a stream no group of which is coded."""
    return replace(settings, profile=LOSSLESS, fp8_sinks=False, fixed_size=False, coded_window=False)


@dataclass(frozen=True)
class StreamDraft:
    """A stream but for its rate and its coded rows.

    sections: those that are finished, by chunk, group and type. coded: the rows that are to be coded. block_coder: codes blocks of
    lossless coders, where it takes them.
    """

    settings: StreamSettings
    header: Header
    chunks: tuple[Chunk, ...]
    sections: dict[Place, CodedSection]
    coded: tuple[CodedRowsOf, ...]
    block_coder: BlockCoder | None = None

    @property
    def n_bytes(self) -> int:
        """What is known of the length of a stream of one group: all but the bytes of the rate and of coded rows and padding."""
        tables = table_bytes([group.layers for group in self.header.groups], self.chunks)
        return tables + sum(len(one.stored) for one in self.sections.values())

    @property
    def body_bytes(self) -> int:
        """What is known of what counts for the body: no sinks, windows and exact groups, nor their entries in the tables."""
        layers = [self.header.groups[one.index].layers for one in self.coded]
        positions = [one for (*_, kind), one in self.sections.items() if kind is SectionType.POSITIONS]
        n_sections = len(positions) + sum(chunk.is_padded for chunk in self.chunks)
        n_sections += sum(span.n_body > 0 for one in self.coded for span in one.spans.values())
        tables = table_bytes(layers, []) + CHUNK_BYTES * len(self.chunks) + SECTION_BYTES * n_sections
        return tables + sum(len(one.stored) for one in positions)

    def seal(self, plan: bytes, coded: CodedRows, is_final: bool, size: int | None) -> bytes:
        """The stream.

        Parameters:
            plan: bytes of the section `rate`.
            coded: coded rows of its chunks.
            is_final: whether no coder is applied to them.
            size: bytes to pad to; None: no padding.
        """
        payloads = [Payload(SectionType.RATE, STREAM_WIDE, plan), *self._coded_payloads(coded, is_final)]
        finished = code_payloads(payloads, self.settings.coder, self.block_coder)
        rate, sections = finished[0], self.sections | dict(_placed(payloads[1:], finished[1:]))
        if size is not None and self.chunks:
            # The entry of the padding is part of the tables already.
            n_bytes = replace(self, sections=sections).n_bytes + len(rate.stored)
            padding = Payload(SectionType.PADDING, len(self.chunks) - 1, bytes(size - n_bytes), is_final=True)
            sections |= _placed([padding], code_payloads([padding], "none"))
        order = sorted(sections, key=lambda place: (place[0], place[2] is SectionType.PADDING, *place[1:]))
        return write_stream(self.header, self.chunks, [rate, *(sections[place] for place in order)])

    def _coded_payloads(self, coded: CodedRows, is_final: bool) -> Iterator[Payload]:
        """The sections of coded rows: the bodies of all groups, then the windows."""
        for kind, of_kind in ((SectionType.BODY, coded.bodies), (SectionType.WINDOW, coded.windows)):
            rows = iter(of_kind)
            for one in self.coded:
                token_bytes = self.header.groups[one.index].row_bytes
                for chunk, span in one.spans.items():
                    count = span.n_body if kind is SectionType.BODY else span.n_window * self.settings.coded_window
                    if count:
                        raw_bytes = count * token_bytes if one.index in self.header.others else None
                        yield Payload(kind, chunk, next(rows), is_final, group=one.index, raw_bytes=raw_bytes)


def _placed(payloads: Sequence[Payload], sections: Sequence[CodedSection]) -> dict[Place, CodedSection]:
    places = [(payload.chunk, payload.group, payload.type) for payload in payloads]
    return dict(zip(places, sections, strict=True))


def draft_stream(
    settings: StreamSettings,
    calibration: Calibration | None,
    split: SplitCache,
    is_transformers: bool,
    token_ids: npt.NDArray[int64] | None,
    spans: list[ChunkSpan],
    positions: Tensor,
    block_coder: BlockCoder | None = None,
) -> StreamDraft:
    """All of a stream that does not depend on how bits are spent.

    Parameters:
        settings: of the codec.
        calibration: of the coded groups; None: there are none, and nothing is coded.
        split: the cache, checked.
        is_transformers: whether it was one of transformers.
        token_ids: int64 [T]; None: unknown.
        spans: its chunks.
        positions: int64 [T], of its tokens.
        block_coder: see `StreamDraft`.

    Raises:
        InvalidCache: for a window to be coded that holds NaN or infinite values.
    """
    chunks, cache = chunks_of(settings, spans, positions, token_ids), split.coded
    groups = [] if cache is None else [_coded_group(calibration, cache)]
    groups += [
        replace(one.group, is_coded=settings.profile == JOINT and _covers(calibration, one.group))
        for one in split.exact
    ]
    header = Header(
        settings.profile,
        fingerprint_of(calibration),
        tuple(groups),
        settings.chunk_tokens,
        has_digests=token_ids is not None,
        is_transformers=is_transformers,
    )
    end = chunks[-1].first_position + chunks[-1].n_tokens if chunks else 0
    snapshots = split.snapshots(end)
    coded = coded_windows(header, calibration, snapshots, chunks)
    if cache is not None:
        coded.insert(0, CodedRowsOf(0, 0, cache, dict(enumerate(spans))))
    payloads = [payload for one in coded for payload in _payloads(settings, one, one.index in header.others, chunks)]
    payloads += _position_payloads(settings, spans, chunks, positions)
    for index, its in zip(header.others, snapshots, strict=True):
        if not header.groups[index].is_coded:
            payloads += group_payloads(index, its, chunks, settings.states)
    sections = _placed(payloads, code_payloads(payloads, settings.coder, block_coder))
    is_lossless = settings.profile == LOSSLESS
    return StreamDraft(settings, header, tuple(chunks), sections, () if is_lossless else tuple(coded), block_coder)


def _covers(calibration: Calibration | None, group: Group) -> bool:
    return calibration is not None and calibration.number_of(group) is not None


def fingerprint_of(calibration: Calibration | None) -> bytes:
    """How streams name a calibration; zeros for none."""
    return bytes(FINGERPRINT_BYTES) if calibration is None else calibration.fingerprint


def _position_payloads(
    settings: StreamSettings, spans: list[ChunkSpan], chunks: list[Chunk], positions: Tensor
) -> Iterator[Payload]:
    for index, (span, chunk) in enumerate(zip(spans, chunks, strict=True)):
        if chunk.explicit_positions:
            raw = (positions[span.tokens] % settings.chunk_tokens).numpy().astype("<u2").tobytes()
            yield Payload(SectionType.POSITIONS, index, raw)


def _payloads(settings: StreamSettings, rows: CodedRowsOf, is_further: bool, chunks: list[Chunk]) -> Iterator[Payload]:
    """The sections of a coded group that do not depend on how bits are spent. is_further: whether it is not the first."""
    cache = rows.cache
    for index, span in rows.spans.items():
        chunk = chunks[index]
        for section, tokens in zip(REGIONS, (span.sink, span.body, span.window), strict=True):
            sides, n_tokens = (cache.keys[:, :, tokens], cache.values[:, :, tokens]), tokens.stop - tokens.start
            is_sink = section is SectionType.SINK
            if n_tokens and is_sink and chunk.fp8_sinks and not is_further:
                yield Payload(section, index, encode_fp8(*sides))
            elif n_tokens and (is_sink or chunk.exact_tokens(section, settings.profile)):
                layout = exact_layout(n_tokens, (cache.key_dim, cache.value_dim), cache.dtype)
                yield Payload(section, index, encode_exact(*sides), layout=layout, group=rows.index)


def _coded_group(calibration: Calibration | None, cache: KVCache) -> Group:
    extent, length = cache.extent, _rope_length(calibration, cache)
    shape = extent.n_kv_heads, *extent.dims
    part, first_head = Part.KEYS_AND_VALUES, extent.first_kv_head
    return Group(extent.kind, part, cache.dtype, extent.layers, shape, first_head, extent=length)


def chunks_of(
    settings: StreamSettings, spans: list[ChunkSpan], positions: Tensor, token_ids: npt.NDArray[int64] | None = None
) -> list[Chunk]:
    """The chunk table of spans; of a stream of fixed size the last chunk has the padding."""
    chunks = []
    for span in spans:
        here = positions[span.tokens]
        has_gaps = int(here[-1]) - int(here[0]) + 1 != here.numel()
        digest = bytes(DIGEST_BYTES) if token_ids is None else token_digest(token_ids[span.tokens])
        is_fp8 = settings.fp8_sinks and span.n_sink > 0
        coded = settings.coded_window and span.n_window > 0
        first = int(here[0])
        chunks.append(
            Chunk(first, span.n_sink, span.n_body, span.n_window, has_gaps, is_fp8, digest, coded_window=coded)
        )
    if settings.fixed_size and chunks:
        chunks[-1] = replace(chunks[-1], is_padded=True)
    return chunks


def _rope_length(calibration: Calibration | None, cache: KVCache) -> int:
    """What the header says: 0 where nothing depends on it, so that a prefix has one stream however long the cache is."""
    depends = calibration is not None and calibration.geometry.rope.depends_on_length
    if cache.rope_length is None and not depends:
        return 0
    return cache.resolved_rope_length()
