"""The coded tokens of a cache on their way into a profile: rows on the codec's device, keys un-rotated, some chunks at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import Backend
from ..cache import KVCache
from ..calibration.artifact import Calibration
from ..coding.joint.prediction import token_triples
from ..coding.regions import ChunkSpan
from ..process.progress import track
from ..profiles import BodyRows
from .opened_stream import TokenIds


def coded_rows(
    cache: KVCache,
    token_ids: TokenIds | None,
    calibration: Calibration,
    backend: Backend,
    spans: list[ChunkSpan],
    is_window: bool,
) -> Iterator[BodyRows]:
    """The bodies, or the windows, of chunks that follow one another and have one."""
    positions, length = cache.resolved_positions(), cache.resolved_rope_length()
    for batch in track(list(_batches(spans, is_window, backend.batch_tokens)), "encoding", "batches"):
        parts = [span.window if is_window else span.body for span in batch]
        tokens = slice(parts[0].start, parts[-1].stop)
        keys, values = (side[:, :, tokens].to(backend.device) for side in (cache.keys, cache.values))
        turns = calibration.geometry.rope.turns(positions[tokens].to(backend.device), length, inverse=True)
        triples = None
        if token_ids is not None:
            triples = torch.cat([_triples(token_ids, positions, *both) for both in zip(batch, parts, strict=True)])
        counts = tuple(part.stop - part.start for part in parts)
        yield BodyRows(backend.gather(keys, values, turns), triples, counts)


def _batches(spans: list[ChunkSpan], is_window: bool, n_tokens: int) -> Iterator[list[ChunkSpan]]:
    """Neighbours whose bodies, or windows, hold n_tokens at most, or one of them."""
    batch: list[ChunkSpan] = []
    held = 0
    for span in spans:
        count = span.n_window if is_window else span.n_body
        if batch and held + count > n_tokens:
            yield batch
            batch, held = [], 0
        batch.append(span)
        held += count
    if batch:
        yield batch


def _triples(token_ids: TokenIds, positions: Tensor, span: ChunkSpan, part: slice) -> Tensor:
    """What prediction sees of a part of a chunk."""
    found = token_triples(token_ids[span.tokens], positions[span.tokens].numpy())
    return found[part.start - span.first : part.stop - span.first]
