"""Streams of a fixed size: how many bytes they take, which follows from the tokens' places alone and from no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .cache import CacheGeometry
from .coding.exact import exact_bytes, fp8_bytes
from .container import SECTION_BYTES, Chunk, table_bytes


def fixed_stream_bytes(
    chunks: Sequence[Chunk],
    geometry: CacheGeometry,
    dtype: torch.dtype,
    ratio: float,
    rate_bytes: int,
    least_bytes: Callable[[int], int],
) -> int:
    """Bytes of every stream with these chunks, which are padded.

    Exact tokens count at their largest: without lossless coding. All else (tables, rate, positions, coded rows) gets the body's
    original bytes over `ratio`, or what suffices for any body where that is more. least_bytes: n tokens -> what suffices for
    their coded rows.
    """
    exact, n_exact = _exact_bytes(chunks, geometry, dtype)
    n_body = sum(chunk.n_body for chunk in chunks)
    share = int(2 * geometry.row_features * min(16, 8 * dtype.itemsize) / 8 * n_body / ratio)
    least = table_bytes(chunks) - SECTION_BYTES * n_exact + rate_bytes
    least += sum(2 * chunk.n_tokens for chunk in chunks if chunk.explicit_positions)
    sizes = {chunk.n_body: least_bytes(chunk.n_body) for chunk in chunks if chunk.n_body}
    least += sum(sizes[chunk.n_body] for chunk in chunks if chunk.n_body)
    return exact + max(share, least)


def _exact_bytes(chunks: Sequence[Chunk], geometry: CacheGeometry, dtype: torch.dtype) -> tuple[int, int]:
    """Sections of exact tokens where lossless coding gains nothing: their bytes, table entries included, and their number."""
    values = 2 * geometry.row_features
    sizes = []
    for chunk in chunks:
        if chunk.n_sink and chunk.fp8_sinks:
            sizes.append(fp8_bytes(values // geometry.head_dim * chunk.n_sink, geometry.head_dim))
        elif chunk.n_sink:
            sizes.append(exact_bytes(values * chunk.n_sink, dtype))
        if chunk.n_window:
            sizes.append(exact_bytes(values * chunk.n_window, dtype))
    return sum(sizes) + SECTION_BYTES * len(sizes), len(sizes)
