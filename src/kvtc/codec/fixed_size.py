"""Streams of a fixed size: how many bytes they take, which follows from the tokens' places alone and from no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..cache import CacheGeometry
from ..coding.exact.tokens import exact_bytes, fp8_bytes
from ..container.tables import SECTION_BYTES, Chunk, table_bytes

WINDOW_SHARE = 2.0
"""How many times a body token's bytes a token of a coded window gets."""


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
    original bytes over `ratio`, and a coded window's over half of it, or what suffices for any cache where that is more.
    least_bytes: n tokens -> what suffices for their coded rows.
    """
    exact, n_exact = _exact_bytes(chunks, geometry, dtype)
    n_body = sum(chunk.n_body for chunk in chunks)
    n_window = sum(chunk.n_window for chunk in chunks if chunk.coded_window)
    token_bytes = geometry.joint_features * min(16, 8 * dtype.itemsize) / 8
    share = int(token_bytes * (n_body / ratio + n_window / max(1.0, ratio / WINDOW_SHARE)))
    least = table_bytes([geometry.layers], chunks) - SECTION_BYTES * n_exact + rate_bytes
    least += sum(2 * chunk.n_tokens for chunk in chunks if chunk.explicit_positions)
    counts = [chunk.n_body for chunk in chunks] + [chunk.n_window for chunk in chunks if chunk.coded_window]
    sizes = {count: least_bytes(count) for count in set(counts) if count}
    least += sum(sizes[count] for count in counts if count)
    return exact + max(share, least)


def _exact_bytes(chunks: Sequence[Chunk], geometry: CacheGeometry, dtype: torch.dtype) -> tuple[int, int]:
    """Sections of exact tokens where lossless coding gains nothing: their bytes, table entries included, and their number."""
    values = geometry.joint_features
    sizes = []
    for chunk in chunks:
        if chunk.n_sink and chunk.fp8_sinks:
            sizes.append(fp8_bytes(geometry.n_layers * geometry.n_kv_heads * chunk.n_sink, geometry.dims))
        elif chunk.n_sink:
            sizes.append(exact_bytes(values * chunk.n_sink, dtype))
        if chunk.n_window and not chunk.coded_window:
            sizes.append(exact_bytes(values * chunk.n_window, dtype))
    return sum(sizes) + SECTION_BYTES * len(sizes), len(sizes)
