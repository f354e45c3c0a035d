"""Kernels in Triton: for CUDA devices, and for the CPU where Triton interprets them (TRITON_INTERPRET=1).

What no kernel does better is left to torch, as the extremes of groups are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...coding.joint.probability import ProbabilityTables
from ...coding.lossless import BlockCoder
from ...coding.paper.allocation import BitAllocation
from ...coding.rope import Turn
from ..interface import Bytes, CodedIntegers, IntegerBytes, Rounded, Target
from . import grouping
from .decoding import DecodeTables, read_integers
from .encoding import EncodeTables, round_coefficients, write_integers
from .gathering import gather
from .placing import place


class TritonBackend:
    """device: a CUDA device; the CPU in the interpreter."""

    name = "triton"
    block_coder: BlockCoder | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._decode_tables = DecodeTables(device)
        self._encode_tables = EncodeTables(device)

    def batch_tokens(self, row_features: int) -> int:  # noqa: ARG002
        return 8192

    def gather(self, keys: Tensor, values: Tensor, turns: Sequence[Turn | None]) -> Tensor:
        return gather(keys, values, turns)

    def place(self, keys: Tensor, values: Tensor, turn: Turn | None, targets: tuple[Target, Target]) -> None:
        place(keys, values, turn, targets)

    def round(
        self, coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> Rounded:
        return round_coefficients(coefficients, step, classes, tables, self._encode_tables)

    def write_integers(
        self, rounded: Any, spans: Sequence[slice], classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> list[IntegerBytes]:
        return write_integers(rounded, spans, classes, tables, self._encode_tables)

    def read_integers(self, chunks: Sequence[CodedIntegers], rank: int) -> Tensor:
        return read_integers(chunks, rank, self._decode_tables, self.device)

    def pack_groups(self, coefficients: Tensor, spans: Sequence[slice], allocation: BitAllocation) -> list[bytes]:
        return grouping.pack_groups(coefficients, spans, allocation)

    def unpack_groups(self, chunks: Sequence[Bytes], counts: Sequence[int], allocation: BitAllocation) -> Tensor:
        return grouping.unpack_groups(chunks, counts, allocation, self.device)
