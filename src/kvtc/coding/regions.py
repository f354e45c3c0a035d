"""Which tokens are coded: sink | body | window (paper, section 1.5), cut into chunks on an absolute grid of positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ChunkSpan:
    """Tokens first .. first + n_sink + n_body + n_window - 1 of the cache: the part of it inside one cell of the grid."""

    first: int
    n_sink: int
    n_body: int
    n_window: int

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.window.stop)

    @property
    def sink(self) -> slice:
        return slice(self.first, self.first + self.n_sink)

    @property
    def body(self) -> slice:
        return slice(self.sink.stop, self.sink.stop + self.n_body)

    @property
    def window(self) -> slice:
        return slice(self.body.stop, self.body.stop + self.n_window)


def split_regions(positions: Tensor, sink_tokens: int, window_tokens: int, chunk_tokens: int) -> list[ChunkSpan]:
    """Positions [T] int64, increasing -> the spans of the chunks that hold tokens, in order.

    Sinks are the tokens at positions below `sink_tokens`, the window the last `window_tokens` of the others. A chunk holds the
    positions k * chunk_tokens .. (k + 1) * chunk_tokens - 1, wherever the cache begins, so that chunks of different caches of
    one text coincide.
    """
    n_tokens = positions.numel()
    n_sink = int((positions < sink_tokens).sum())
    window_start = max(n_sink, n_tokens - window_tokens)
    _, cells = np.unique((positions // chunk_tokens).numpy(), return_counts=True)
    spans, first = [], 0
    for count in cells.tolist():
        stop = first + count
        sink = max(0, min(stop, n_sink) - first)
        window = max(0, stop - max(first, window_start))
        spans.append(ChunkSpan(first, sink, count - sink - window, window))
        first = stop
    return spans
