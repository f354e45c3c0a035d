"""Group quantization on a GPU: the bytes of many chunks under one bit allocation, and back (docs/format.md, the profile paper)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...coding.paper.allocation import BitAllocation
from ...coding.paper.group_quantizer import SymbolType
from ...coding.paper.groups import chunk_bytes
from ...errors import CorruptStream, InvalidArgument
from ..interface import Bytes
from .group_kernels import BLOCK, pack_scales, pack_symbols, unpack_symbols

_MOST_SYMBOLS = 1 << 30


def pack_groups(coefficients: Tensor, spans: Sequence[slice], allocation: BitAllocation) -> list[bytes]:
    """As `coding.groups.encode_groups` for each span of the tokens of coefficients [T, >= n_coefficients] float32."""
    bounds = [span.indices(len(coefficients))[:2] for span in spans]
    counts = [max(0, stop - start) for start, stop in bounds]
    sizes = [chunk_bytes(allocation, count) for count in counts]
    output = torch.empty(sum(sizes), dtype=torch.uint8, device=coefficients.device)
    if len(output):
        lows, highs = _extremes(coefficients, allocation)
        ranges = lows, highs, lows.shape[1]
        launches = _launches([start for start, _ in bounds], counts, allocation, output.device)
        with torch.cuda.device_of(output):  # type: ignore[no-untyped-call]
            for kind, fields, n_scales, n_places in launches:
                options: dict[str, Any] = {"BITS": int(kind), "num_warps": 8, "enable_fp_fusion": False}
                if kind.has_scale:
                    grid, blocks = _grid(fields, n_scales)
                    pack_scales[grid](*ranges, fields, blocks, output, **options)
                grid, blocks = _grid(fields, -(-n_places * kind.value // 8))
                pack_symbols[grid](coefficients, *coefficients.stride(), *ranges, fields, blocks, output, **options)
    whole = output.cpu().numpy().tobytes()
    stops = np.cumsum([0, *sizes]).tolist()
    return [whole[begin:stop] for begin, stop in pairwise(stops)]


def unpack_groups(
    chunks: Sequence[Bytes], counts: Sequence[int], allocation: BitAllocation, device: torch.device
) -> Tensor:
    """Inverse of `pack_groups`: chunks of so many tokens -> coefficients [T, n_coefficients] float32; dropped ones are zero.

    Raises `CorruptStream` for a chunk of another length than its tokens take.
    """
    for index, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
        if len(chunk) != chunk_bytes(allocation, count):
            raise CorruptStream(
                f"chunk {index}: {len(chunk)} bytes of groups; {count} tokens take {chunk_bytes(allocation, count)}"
            )
    output = torch.zeros(sum(counts), allocation.n_coefficients, dtype=torch.float32, device=device)
    if not any(len(chunk) for chunk in chunks):
        return output
    data = _joined(chunks, device)
    firsts = np.cumsum([0, *counts])[:-1].tolist()
    with torch.cuda.device_of(output):  # type: ignore[no-untyped-call]
        for kind, fields, _, n_places in _launches(firsts, counts, allocation, device):
            grid, blocks = _grid(fields, n_places)
            unpack_symbols[grid](
                data, fields, blocks, output, output.stride(0), BITS=int(kind), num_warps=8, enable_fp_fusion=False
            )
    return output


def _extremes(coefficients: Tensor, allocation: BitAllocation) -> tuple[Tensor, Tensor]:
    """Least and largest of every group with a scale, run after run: float32 [T, groups] each."""
    lows, highs = [coefficients[:, :0]], [coefficients[:, :0]]
    for run in allocation.runs:
        if run.symbol_type.has_scale:
            low, high = coefficients[:, run.start : run.stop].reshape(-1, run.count, run.size).aminmax(dim=-1)
            lows.append(low)
            highs.append(high)
    return torch.cat(lows, dim=1).contiguous(), torch.cat(highs, dim=1).contiguous()


def _launches(
    firsts: Sequence[int], counts: Sequence[int], allocation: BitAllocation, device: torch.device
) -> Iterator[tuple[SymbolType, Tensor, int, int]]:
    """Of every symbol type in use: the fields of its pieces, a chunk's part of a run each, and the most scales and symbols of one.

    Fields int64 [pieces, 8]: first token, tokens, first coefficient, size, groups, index of the first group among those with a
    scale, where shifts and where symbols begin in the bytes of all chunks. firsts: the first token of each chunk.
    """
    n = np.array(counts, np.int64)
    sizes = [chunk_bytes(allocation, count) for count in counts]
    place = np.cumsum([0, *sizes])[:-1].astype(np.int64)
    of_kind: dict[SymbolType, list[npt.NDArray[np.int64]]] = {}
    first_group = 0
    for run in allocation.runs:
        n_scales = run.count * n if run.symbol_type.has_scale else 0 * n
        symbols = run.count * run.size * n
        if int(symbols.max(initial=0)) > _MOST_SYMBOLS:
            raise InvalidArgument(f"{symbols.max()} symbols of one run in a chunk; at most {_MOST_SYMBOLS} are coded")
        same = [np.full_like(n, number) for number in (run.start, run.size, run.count, first_group)]
        fields = np.stack([np.array(firsts, np.int64), n, *same, place, place + 4 * n_scales], axis=1)
        of_kind.setdefault(run.symbol_type, []).append(fields[n > 0])
        place = place + 4 * n_scales + -(-symbols * run.symbol_type.value // 8)
        first_group += run.count if run.symbol_type.has_scale else 0
    for kind, parts in of_kind.items():
        pieces = np.concatenate(parts)
        if len(pieces):
            scales = pieces[:, 1] * pieces[:, 4]
            yield kind, torch.from_numpy(pieces).to(device), int(scales.max()), int((scales * pieces[:, 3]).max())


def _grid(fields: Tensor, n_places: int) -> tuple[tuple[int], int]:
    """Programs of a launch in which a piece has so many places at most, and how many of them a piece has."""
    blocks = -(-n_places // BLOCK.value)
    return (len(fields) * blocks,), blocks


def _joined(chunks: Sequence[Bytes], device: torch.device) -> Tensor:
    """All bytes on the device; those from the host in one copy."""
    if all(isinstance(chunk, bytes) for chunk in chunks):
        return torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8).to(device)  # type: ignore[arg-type]
    parts = [torch.frombuffer(bytearray(c), dtype=torch.uint8) if isinstance(c, bytes) else c for c in chunks if len(c)]
    return torch.cat([part.to(device) for part in parts])
