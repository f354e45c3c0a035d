"""The sections of a stream from a cache and its coded rows: exact tokens, positions, token digests, rate, padding.

The counterpart of `opened_stream`. What does not depend on the rate is drafted first, so that the room for coded rows is known
before they are coded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy.typing as npt
from numpy import int64
from torch import Tensor

from ..cache import KVCache
from ..calibration.artifact import Calibration
from ..coding.exact.floats import FloatLayout
from ..coding.exact.tokens import encode_exact, encode_fp8
from ..coding.lossless import BlockCoder
from ..coding.regions import ChunkSpan
from ..container.stream import CodedSection, Payload, code_payloads, token_digest, write_stream
from ..container.tables import DIGEST_BYTES, SECTION_BYTES, STREAM_WIDE, Chunk, Header, SectionType, table_bytes
from ..profiles.interface import CodedRows

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
    """A stream but for its rate and its coded rows. sections: those that are finished, by type and chunk.

    block_coder: codes blocks of lossless coders, where it takes them.
    """

    settings: StreamSettings
    header: Header
    chunks: tuple[Chunk, ...]
    sections: dict[tuple[SectionType, int], CodedSection]
    block_coder: BlockCoder | None = None

    @property
    def n_bytes(self) -> int:
        """What is known of the stream's length: all but the bytes of the rate and of coded rows and padding."""
        return table_bytes(self.chunks) + sum(len(section.stored) for section in self.sections.values())

    @property
    def body_bytes(self) -> int:
        """What of that counts for the body: all but sinks and windows with their table entries."""
        others = [kind for chunk in self.chunks for kind in chunk.sections() if kind in NOT_BODY]
        stored = sum(len(section.stored) for (kind, _), section in self.sections.items() if kind in NOT_BODY)
        return self.n_bytes - stored - SECTION_BYTES * len(others)

    def seal(self, plan: bytes, coded: CodedRows, is_final: bool, size: int | None) -> bytes:
        """The stream.

        Parameters:
            plan: bytes of the section `rate`.
            coded: coded rows of its chunks.
            is_final: whether no coder is applied to them.
            size: bytes to pad to; None: no padding.
        """
        bodies = [(SectionType.BODY, index) for index, chunk in enumerate(self.chunks) if chunk.n_body]
        bodies = [key for key in bodies if key not in self.sections]
        windows = [(SectionType.WINDOW, index) for index, chunk in enumerate(self.chunks) if chunk.coded_window]
        rows = [*zip(bodies, coded.bodies, strict=True), *zip(windows, coded.windows, strict=True)]
        payloads = [Payload(SectionType.RATE, STREAM_WIDE, plan)]
        payloads += [Payload(kind, index, data, is_final) for (kind, index), data in rows]
        sections = dict(self.sections)
        finished = code_payloads(payloads, self.settings.coder, self.block_coder)
        for payload, section in zip(payloads, finished, strict=True):
            sections[payload.type, payload.chunk] = section
        if size is not None and self.chunks:
            # The entry of the padding is part of the tables already.
            n_bytes = table_bytes(self.chunks) + sum(len(section.stored) for section in sections.values())
            key = SectionType.PADDING, len(self.chunks) - 1
            sections[key] = code_payloads([Payload(*key, bytes(size - n_bytes), is_final=True)], "none")[0]
        order = [(SectionType.RATE, STREAM_WIDE)]
        order += [(kind, index) for index, chunk in enumerate(self.chunks) for kind in chunk.sections()]
        return write_stream(self.header, self.chunks, [sections[key] for key in order])


def draft_stream(
    settings: StreamSettings,
    calibration: Calibration,
    cache: KVCache,
    is_transformers: bool,
    token_ids: npt.NDArray[int64] | None,
    spans: list[ChunkSpan],
    block_coder: BlockCoder | None = None,
) -> StreamDraft:
    """All of a stream that does not depend on how bits are spent. block_coder: see `StreamDraft`."""
    positions = cache.resolved_positions()
    chunks = chunks_of(settings, spans, positions, token_ids)
    payloads = []
    for index, (span, chunk) in enumerate(zip(spans, chunks, strict=True)):
        regions = {SectionType.SINK: span.sink, SectionType.BODY: span.body, SectionType.WINDOW: span.window}
        for section in chunk.sections():
            n_exact, layout = chunk.exact_tokens(section, settings.profile), None
            if section is SectionType.POSITIONS:
                raw = (positions[span.tokens] % settings.chunk_tokens).numpy().astype("<u2").tobytes()
            elif n_exact:
                layout = FloatLayout(n_exact, cache.head_dim, cache.dtype)
                raw = encode_exact(*(side[:, :, regions[section]] for side in (cache.keys, cache.values)))
            elif section is SectionType.SINK:
                raw = encode_fp8(cache.keys[:, :, span.sink], cache.values[:, :, span.sink])
            else:
                continue
            payloads.append(Payload(section, index, raw, layout=layout))
    geometry = calibration.geometry
    header = Header(
        settings.profile,
        cache.dtype,
        calibration.fingerprint,
        geometry.first_layer,
        geometry.n_layers,
        geometry.first_kv_head,
        geometry.n_kv_heads,
        geometry.head_dim,
        settings.chunk_tokens,
        _rope_length(calibration, cache),
        has_digests=token_ids is not None,
        is_transformers=is_transformers,
    )
    coded = code_payloads(payloads, settings.coder, block_coder)
    sections = {(payload.type, payload.chunk): section for payload, section in zip(payloads, coded, strict=True)}
    return StreamDraft(settings, header, tuple(chunks), sections, block_coder)


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


def _rope_length(calibration: Calibration, cache: KVCache) -> int:
    """What the header says: 0 where nothing depends on it, so that a prefix has one stream however long the cache is."""
    if cache.rope_length is None and not calibration.geometry.rope.depends_on_length:
        return 0
    return cache.resolved_rope_length()
