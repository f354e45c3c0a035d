"""The bytes of a stream: in the host's memory, or on a device with only as much of them here as is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .tables import Counts, parse_counts

_HEAD_BYTES = 8192
"""Copied from a device at first: the entries of all groups, and header, tables and rate of a stream of two hundred chunks."""


@dataclass(frozen=True)
class StreamData:
    """head: the first bytes, in the host's memory. whole: all of them [n] uint8, where they lie on a device; else head is all."""

    head: memoryview
    whole: Tensor | None = None

    @property
    def n_bytes(self) -> int:
        return len(self.head) if self.whole is None else len(self.whole)

    def on_host(self, spans: Sequence[slice]) -> list[memoryview]:
        """Some ranges of bytes in the host's memory; what is not there yet comes over in one copy."""
        absent = [index for index, span in enumerate(spans) if span.stop > len(self.head)]
        found = [self.head[span] for span in spans]
        if self.whole is None or not absent:
            return found
        copied = _copy(torch.cat([self.whole[spans[index]] for index in absent]))
        start = 0
        for index in absent:
            stop = start + spans[index].stop - spans[index].start
            found[index], start = copied[start:stop], stop
        return found


def open_data(data: bytes | bytearray | memoryview | Tensor) -> tuple[StreamData, Counts]:
    """The bytes of a stream with header and tables at hand, and what the header says of them.

    Raises `InvalidArgument` for what are no bytes, `TruncatedStream`, `CorruptStream`, `UnsupportedVersion`.
    """
    if isinstance(data, Tensor):
        return _open_tensor(data)
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidArgument(f"a stream is bytes; got {type(data).__name__}")
    view = memoryview(data).cast("B")
    return StreamData(view), parse_counts(view, len(view))


def _open_tensor(data: Tensor) -> tuple[StreamData, Counts]:
    """One copy of the first bytes, and one more where the tables are longer."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise InvalidArgument(f"the bytes of a stream are uint8 [bytes]; got {data.dtype} of shape {tuple(data.shape)}")
    whole = data.contiguous()
    head = _copy(whole[:_HEAD_BYTES])
    counts = parse_counts(head, len(whole))
    if counts.tables_end > len(head):
        head = _copy(whole[: counts.tables_end])
    return StreamData(head, whole), counts


def _copy(data: Tensor) -> memoryview:
    return data.cpu().numpy().data
