"""Groups of layers that no profile codes: from tensors to the sections of a stream and back, bit for bit.

A resume point is a position at which every group can be restored: a state only where there is a snapshot of it, a window
where the tokens before it are there, all else at any token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..container.groups import SIDE_BUFFER, STATE, WINDOW, Group
from ..container.stream import Payload, Stream
from ..container.tables import Chunk, SectionType
from ..errors import InvalidArgument

RowSides = tuple[Tensor, ...]
"""Of one layer: keys and values, each [H, rows, D], or one tensor: [1, rows, D] of a side buffer, its own shape of a state."""


@dataclass(frozen=True)
class ExactGroup:
    """A group and what its layers hold, in the order of `group.layers`, of a cache that begins at position 0."""

    group: Group
    sides: list[RowSides]


def group_payloads(index: int, exact: ExactGroup, chunks: Sequence[Chunk]) -> list[Payload]:
    """The sections of a group, by ascending chunks. index: of the group in the table. The cache ends where the last chunk does."""
    group, found = exact.group, []
    end = chunks[-1].first_position + chunks[-1].n_tokens if chunks else 0
    for number, chunk in enumerate(chunks):
        start, stop = chunk.first_position, chunk.first_position + chunk.n_tokens
        kind, rows = SectionType.BODY, slice(start, stop)
        if group.part.is_snapshot:
            kind, rows = SectionType.STATE, slice(0, group.rows_between(start, stop) if stop == end else 0)
        elif group.kind == WINDOW:
            first = end - group.rows_held(end)
            rows = slice(max(0, start - first), max(0, stop - first))
        elif group.kind == SIDE_BUFFER:
            rows = slice(start // group.extent, stop // group.extent)
        if rows.stop > rows.start and group.row_numbers:
            raw, layout = _rows_to_bytes(exact, rows), group.layout(rows.stop - rows.start)
            found.append(Payload(kind, number, raw, layout=layout, group=index))
    return found


def resume_points(stream: Stream) -> list[int]:
    """The tokens after which a stream can be resumed and a chunk ends, ascending."""
    header, n_tokens = stream.header, stream.chunks.tokens
    stops = n_tokens.cumsum()
    possible = np.ones(len(stops), np.bool_)
    for index in header.exact:
        if not header.groups[index].is_complete:
            possible &= _restorable(stream, index, n_tokens, stops)
    return [int(stop) for stop in stops[possible]]


def read_groups(stream: Stream, n_chunks: int, n_tokens: int) -> list[ExactGroup]:
    """The exact groups of a stream as they were after its first n_tokens tokens.

    Parameters:
        stream: parsed.
        n_chunks: the chunks that hold these tokens.
        n_tokens: at least one.

    Raises:
        InvalidArgument: where a group cannot be restored there.
        CorruptStream: for sections that do not decode.
    """
    header = stream.header
    if header.exact and int(stream.chunks.entries["position"][0]):
        raise InvalidArgument(
            f"the stream begins at position {int(stream.chunks.entries['position'][0])}; {len(header.groups)} groups of layers are "
            "restored from position 0 on: join it to the parts before it"
        )
    if any(not header.groups[index].is_complete for index in header.exact):
        points = resume_points(stream)
        if n_tokens not in points:
            raise InvalidArgument(
                f"this cache cannot be restored after {n_tokens} tokens, for its windows and states were not kept there; "
                f"it can be after {', '.join(map(str, points[-8:])) or 'none'}"
            )
    return [_read(stream, index, n_chunks, n_tokens) for index in header.exact]


def _restorable(
    stream: Stream, index: int, n_tokens: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Of each chunk, whether a group that is not complete can be restored at its end."""
    group, entries = stream.header.groups[index], stream.sections.entries
    mine = stream.sections.of_group(index, len(stops))
    rows = np.zeros(len(stops), np.int64)
    rows[entries["chunk"][mine]] = entries["raw"][mine] // max(group.row_bytes, 1)
    if group.part.is_snapshot:
        whole: npt.NDArray[np.bool_] = rows >= group.rows_between(stops - n_tokens, stops)
        return whole
    # A section holds the last tokens of its chunk: only whole ones go on from the chunk before.
    sums, first = rows.cumsum(), np.where(rows < n_tokens, np.arange(len(rows)), 0)
    first = np.maximum.accumulate(first)
    run = sums - sums[first] + rows[first]
    enough: npt.NDArray[np.bool_] = run >= np.minimum(stops, group.extent - 1)
    return enough


def _read(stream: Stream, index: int, n_chunks: int, n_tokens: int) -> ExactGroup:
    group = stream.header.groups[index]
    read = stream.read_group(index, n_chunks)
    if group.part.is_snapshot:
        read = [(chunk, raw) for chunk, raw in read if chunk == n_chunks - 1]
    parts = [_bytes_to_rows(group, raw, len(raw) // group.row_bytes) for _, raw in read]
    parts = parts or [_bytes_to_rows(group, b"", 0)]
    if len(parts) == 1:
        sides = parts[0]
    else:
        sides = [tuple(torch.cat(same, dim=1) for same in zip(*its, strict=True)) for its in zip(*parts, strict=True)]
    if group.kind == WINDOW:
        held = group.rows_held(n_tokens)
        sides = [tuple(side[:, side.shape[1] - held :] for side in its) for its in sides]
    elif not group.part.is_snapshot:
        n_rows = group.rows_between(0, n_tokens)
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
