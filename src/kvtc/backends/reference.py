"""The backend that defines what every other one must do: the stages of `coding` one after the other, chunk by chunk.

Runs on any device of torch; entropy coding is done on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..coding.bitpack import pack, unpack
from ..coding.joint.escapes import decode_escapes, encode_escapes
from ..coding.joint.probability import ProbabilityTables
from ..coding.joint.rounding import Rounded, round_coefficients
from ..coding.joint.uniform_quantizer import ACTIVITY_BITS, dequantize
from ..coding.lossless import BlockCoder
from ..coding.paper.allocation import BitAllocation
from ..coding.paper.groups import decode_groups, encode_groups
from ..coding.rans import decode_symbols, encode_symbols
from ..coding.rope import Turn, turn_in_place, turn_to_bfloat16
from ..coding.threads import in_threads
from ..coding.transform import rows_of, saturate
from .interface import Bytes, CodedIntegers, IntegerBytes, Target

_BATCH_FEATURES = 1 << 25
"""Features, float32, of the rows that are coded at once: 128 MiB."""
_CODING_OPERATIONS = 32
"""Of one symbol, about, as `in_threads` counts them."""


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
        _place(keys, turn, targets[0])
        _place(values, None, targets[1])

    def round(
        self, coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> Rounded:
        return round_coefficients(coefficients, step, classes, tables)

    def write_integers(
        self, rounded: Rounded, spans: Sequence[slice], classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> list[IntegerBytes]:
        written: list[IntegerBytes | None] = [None] * len(spans)

        def write(first: int, stop: int) -> None:
            for index in range(first, stop):
                written[index] = _write_chunk(rounded, spans[index], classes, tables)

        in_threads(write, len(spans), _CODING_OPERATIONS * rounded.symbols.size)
        return [one for one in written if one is not None]

    def read_integers(self, chunks: Sequence[CodedIntegers], rank: int) -> Tensor:
        stops = list(accumulate((chunk.n_tokens for chunk in chunks), initial=0))
        # Column by column in memory: so all loops over them are over neighbours.
        turned = np.empty((rank, stops[-1]), np.float32)

        def read(first: int, stop: int) -> None:
            for index in range(first, stop):
                _read_chunk(chunks[index], turned, stops[index])

        in_threads(read, len(chunks), _CODING_OPERATIONS * turned.size)
        return torch.from_numpy(turned).T.to(self.device)

    def pack_groups(self, coefficients: Tensor, spans: Sequence[slice], allocation: BitAllocation) -> list[bytes]:
        return [encode_groups(coefficients[span], allocation) for span in spans]

    def unpack_groups(self, chunks: Sequence[Bytes], counts: Sequence[int], allocation: BitAllocation) -> Tensor:
        stops = list(accumulate(counts, initial=0))
        found = np.zeros((stops[-1], allocation.n_coefficients), np.float32)

        def read(first: int, stop: int) -> None:
            for index in range(first, stop):
                decode_groups(_on_host(chunks[index]), allocation, found[stops[index] : stops[index + 1]])

        in_threads(read, len(chunks), _CODING_OPERATIONS * found.size)
        return torch.from_numpy(found).to(self.device)


def _place(rows: Tensor, turn: Turn | None, target: Target) -> None:
    """`place`, of one side."""
    view, is_on_cpu = target.view, rows.device.type == "cpu"
    if is_on_cpu and view is not None and view.dtype == torch.bfloat16 and view.stride(2) == 1:
        turn_to_bfloat16(rows, turn, view, target.data)
        return
    plain = rows.transpose(0, 1).to(torch.float32, copy=True)
    if turn is not None:
        turn_in_place(plain, turn)
    target.write(saturate(plain, target.data.dtype))


def _write_chunk(
    rounded: Rounded, span: slice, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
) -> IntegerBytes:
    symbols, activities = rounded.symbols[:, span], rounded.activities[span]
    coded = encode_symbols(symbols, classes, activities, tables.rans)
    packed = pack(torch.from_numpy(activities), ACTIVITY_BITS).numpy().tobytes()
    return IntegerBytes(packed, coded, encode_escapes(rounded.escaped(span)))


def _read_chunk(chunk: CodedIntegers, turned: npt.NDArray[np.float32], start: int) -> None:
    """Fill turned [coded or more, T] with the coefficients of a chunk, from token `start` on."""
    turned[len(chunk.classes) :, start : start + chunk.n_tokens] = 0
    side = torch.frombuffer(bytearray(_on_host(chunk.activities)), dtype=torch.uint8)
    activities = unpack(side, chunk.n_tokens, ACTIVITY_BITS).numpy().astype(np.uint8)
    symbols = decode_symbols(_on_host(chunk.symbols), chunk.classes, activities, chunk.tables.rans)
    from ..coding.joint.rounding_kernels import dequantize_symbols

    offsets, data = chunk.tables.offsets, _on_host(chunk.escapes)
    # An escaped value takes a byte at least.
    places = np.empty(len(data), np.int64)
    step = np.float32(chunk.step)
    count = dequantize_symbols(symbols, chunk.classes, activities, offsets, step, turned, start, places)
    escaped = decode_escapes(data, int(count))
    if count:
        columns, tokens = np.divmod(places[:count], chunk.n_tokens)
        its_offsets = torch.from_numpy(offsets[activities[tokens], chunk.classes[columns]])
        turned[columns, start + tokens] = dequantize(torch.from_numpy(escaped), its_offsets, chunk.step).numpy()


def _on_host(data: Bytes) -> bytes:
    return data if isinstance(data, bytes) else data.cpu().numpy().tobytes()
