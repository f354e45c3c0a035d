"""Calibration rows on disk: a uniform sample of a stream of unknown length, in 16 bits, read back block by block."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..coding.device import CPU
from ..errors import InvalidArgument, InvalidCache

BLOCK_VALUES = 1 << 24
"""Of a block that is read back: 64 MiB in float32."""
FLOAT16_BYTES = 2


class RowSpool:
    """At most `capacity` rows of `features` float16 values in a temporary file.

    `append` keeps a uniform sample of all rows ever offered (reservoir sampling), so that positions are drawn from the pool of
    all sequences as the paper draws them (section 1.2), without knowing how many there will be. Rows are read back onto `device`.
    A context manager: leaving it deletes the file.
    """

    def __init__(
        self, features: int, capacity: int, seed: int, directory: Path | None = None, device: torch.device = CPU
    ) -> None:
        self.features = features
        self.capacity = capacity
        self.device = device
        self.n_rows = 0
        self.n_offered = 0
        self._random = np.random.default_rng(seed)
        # Plain writes, not a memory map: a full disk is then an error and not a dead process.
        self._file = tempfile.TemporaryFile(prefix="kvtc-rows-", dir=directory)  # noqa: SIM115

    def __enter__(self) -> RowSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def append(self, rows: Tensor, slots: np.ndarray | None = None) -> np.ndarray:
        """Offer rows [T, p]; returns the slot each went to (-1: not kept). Give those `slots` to a second spool to pair rows."""
        if slots is None:
            slots = self._draw_slots(rows.shape[0])
        half = rows.to(device="cpu", dtype=torch.float16)
        if not bool(half.isfinite().all()):
            raise InvalidCache("calibration rows hold values that 16 bits cannot: NaN, infinite, or beyond 65504")
        row_bytes = self.features * FLOAT16_BYTES
        array = half.contiguous().numpy()
        kept = np.flatnonzero(slots >= 0)
        # Rows that fill the spool in order are one write; replacements are scattered.
        for run in np.split(kept, np.flatnonzero((np.diff(slots[kept]) != 1) | (np.diff(kept) != 1)) + 1):
            if run.size:
                _write_all(self._file.fileno(), array[run[0] : run[-1] + 1].tobytes(), int(slots[run[0]]) * row_bytes)
        self.n_offered += rows.shape[0]
        self.n_rows = min(self.n_offered, self.capacity)
        return slots

    @property
    def rows_at_once(self) -> int:
        """Rows of a block."""
        return max(64, BLOCK_VALUES // self.features)

    def blocks(self, columns: slice = slice(None), rows_at_once: int | None = None) -> Iterator[Tensor]:
        """The rows in order as float32 blocks [n, columns] of bounded size. rows_at_once: those of a spool paired with this one."""
        rows_at_once = rows_at_once or self.rows_at_once
        for start in range(0, self.n_rows, rows_at_once):
            # In 16 bits on their way to the device: half of what float32 would take.
            rows = self._read(start, min(rows_at_once, self.n_rows - start)).to(self.device)
            yield rows[:, columns].float()

    def sample(self, n_rows: int, seed: int) -> Iterator[Tensor]:
        """`n_rows` rows drawn without replacement (all of them if there are fewer), as float32 blocks."""
        chosen = np.zeros(self.n_rows, dtype=bool)
        chosen[np.random.default_rng(seed).permutation(self.n_rows)[:n_rows]] = True
        start = 0
        for block in self.blocks():
            yield block[torch.from_numpy(chosen[start : start + block.shape[0]]).to(self.device)]
            start += block.shape[0]

    def _draw_slots(self, n: int) -> np.ndarray:
        indices = np.arange(self.n_offered, self.n_offered + n)
        draws = (self._random.random(n) * (indices + 1)).astype(np.int64)
        slots = np.where(indices < self.capacity, indices, np.where(draws < self.capacity, draws, -1))
        return np.asarray(slots)

    def _read(self, start: int, n: int) -> Tensor:
        rows = np.empty((n, self.features), np.float16)
        _read_all(self._file.fileno(), rows.data.cast("B"), start * self.features * FLOAT16_BYTES)
        return torch.from_numpy(rows)


def require_disk(n_bytes: int, directory: Path | None) -> str:
    """Where the rows will be spooled, in words; `InvalidArgument` if that place has less room than they may need."""
    place = Path(directory or tempfile.gettempdir())
    if not place.is_dir():
        raise InvalidArgument(f"the spool directory {place} does not exist")
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise InvalidArgument(
            f"calibration rows may need {n_bytes / 2**30:.2f} GiB in {place}, {free / 2**30:.2f} GiB are free; "
            "give another spool_directory or fewer max_rows"
        )
    return f"up to {n_bytes / 2**30:.2f} GiB in {place}"


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        n_read = os.preadv(descriptor, [view], offset)
        if not n_read:
            raise RuntimeError(f"the spool ends {len(view)} bytes early")
        view, offset = view[n_read:], offset + n_read


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
