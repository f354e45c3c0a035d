"""Groups of layers that no profile codes: from tensors to the sections of a stream and back, bit for bit but for rounded states.

A resume point is a position at which every group can be restored: a state only where there is a snapshot of it, a window
where the tokens before it are there, all else at any token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..coding.states.rounding import ROUNDED_BITS
from ..container.groups import SIDE_BUFFER, STATE, WINDOW, Group, Part
from ..container.stream import Payload, Stream
from ..container.tables import Chunk, SectionType
from ..errors import InvalidArgument

LOSSLESS_STATES = "lossless"

RowSides = tuple[Tensor, ...]
"""Of one layer: keys and values, each [H, rows, D], or one tensor: [1, rows, D] of a side buffer, its own shape of a state."""


@dataclass(frozen=True, eq=False)
class ExactGroup:
    """A group and what its layers hold, in the order of `group.layers`, of a cache that begins at position 0."""

    group: Group
    sides: list[RowSides]

    def copied(self) -> ExactGroup:
        """The same in tensors of its own."""
        return ExactGroup(self.group, [tuple(side.clone() for side in its) for its in self.sides])

    @property
    def n_rows(self) -> int:
        """Of a window: tokens that it holds."""
        return self.sides[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for its in self.sides for side in its)

    def rows_between(self, start: int, stop: int, position: int) -> slice:
        """Of a window that ends at a position, the rows of those of the tokens start .. stop - 1 that it holds."""
        first = position - self.n_rows
        return slice(max(0, start - first), max(0, stop - first))

    def span(self, start: int, stop: int, position: int) -> ExactGroup:
        """The window cut to the rows of `rows_between`."""
        rows = self.rows_between(start, stop, position)
        return ExactGroup(self.group, [tuple(side[:, rows] for side in its) for its in self.sides])


def group_payloads(
    index: int, snapshots: Mapping[int, ExactGroup], chunks: Sequence[Chunk], states: str = LOSSLESS_STATES
) -> list[Payload]:
    """The sections of a group, by ascending chunks.

    Parameters:
        index: of the group in the table.
        snapshots: what it was after so many tokens, ascending, for each resume point; the last one is where the chunks end.
        chunks: of the stream. Rows of a window that no resume point needs are left out.
        states: how recurrent states are kept: "lossless", or one of `ROUNDED_BITS`.
    """
    found = []
    for number, exact, rows in kept_rows(snapshots, chunks):
        kind = SectionType.STATE if exact.group.part.is_snapshot else SectionType.BODY
        raw, layout = _rows_to_bytes(exact, rows), exact.group.layout(rows.stop - rows.start)
        is_rounded = exact.group.can_be_rounded and exact.group.part is not Part.CONVOLUTION_STATE
        bits = ROUNDED_BITS.get(states, 0) if is_rounded else 0
        found.append(Payload(kind, number, raw, layout=layout, group=index, rounded_bits=bits))
    return found


def kept_rows(snapshots: Mapping[int, ExactGroup], chunks: Sequence[Chunk]) -> Iterator[tuple[int, ExactGroup, slice]]:
    """The number of each chunk that has rows of a group, the snapshot that they are taken from, and which of its rows they are.

    The parameters are those of `group_payloads`.
    """
    points = list(snapshots)
    for number, chunk in enumerate(chunks):
        start, stop = chunk.first_position, chunk.first_position + chunk.n_tokens
        # The first resume point behind a chunk needs most of its rows.
        point = points[bisect_left(points, stop)]
        exact = snapshots[point]
        group, rows = exact.group, slice(start, stop)
        if group.part.is_snapshot:
            rows = slice(0, group.rows_between(start, stop) if stop == point else 0)
        elif group.kind == WINDOW:
            rows = exact.rows_between(start, stop, point)
        elif group.kind == SIDE_BUFFER:
            rows = slice(start // group.extent, stop // group.extent)
        if rows.stop > rows.start and group.row_numbers:
            yield number, exact, rows


def resume_points(stream: Stream, start: int = 0) -> list[int]:
    """The tokens after which a stream can be resumed and a chunk ends, ascending, counted from the first of the stream.

    start: tokens before this position need not be there.
    """
    header, n_tokens = stream.header, stream.chunks.tokens
    stops = n_tokens.cumsum()
    possible = np.ones(len(stops), np.bool_)
    for index in header.others:
        if not header.groups[index].is_complete:
            possible &= _restorable(stream, index, n_tokens, start_of(stream) + stops, start)
    return [int(stop) for stop in stops[possible]]


def check_beginning(stream: Stream) -> None:
    """Raise `InvalidArgument` for a part of a stream with exact groups: its other parts are needed, too."""
    if stream.header.others and start_of(stream):
        raise InvalidArgument(
            f"the stream begins at position {start_of(stream)}; {len(stream.header.groups)} groups of layers are restored "
            "from position 0 on: join it to the parts before it"
        )


def check_restorable(stream: Stream, n_tokens: int, start: int = 0) -> None:
    """Raise `InvalidArgument` where some group cannot be restored after the first n_tokens tokens. start: as in `resume_points`."""
    header = stream.header
    if any(not header.groups[index].is_complete for index in header.others):
        points = resume_points(stream, start)
        if n_tokens not in points:
            raise InvalidArgument(
                f"this cache cannot be restored after {n_tokens} tokens, for its windows and states were not kept there; "
                f"it can be after {', '.join(map(str, points[-8:])) or 'none'}"
            )


def read_groups(stream: Stream, n_chunks: int, n_tokens: int) -> list[ExactGroup]:
    """The groups of a stream of exact ones, as `read_group` gives them; raises as `check_restorable`, too."""
    check_restorable(stream, n_tokens, start_of(stream))
    return [read_group(stream, index, n_chunks, n_tokens) for index in stream.header.others]


def start_of(stream: Stream) -> int:
    """Where its first token stands; 0 where it has none."""
    return int(stream.chunks.entries["position"][0]) if len(stream.chunks) else 0


def _restorable(
    stream: Stream, index: int, n_tokens: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], start: int
) -> npt.NDArray[np.bool_]:
    """Of each chunk, whether a group that is not complete can be restored at its end. stops: positions. start: as in
    `resume_points`."""
    group, entries = stream.header.groups[index], stream.sections.entries
    mine = stream.sections.of_group(index, len(stops))
    rows = np.zeros(len(stops), np.int64)
    np.add.at(rows, entries["chunk"][mine], entries["raw"][mine] // max(group.row_bytes, 1))
    if group.part.is_snapshot:
        whole: npt.NDArray[np.bool_] = rows >= group.rows_between(stops - n_tokens, stops)
        return whole
    # A section holds the last tokens of its chunk: only whole ones go on from the chunk before.
    sums, first = rows.cumsum(), np.where(rows < n_tokens, np.arange(len(rows)), 0)
    first = np.maximum.accumulate(first)
    run = sums - sums[first] + rows[first]
    enough: npt.NDArray[np.bool_] = run >= np.minimum(stops - start, group.extent - 1)
    return enough


def read_group(stream: Stream, index: int, n_chunks: int, n_tokens: int) -> ExactGroup:
    """An exact group of a stream as it was after the first n_tokens tokens; of a complete group the rows that it holds.

    Parameters:
        stream: parsed; all groups can be restored there.
        index: of the group in the table.
        n_chunks: the chunks that hold these tokens.
        n_tokens: at least one.

    Raises:
        CorruptStream: for sections that do not decode.
    """
    group, start = stream.header.groups[index], start_of(stream)
    stop = start + n_tokens
    held = group.rows_held(stop, start) if group.kind == WINDOW else 1 if group.part.is_snapshot else n_tokens
    first_chunk = bisect_right(stream.chunks.tokens[:n_chunks].cumsum().tolist(), n_tokens - held)
    read = [raw for _, raw in stream.read_group(index, first_chunk, n_chunks)]
    parts = [_bytes_to_rows(group, raw, len(raw) // group.row_bytes) for raw in read]
    parts = parts or [_bytes_to_rows(group, b"", 0)]
    if len(parts) == 1:
        sides = parts[0]
    else:
        sides = [tuple(torch.cat(same, dim=1) for same in zip(*its, strict=True)) for its in zip(*parts, strict=True)]
    if group.kind == WINDOW:
        sides = [tuple(side[:, side.shape[1] - held :] for side in its) for its in sides]
    elif not group.part.is_snapshot:
        n_rows = group.rows_between(start, stop)
        sides = [tuple(side[:, :n_rows] for side in its) for its in sides]
    return ExactGroup(group, sides)


def _rows_to_bytes(exact: ExactGroup, rows: slice) -> bytes:
    """Rows of all layers, [layer][head][row][features of key, then of value]; a state is one row."""
    if exact.group.kind == STATE:
        layers = [side for (side,) in exact.sides]
    else:
        layers = [torch.cat([side[:, rows] for side in its], dim=-1) for its in exact.sides]
    whole = torch.stack([layer.cpu() for layer in layers]).contiguous()
    return bytes(whole.reshape(-1).view(torch.uint8).numpy().tobytes())


def _bytes_to_rows(group: Group, raw: bytes, n_rows: int) -> list[RowSides]:
    """Inverse of `_rows_to_bytes`."""
    heads, key_dim, value_dim = group.shape
    if group.kind == STATE:
        shape = [axis for axis in group.shape if axis]
        return [(layer,) for layer in _numbers(raw, group.dtype).reshape(group.n_layers, *shape)]
    whole = _numbers(raw, group.dtype).reshape(group.n_layers, heads, n_rows, key_dim + value_dim)
    if group.kind == SIDE_BUFFER or group.values_are_keys:
        return [(layer,) for layer in whole]
    return [(layer[..., :key_dim], layer[..., key_dim:]) for layer in whole]


def _numbers(raw: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
