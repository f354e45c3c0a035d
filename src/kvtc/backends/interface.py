"""What profiles and the codec ask of a backend: the arithmetic of a stage, for many chunks at once.

The order of stages and the meaning of bytes are not its business; those are the codec's and the profiles'. Every backend gives
the same integers; decoded values agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..coding.joint.probability import ProbabilityTables
from ..coding.lossless import BlockCoder
from ..coding.paper.allocation import BitAllocation
from ..coding.rope import Turn

Bytes = bytes | Tensor
"""Bytes in the host's memory, or uint8 on the device."""


@dataclass(frozen=True, eq=False)
class CodedIntegers:
    """The integers of one chunk as they are stored (docs/format.md), and what they stand for.

    activities: two bits a token. symbols: rANS data. escapes: values without a symbol. classes [c]: variance classes of the
    coefficients that are coded, at `step`, with these tables.
    """

    n_tokens: int
    activities: Bytes
    symbols: Bytes
    escapes: Bytes
    classes: npt.NDArray[np.uint8]
    tables: ProbabilityTables
    step: float


@dataclass(frozen=True)
class IntegerBytes:
    """What `CodedIntegers` are stored as."""

    activities: bytes
    symbols: bytes
    escapes: bytes


class Rounded(Protocol):
    """Integers of coefficients, in the form in which the backend that made them writes them."""

    @property
    def bits(self) -> npt.NDArray[np.float32]:
        """[T]: what the tables say the symbols of each token take."""
        ...


@dataclass(frozen=True, eq=False)
class Target:
    """Where one side (keys or values) of a layer goes: in a cache of its own, or in an engine's pages.

    Feature f of head h of token t is data[token_offsets[t] + h * head_stride + f * feature_stride]; data has one axis.
    offsets: int64 [T] on its device; None where there is a view. view: the same as [H, T, D].
    """

    data: Tensor
    offsets: Tensor | None
    head_stride: int
    feature_stride: int
    view: Tensor | None = None

    @classmethod
    def of(cls, side: Tensor) -> Target:
        """A side [H, T, D] of any strides."""
        whole = side.as_strided((side.untyped_storage().nbytes() // side.element_size(),), (1,), 0)
        return cls(whole, None, side.stride(0), side.stride(2), side)

    @property
    def token_offsets(self) -> Tensor:
        """Int64 [T], on its device."""
        if self.view is None:
            return self.offsets  # type: ignore[return-value]
        n_tokens, start = self.view.shape[1], int(self.view.storage_offset())
        return torch.arange(n_tokens, device=self.data.device).mul_(self.view.stride(1)).add_(start)

    def part(self, tokens: slice) -> Target:
        """Some neighbouring tokens of it."""
        offsets = None if self.offsets is None else self.offsets[tokens]
        view = None if self.view is None else self.view[:, tokens]
        return Target(self.data, offsets, self.head_stride, self.feature_stride, view)

    def write(self, side: Tensor) -> None:
        """Copy [H, T, D] there, converted to its dtype."""
        if self.view is not None:
            self.view.copy_(side)
            return
        n_heads, _, n_features = side.shape
        heads = torch.arange(n_heads, device=self.data.device)[:, None, None] * self.head_stride
        features = torch.arange(n_features, device=self.data.device) * self.feature_stride
        places = self.token_offsets[:, None] + heads + features
        # By bytes: not every device assigns fp8 by index.
        _as_integers(self.data)[places] = _as_integers(side.to(self.data.device, self.data.dtype))


class Backend(Protocol):
    """Safe to share between threads."""

    name: str
    """As it is asked for."""
    device: torch.device
    """Where its tensors live."""
    block_coder: BlockCoder | None
    """Codes the blocks of lossless coders, in place of the host."""

    def batch_tokens(self, row_features: int) -> int:
        """How many tokens with rows of so many features are best encoded at once; a chunk at least is."""
        ...

    def gather(self, keys: Tensor, values: Tensor, turns: Sequence[Turn | None]) -> Tensor:
        """Keys and values [L, H, n, D] of tokens, as cached -> their joint rows [n, P] float32, keys first, turned back.

        turns: of each layer, as `Rope.turns` gives them.
        """
        ...

    def place(self, keys: Tensor, values: Tensor, turn: Turn | None, targets: tuple[Target, Target]) -> None:
        """Rows of one layer [T, H, D], keys before rotation -> turned, saturated to the dtype of the targets, written there."""
        ...

    def round(
        self, coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> Rounded:
        """Coefficients [T, r] float32 -> integers of the first c, whose variance classes are given (`coding.rounding`)."""
        ...

    def write_integers(
        self, rounded: Any, spans: Sequence[slice], classes: npt.NDArray[np.uint8], tables: ProbabilityTables
    ) -> list[IntegerBytes]:
        """What `round` gave for these classes and tables -> bytes of chunks; spans: their tokens."""
        ...

    def read_integers(self, chunks: Sequence[CodedIntegers], rank: int) -> Tensor:
        """Coefficients [T, rank] float32 of all tokens of all chunks in order, of any strides; what is not coded is 0.

        Raises `CorruptStream`.
        """
        ...

    def pack_groups(self, coefficients: Tensor, spans: Sequence[slice], allocation: BitAllocation) -> list[bytes]:
        """Coefficients [T, >= n] float32 -> bytes of chunks before lossless coding (`coding.groups`); spans: their tokens."""
        ...

    def unpack_groups(self, chunks: Sequence[Bytes], counts: Sequence[int], allocation: BitAllocation) -> Tensor:
        """Inverse of `pack_groups`, for chunks of so many tokens: [T, n] float32."""
        ...


def _as_integers(values: Tensor) -> Tensor:
    """The same bits as integers of the same size."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
