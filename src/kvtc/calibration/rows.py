"""Accumulating calibration rows: a uniform sample of the tokens of many caches, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache
from ..coding.device import usable_device
from ..coding.transform import rows_of
from ..errors import InvalidArgument
from ..process.progress import note
from ..process.torch_state import neutral_torch_state
from .row_spool import FLOAT16_BYTES, RowSpool, require_disk

MAX_ROWS = 160_000
_LARGEST_STATE = 6e4
"""Of an entry of a hidden state in 16 bits: a few dwarf all others."""
_TOKENS_AT_ONCE = 1024
"""Of a cache whose rows are made in float32: memory does not grow with the length of texts."""


class CalibrationRows:
    """The rows that a calibration is fitted to: keys before rotation, values, and a hidden state of each token.

    A context manager: leaving it deletes the files. Caches are given one by one to `add`; none is kept.

    Parameters:
        geometry: layers and heads that the caches cover.
        sink_tokens: rows at positions below this are left out, because attention sinks look like nothing else.
        max_rows: rows kept, for keys and values each, as float16 on disk. Of more, a uniform sample is kept.
        max_tokens: tokens past the sinks after which `is_full` is true; None: max_rows. No more rows than that are kept.
        hidden_width: d, of the hidden states that come with the caches, which the profile `conditional` needs; 0: none do.
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
        hidden_width: int = 0,
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
        disk = require_disk(max_rows * (2 * p + hidden_width) * FLOAT16_BYTES, directory)
        note(f"calibration rows: {disk} for at most {max_rows} rows of 2 x {p} features")
        self.geometry, self.sink_tokens = geometry, sink_tokens
        self.keys = RowSpool(p, max_rows, seed, directory, place)
        self.values = RowSpool(p, max_rows, seed, directory, place)
        self.n_sequences = 0
        self.hidden = RowSpool(hidden_width, max_rows, seed, directory, place) if hidden_width else None

    def __enter__(self) -> CalibrationRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.keys.close()
        self.values.close()
        if self.hidden is not None:
            self.hidden.close()

    @property
    def n_rows(self) -> int:
        """Rows kept."""
        return self.keys.n_rows

    @property
    def is_full(self) -> bool:
        """Whether max_tokens tokens past the sinks were seen, so that no further cache is needed."""
        return self.keys.n_offered >= self.max_tokens

    @neutral_torch_state
    def add(self, cache: KVCache, hidden: Tensor | None = None) -> None:
        """Offer the rows of one cache.

        Time: one un-rotation and one write of its rows. Memory: 1024 tokens in float32.

        Parameters:
            cache: it must cover the geometry of these rows.
            hidden: [T, d], the hidden states of its tokens; needed with a `hidden_width`, else ignored.

        Raises:
            InvalidCache, GeometryMismatch: for a cache that cannot be used.
            InvalidArgument: for hidden states that are missing, or of another shape.
        """
        cache.validate()
        self.geometry.check(cache)
        cache = cache.plain()
        if self.hidden is not None and (hidden is None or hidden.shape != (cache.n_tokens, self.hidden.features)):
            raise InvalidArgument(
                f"expected hidden states ({cache.n_tokens}, {self.hidden.features}) with the cache, found "
                f"{'none' if hidden is None else tuple(hidden.shape)}"
            )
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
            if self.hidden is not None and hidden is not None:
                states = hidden[part][here.to(hidden.device)].float()
                self.hidden.append(states.clamp(-_LARGEST_STATE, _LARGEST_STATE), slots)
