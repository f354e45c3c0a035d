"""Accumulating calibration rows: a uniform sample of the tokens of many caches, on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache
from ..coding.device import usable_device
from ..coding.joint.prediction import N_TOKENS_SEEN, NO_TOKEN, token_triples
from ..coding.transform import rows_of
from ..errors import InvalidArgument
from ..process.progress import note
from ..process.torch_state import neutral_torch_state
from .row_spool import FLOAT16_BYTES, RowSpool, require_disk

MAX_ROWS = 160_000
CHUNK_TOKENS = 256
"""Tokens of a chunk in `kvtc.Codec`, unless it is given another number."""
_TOKENS_AT_ONCE = 1024
"""Of a cache whose rows are made in float32: memory does not grow with the length of texts."""


class CalibrationRows:
    """The rows that a calibration is fitted to: keys before rotation, values, and the token ids behind each.

    A context manager: leaving it deletes the files. Caches are given one by one to `add`; none is kept.

    Parameters:
        geometry: layers and heads that the caches cover.
        sink_tokens: rows at positions below this are left out, because attention sinks look like nothing else.
        max_rows: rows kept, for keys and values each, as float16 on disk. Of more, a uniform sample is kept.
        max_tokens: tokens past the sinks after which `is_full` is true; None: max_rows. No more rows than that are kept.
        with_tokens: whether each cache comes with its token ids, which the profile `conditional` needs.
        spool_directory: where the files are; None: the system's directory for temporary files.
        seed: of the sample.
        device: where the rows are read back to.

    Raises:
        InvalidArgument: for an option out of range, too little disk, or a device that cannot be used.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        *,
        sink_tokens: int = 4,
        max_rows: int = MAX_ROWS,
        max_tokens: int | None = None,
        with_tokens: bool = False,
        spool_directory: str | Path | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.max_tokens = max_rows if max_tokens is None else max_tokens
        if sink_tokens < 0 or max_rows < 2 or self.max_tokens < 2:
            raise InvalidArgument(
                f"sink_tokens {sink_tokens}, max_rows {max_rows}, max_tokens {self.max_tokens}: expected >= 0, >= 2, >= 2"
            )
        max_rows = min(max_rows, self.max_tokens)
        directory = Path(spool_directory) if spool_directory is not None else None
        p, place = geometry.row_features, usable_device(device)
        disk = require_disk(2 * max_rows * p * FLOAT16_BYTES, directory)
        note(f"calibration rows: {disk} for at most {max_rows} rows of 2 x {p} features")
        self.geometry, self.sink_tokens = geometry, sink_tokens
        self.keys = RowSpool(p, max_rows, seed, directory, place)
        self.values = RowSpool(p, max_rows, seed, directory, place)
        self.n_sequences = 0
        self._triples = np.full((max_rows, N_TOKENS_SEEN), NO_TOKEN, np.int64) if with_tokens else None

    def __enter__(self) -> CalibrationRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.keys.close()
        self.values.close()

    @property
    def n_rows(self) -> int:
        """Rows kept."""
        return self.keys.n_rows

    @property
    def is_full(self) -> bool:
        """Whether max_tokens tokens past the sinks were seen, so that no further cache is needed."""
        return self.keys.n_offered >= self.max_tokens

    @property
    def triples(self) -> Tensor | None:
        """[n_rows, 3] int64: for each row kept, its token id and those of its two predecessors; None without token ids."""
        return None if self._triples is None else torch.from_numpy(self._triples)[: self.n_rows]

    @neutral_torch_state
    def add(self, cache: KVCache, token_ids: Tensor | None = None) -> None:
        """Offer the rows of one cache.

        Time: one un-rotation and one write of its rows. Memory: 1024 tokens in float32.

        Parameters:
            cache: it must cover the geometry of these rows.
            token_ids: [T] int64, its token ids; needed if `with_tokens`, else ignored.

        Raises:
            InvalidCache, GeometryMismatch: for a cache that cannot be used.
            InvalidArgument: for token ids that are missing, or not as many as the tokens of the cache.
        """
        cache.validate()
        self.geometry.check(cache)
        cache = cache.plain()
        seen = None if self._triples is None else _triples_of(cache, token_ids)
        positions = cache.resolved_positions()
        body = (positions >= self.sink_tokens).to(cache.keys.device)
        if not bool(body.any()):
            return
        self.n_sequences += 1
        for start in range(0, cache.n_tokens, _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            here = body[part]
            keys, length = cache.keys[:, :, part], cache.resolved_rope_length()
            slots = self.keys.append(rows_of(self.geometry.rope.unrotate(keys, positions[part], length))[here])
            self.values.append(rows_of(cache.values[:, :, part])[here], slots)
            if seen is not None and self._triples is not None:
                kept = slots >= 0
                # A slot may be drawn twice in one part: the later row stays, here as in the spool.
                self._triples[slots[kept]] = seen[part][here.cpu().numpy()][kept]


def _triples_of(cache: KVCache, token_ids: Tensor | None) -> np.ndarray:
    """[T, 3] int64. Predecessors end where a chunk begins, as often as they will when caches are coded."""
    found = "none" if token_ids is None else len(token_ids)
    if token_ids is None or found != cache.n_tokens:
        raise InvalidArgument(
            f"token_ids must go with the caches: one has {cache.n_tokens} tokens, its ids are {found}"
        )
    positions = cache.resolved_positions().numpy()
    return token_triples(np.asarray(token_ids, dtype=np.int64), positions, CHUNK_TOKENS).numpy()
