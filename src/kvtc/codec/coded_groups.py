"""Groups that a profile codes: which rows of them a stream holds, and how those of a window come back.

The first is of full attention and has every token. Of a window a stream holds the rows that some resume point needs: the last ones
of their chunks. A token is a sink, of the body or of the window in all groups alike.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..calibration.artifact import Calibration
from ..coding.lossless import PROFILE
from ..coding.regions import ChunkSpan
from ..coding.threads import Begun
from ..container.groups import FULL_ATTENTION, Group
from ..container.stream import Stream
from ..container.tables import Chunk, Header, SectionType
from ..errors import CorruptStream
from ..profiles import AnyDecoder
from ..profiles.interface import CodedBody
from .exact_groups import ExactGroup, kept_rows, start_of
from .opened_stream import OpenedStream


@dataclass(frozen=True)
class CodedRowsOf:
    """What a stream holds of a coded group, on the way in.

    index: of the group in the table. number: of it in the calibration. cache: the rows, at their positions. spans: by the number of
    the chunk, for each chunk that has any, which of its rows are sinks, body and window.
    """

    index: int
    number: int
    cache: KVCache
    spans: dict[int, ChunkSpan]

    @property
    def body_bytes(self) -> int:
        """Of its body tokens in the cache."""
        n_tokens = sum(span.n_body for span in self.spans.values())
        return n_tokens * self.cache.extent.joint_features * self.cache.original_bits // 8


def coded_windows(
    header: Header,
    calibration: Calibration | None,
    snapshots: Sequence[Mapping[int, ExactGroup]],
    chunks: Sequence[Chunk],
) -> list[CodedRowsOf]:
    """The rows of the groups behind the first that are coded.

    snapshots: of each of `header.others`, as `group_payloads` takes them.
    """
    found = []
    for index, its in zip(header.others, snapshots, strict=True):
        number = None if calibration is None else calibration.number_of(header.groups[index])
        if header.groups[index].is_coded and number is not None:
            found += _rows_of_window(index, number, its, chunks)
    return found


def _rows_of_window(
    index: int, number: int, snapshots: Mapping[int, ExactGroup], chunks: Sequence[Chunk]
) -> list[CodedRowsOf]:
    """Those of one group; none where no resume point needs any."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    positions, spans, first = [], {}, 0
    for at, exact, rows in kept_rows(snapshots, chunks):
        chunk, n_rows = chunks[at], rows.stop - rows.start
        n_window = min(n_rows, chunk.n_window)
        n_body = min(n_rows - n_window, chunk.n_body)
        spans[at] = ChunkSpan(first, n_rows - n_window - n_body, n_body, n_window)
        stop = chunk.first_position + chunk.n_tokens
        # Layers may lie on several devices.
        device = exact.sides[0][0].device
        for parts, side in ((keys, 0), (values, 1)):
            parts.append(torch.stack([its[side][:, rows].to(device) for its in exact.sides]))
        positions.append(torch.arange(stop - n_rows, stop, device="cpu"))
        first += n_rows
    if not spans:
        return []
    group = next(iter(snapshots.values())).group
    cache = KVCache(
        torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(positions), group.layers, group.first_kv_head
    )
    cache.validate()
    return [CodedRowsOf(index, number, cache.plain(), spans)]


def open_window(
    stream: Stream, index: int, n_chunks: int, n_tokens: int, decoder: AnyDecoder, plan: Any
) -> OpenedStream:
    """The rows of a coded window that are needed after the first n_tokens tokens, as a stream of its own.

    Parameters:
        stream: parsed; n_tokens is one of its resume points.
        index: of the group in the table.
        n_chunks: the chunks that hold these tokens.
        n_tokens: at least one.
        decoder: of the group.
        plan: of the stream.

    Raises:
        CorruptStream: for sections that do not decode.
    """
    group, counts = stream.header.groups[index], stream.chunks.tokens[:n_chunks]
    start = start_of(stream)
    held = group.rows_held(start + n_tokens, start)
    first_chunk = bisect_right(counts.cumsum().tolist(), n_tokens - held)
    coded: list[CodedBody[Any]] = []
    exact, exact_bytes, places = [], [], []
    n_rows = n_sink = 0
    stops = stream.chunks.entries["position"][:n_chunks].astype("int64") + counts
    for section, data in stream.read_group(index, first_chunk, n_chunks):
        n = section.raw_bytes // group.row_bytes
        is_window = section.type is SectionType.WINDOW
        behind = 0 if is_window else stream.chunks[section.chunk].n_window
        behind += stream.chunks[section.chunk].n_body if section.type is SectionType.SINK else 0
        stop = int(stops[section.chunk]) - behind
        places.append(torch.arange(stop - n, stop, device="cpu"))
        if section.coder != PROFILE:
            exact.append((n, n_rows, False))
            exact_bytes.append(data)
            n_sink += 0 if is_window else n
        elif len(data) < decoder.fewest_bytes(n):
            raise CorruptStream(f"{section.describe()}: {n} rows need more than its {len(data)} bytes")
        else:
            coded.append(CodedBody(data, n, plan, None, is_window))
        n_rows += n
    body = slice(n_sink, n_sink + sum(one.n_tokens for one in coded))
    header = replace(stream.header, groups=(replace(group, kind=FULL_ATTENTION, extent=0, is_coded=False),))
    positions = torch.cat(places) if places else torch.empty(0, dtype=torch.int64, device="cpu")
    return OpenedStream(
        header, n_rows, n_chunks, decoder, positions, body, coded, Begun(lambda: exact_bytes, 0), exact, plan
    )


def restored_window(group: Group, cache: KVCache, n_rows: int) -> ExactGroup:
    """A window of so many rows. cache: its rows, and perhaps some before them."""
    first = cache.n_tokens - n_rows
    layers = zip(cache.keys, cache.values, strict=True)
    return ExactGroup(replace(group, is_coded=False), [(keys[:, first:], values[:, first:]) for keys, values in layers])
