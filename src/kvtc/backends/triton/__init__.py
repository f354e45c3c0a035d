"""Kernels in Triton: for CUDA devices, and for the CPU where Triton interprets them (TRITON_INTERPRET=1).

What no kernel does better than torch is done as the reference does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...coding.rope import Turn
from ..interface import CodedIntegers, Target
from ..reference import ReferenceBackend
from .decoding import DecodeTables, read_integers
from .placing import place


class TritonBackend(ReferenceBackend):
    """device: a CUDA device; the CPU in the interpreter."""

    name = "triton"
    batch_tokens = 8192

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._decode_tables = DecodeTables(device)

    def read_integers(self, chunks: Sequence[CodedIntegers], rank: int) -> Tensor:
        return read_integers(chunks, rank, self._decode_tables, self.device)

    def place(self, keys: Tensor, values: Tensor, turn: Turn | None, targets: tuple[Target, Target]) -> None:
        place(keys, values, turn, targets)
