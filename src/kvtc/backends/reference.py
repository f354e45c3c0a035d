"""The backend that defines what every other one must do: the stages of `coding` one after the other, chunk by chunk.

Runs on any device of torch; entropy coding is done on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..coding.bitpack import pack, unpack
from ..coding.joint.escapes import decode_escapes, encode_escapes
from ..coding.joint.probability import ProbabilityTables
from ..coding.joint.rounding import Rounded, round_coefficients
from ..coding.joint.uniform_quantizer import ACTIVITY_BITS, ESCAPE, dequantize, from_symbols, to_symbols
from ..coding.lossless import BlockCoder
from ..coding.paper.allocation import BitAllocation
from ..coding.paper.groups import decode_groups, encode_groups
from ..coding.rans import decode_symbols, encode_symbols
from ..coding.rope import Turn, turn_in_place
from ..coding.transform import rows_of, saturate
from .interface import Bytes, CodedIntegers, IntegerBytes, Target

_BATCH_FEATURES = 1 << 25
"""Features, float32, of the rows that are coded at once: 128 MiB."""


class ReferenceBackend:
    """device: where coefficients, rows and caches are computed."""

    name = "reference"
    block_coder: BlockCoder | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def batch_tokens(self, row_features: int) -> int:
        # Elsewhere than on the CPU a product's last bits depend on the other rows: there a chunk is coded by itself.
        return max(1, _BATCH_FEATURES // row_features) if self.device.type == "cpu" else 1

    def gather(self, keys: Tensor, values: Tensor, turns: Sequence[Turn | None]) -> Tensor:
        plain = keys.to(torch.float32, copy=True)
        for layer, turn in zip(plain, turns, strict=True):
            if turn is not None:
                turn_in_place(layer, turn)
        return torch.cat([rows_of(plain), rows_of(values)], dim=1)

    def place(self, keys: Tensor, values: Tensor, turn: Turn | None, targets: tuple[Target, Target]) -> None:
        plain = keys.transpose(0, 1).to(torch.float32, copy=True)
        if turn is not None:
            turn_in_place(plain, turn)
        targets[0].write(saturate(plain, targets[0].data.dtype))
        targets[1].write(saturate(values.transpose(0, 1).float(), targets[1].data.dtype))

    def round(
        self, coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> Rounded:
        return round_coefficients(coefficients, step, classes, tables)

    def write_integers(
        self, rounded: Rounded, spans: Sequence[slice], classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> list[IntegerBytes]:
        written = []
        for span in spans:
            values, activities = rounded.values[:, span], rounded.activities[span]
            symbols = tables.escape_unlikely(to_symbols(values), classes, activities)
            coded = encode_symbols(symbols, classes, activities, tables.rans)
            packed = pack(torch.from_numpy(activities), ACTIVITY_BITS).numpy().tobytes()
            written.append(IntegerBytes(packed, coded, encode_escapes(values[symbols == ESCAPE])))
        return written

    def read_integers(self, chunks: Sequence[CodedIntegers], rank: int) -> Tensor:
        n_tokens = sum(chunk.n_tokens for chunk in chunks)
        coefficients = torch.zeros(n_tokens, rank, dtype=torch.float32, device=self.device)
        first = 0
        for chunk in chunks:
            values, offsets = _read_chunk(chunk)
            here = coefficients[first : first + chunk.n_tokens, : len(chunk.classes)]
            here.copy_(dequantize(values.to(self.device), offsets.to(self.device), chunk.step))
            first += chunk.n_tokens
        return coefficients

    def pack_groups(self, coefficients: Tensor, spans: Sequence[slice], allocation: BitAllocation) -> list[bytes]:
        return [encode_groups(coefficients[span], allocation) for span in spans]

    def unpack_groups(self, chunks: Sequence[Bytes], counts: Sequence[int], allocation: BitAllocation) -> Tensor:
        parts = [torch.zeros(0, allocation.n_coefficients, dtype=torch.float32, device=self.device)]
        parts += [
            decode_groups(_on_host(chunk), allocation, n, self.device) for chunk, n in zip(chunks, counts, strict=True)
        ]
        return torch.cat(parts)


def _read_chunk(chunk: CodedIntegers) -> tuple[Tensor, Tensor]:
    """Integers [n, coded] and their offsets [n, coded, 2]."""
    side = torch.frombuffer(bytearray(_on_host(chunk.activities)), dtype=torch.uint8)
    activities = unpack(side, chunk.n_tokens, ACTIVITY_BITS).numpy().astype(np.uint8)
    symbols = decode_symbols(_on_host(chunk.symbols), chunk.classes, activities, chunk.tables.rans)
    escaped = decode_escapes(_on_host(chunk.escapes), int((symbols == ESCAPE).sum()))
    values = torch.from_numpy(from_symbols(symbols, escaped)).T
    offsets = torch.from_numpy(chunk.tables.offsets)
    # Rows by token, columns by coefficient: each pair of classes has its own.
    by_token = offsets[torch.from_numpy(activities.astype(np.int64))]
    return values, by_token[:, torch.from_numpy(chunk.classes.astype(np.int64))]


def _on_host(data: Bytes) -> bytes:
    return data if isinstance(data, bytes) else data.cpu().numpy().tobytes()
