"""The sections of a stream from a cache and its coded rows: exact tokens, positions, token digests, rate, padding.

The counterpart of `opened_stream`. What does not depend on the rate is drafted first, so that the room for coded rows is known
before they are coded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from ..container.tables import DIGEST_BYTES, SECTION_BYTES, STREAM_WIDE, Chunk, Header, SectionType, table_bytes
from ..profiles.interface import CodedRows
from .exact_groups import group_payloads
from .transformers_cache import SplitCache

NOT_BODY = (SectionType.SINK, SectionType.WINDOW)


@dataclass(frozen=True)
class StreamSettings:
    """What a codec lays down for the streams it writes."""

    profile: str
    chunk_tokens: int
    coder: str
    fp8_sinks: bool
    fixed_size: bool = False
    coded_window: bool = False


@dataclass(frozen=True)
class StreamDraft:
    """A stream but for its rate and its coded rows.

    sections: those of the coded group that are finished, by type and chunk. exact: those of the other groups, by chunk and group.
    block_coder: codes blocks of lossless coders, where it takes them.
    """

    settings: StreamSettings
    header: Header
    chunks: tuple[Chunk, ...]
    sections: dict[tuple[SectionType, int], CodedSection]
    exact: dict[tuple[int, int], CodedSection]
    block_coder: BlockCoder | None = None

    @property
    def n_bytes(self) -> int:
        """What is known of the stream's length: all but the bytes of the rate and of coded rows and padding."""
        return self._own_bytes(self.header.groups, self.sections.values()) + sum(
            one.n_bytes for one in self.exact.values()
        )

    @property
    def body_bytes(self) -> int:
        """What of that counts for the body: all but sinks and windows with their table entries, and what is of other groups."""
        others = [kind for chunk in self.chunks for kind in chunk.sections() if kind in NOT_BODY]
        stored = sum(len(section.stored) for (kind, _), section in self.sections.items() if kind in NOT_BODY)
        own = self._own_bytes(self.header.groups[:1], self.sections.values())
        return own - stored - SECTION_BYTES * len(others)

    def _own_bytes(self, groups: Sequence[Group], sections: Iterable[CodedSection]) -> int:
        """Header and tables with some groups, and sections of the coded group."""
        tables = table_bytes([group.layers for group in groups], self.chunks)
        return tables + sum(len(section.stored) for section in sections)

    def seal(self, plan: bytes, coded: CodedRows, is_final: bool, size: int | None) -> bytes:
        """The stream.

        Parameters:
            plan: bytes of the section `rate`.
            coded: coded rows of its chunks.
            is_final: whether no coder is applied to them.
            size: bytes to pad to; None: no padding.
        """
        coding = self.chunks if self.header.coded is not None else ()
        bodies = [(SectionType.BODY, index) for index, chunk in enumerate(coding) if chunk.n_body]
        bodies = [key for key in bodies if key not in self.sections]
        windows = [(SectionType.WINDOW, index) for index, chunk in enumerate(coding) if chunk.coded_window]
        rows = [*zip(bodies, coded.bodies, strict=True), *zip(windows, coded.windows, strict=True)]
        payloads = [Payload(SectionType.RATE, STREAM_WIDE, plan)]
        payloads += [Payload(kind, index, data, is_final) for (kind, index), data in rows]
        sections = dict(self.sections)
        finished = code_payloads(payloads, self.settings.coder, self.block_coder)
        for payload, section in zip(payloads, finished, strict=True):
            sections[payload.type, payload.chunk] = section
        if size is not None and self.chunks:
            # The entry of the padding is part of the tables already.
            n_bytes = self._own_bytes(self.header.groups, sections.values())
            key = SectionType.PADDING, len(self.chunks) - 1
            sections[key] = code_payloads([Payload(*key, bytes(size - n_bytes), is_final=True)], "none")[0]
        order = [sections[SectionType.RATE, STREAM_WIDE]]
        for index, chunk in enumerate(self.chunks):
            kinds = chunk.sections(self.header.coded is not None)
            order += [sections[kind, index] for kind in kinds if kind is not SectionType.PADDING]
            order += [self.exact[index, group] for group in self.header.exact if (index, group) in self.exact]
            order += [sections[kind, index] for kind in kinds if kind is SectionType.PADDING]
        return write_stream(self.header, self.chunks, order)


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
        calibration: of the coded group; None: there is none, and nothing is coded.
        split: the cache, checked.
        is_transformers: whether it was one of transformers.
        token_ids: int64 [T]; None: unknown.
        spans: its chunks.
        positions: int64 [T], of its tokens.
        block_coder: see `StreamDraft`.
    """
    chunks, cache = chunks_of(settings, spans, positions, token_ids), split.coded
    payloads = [] if cache is None else _payloads(settings, cache, spans, chunks, positions)
    groups = [] if cache is None else [_coded_group(calibration, cache)]
    header = Header(
        settings.profile,
        fingerprint_of(calibration),
        tuple(groups + [one.group for one in split.exact]),
        settings.chunk_tokens,
        has_digests=token_ids is not None,
        is_transformers=is_transformers,
    )
    coded = code_payloads(payloads, settings.coder, block_coder)
    sections = {(payload.type, payload.chunk): section for payload, section in zip(payloads, coded, strict=True)}
    end = chunks[-1].first_position + chunks[-1].n_tokens if chunks else 0
    of_groups = [
        payload
        for index, snapshots in zip(header.exact, split.snapshots(end), strict=True)
        for payload in group_payloads(index, snapshots, chunks)
    ]
    kept = code_payloads(of_groups, settings.coder, block_coder)
    exact = {(payload.chunk, payload.group): section for payload, section in zip(of_groups, kept, strict=True)}
    return StreamDraft(settings, header, tuple(chunks), sections, exact, block_coder)


def fingerprint_of(calibration: Calibration | None) -> bytes:
    """How streams name a calibration; zeros for none."""
    return bytes(FINGERPRINT_BYTES) if calibration is None else calibration.fingerprint


def _payloads(
    settings: StreamSettings, cache: KVCache, spans: list[ChunkSpan], chunks: list[Chunk], positions: Tensor
) -> list[Payload]:
    """The sections of the coded group that do not depend on how bits are spent."""
    payloads = []
    for index, (span, chunk) in enumerate(zip(spans, chunks, strict=True)):
        regions = {SectionType.SINK: span.sink, SectionType.BODY: span.body, SectionType.WINDOW: span.window}
        for section in chunk.sections():
            n_exact, layout = chunk.exact_tokens(section, settings.profile), None
            if section is SectionType.POSITIONS:
                raw = (positions[span.tokens] % settings.chunk_tokens).numpy().astype("<u2").tobytes()
            elif n_exact:
                layout = exact_layout(n_exact, (cache.key_dim, cache.value_dim), cache.dtype)
                raw = encode_exact(*(side[:, :, regions[section]] for side in (cache.keys, cache.values)))
            elif section is SectionType.SINK:
                raw = encode_fp8(cache.keys[:, :, span.sink], cache.values[:, :, span.sink])
            else:
                continue
            payloads.append(Payload(section, index, raw, layout=layout))
    return payloads


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
