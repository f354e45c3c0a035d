"""What the codec asks of a profile: rows of coded tokens to bytes, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import Bytes


@dataclass(frozen=True)
class BodyRows:
    """Coded tokens of the bodies, or of the windows, of some chunks that follow one another.

    rows [n, 2 p] float32: keys before rotation, then values. triples [n, 3] as `token_triples` makes them, chunk by chunk. counts:
    tokens of each chunk.
    """

    rows: Tensor
    triples: Tensor | None
    counts: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return self.rows.shape[0]

    @property
    def spans(self) -> list[slice]:
        """The tokens of each chunk."""
        stops = list(accumulate(self.counts))
        return [slice(stop - count, stop) for stop, count in zip(stops, self.counts, strict=True)]


@dataclass(frozen=True)
class Allowance:
    """What the coded rows of a stream may cost.

    n_tokens: body tokens. original_bits: of a cached value. other_bytes: of the stream that the body pays for, besides its rows.
    at_most: bytes that all coded rows together may take, whatever they hold; None where there is no such limit.
    """

    n_tokens: int
    original_bits: int
    other_bytes: int
    at_most: int | None = None


class Plan(Protocol):
    """How bits are spent in one stream: decided once, stored in the section `rate`."""

    def to_bytes(self) -> bytes:
        """The section."""
        ...


@dataclass(frozen=True)
class CodedBody:
    """The coded bytes of one chunk's body, or of its window, how its bits are spent, and what is known of its tokens."""

    data: Bytes
    n_tokens: int
    plan: Any
    triples: Tensor | None
    is_window: bool = False

    def on(self, device: torch.device) -> CodedBody:
        """The same, its bytes on that device if they are on any; to be read on the current stream."""
        if not isinstance(self.data, Tensor):
            return self
        data = self.data.to(device)
        if data.is_cuda:
            # A store may evict them before they are read, and give their memory to others on another stream.
            data.record_stream(torch.cuda.current_stream(device))
        return replace(self, data=data)


@dataclass(frozen=True)
class CodedRows:
    """The plan of a stream, and the coded bytes of its bodies and of its windows, in order."""

    plan: Plan
    bodies: list[bytes]
    windows: list[bytes] = field(default_factory=list)


class BodyCoder(Protocol):
    """A profile made ready for one calibration and device. Safe to share between threads."""

    needs_tokens: bool
    """Whether encode and decode need token ids."""
    is_entropy_coded: bool
    """Whether bodies are finished bytes, to which no lossless coder is applied."""
    rate_bytes: int | None
    """Bytes of a plan, if they are always as many."""
    most_rate_bytes: int
    """Bytes that no plan of the calibration exceeds."""

    def least_bytes(self, n_tokens: int) -> int:
        """Bytes that suffice for a chunk of n_tokens, whatever it holds; `InvalidArgument` where none do."""
        ...

    def fewest_bytes(self, n_tokens: int) -> int:
        """Bytes that a chunk of n_tokens takes at the least, whatever it holds, where `body_bytes` does not say how many."""
        ...

    def encode_all(self, chunks: Callable[[bool], Iterable[BodyRows]], allowance: Allowance) -> CodedRows:
        """Decide how bits are spent, and code every chunk; a chunk's bytes depend on nothing but it and the plan, as far as the
        backend's products do.

        chunks: gives the rows of all bodies, or with True of all windows that are to be coded, as often as it is called, some
        chunks at a time.
        """
        ...

    def read_plan(self, data: bytes) -> Plan:
        """The plan of a stream; `CorruptStream` where it cannot be one."""
        ...

    def body_bytes(self, plan: Any, n_tokens: int) -> int | None:
        """Bytes of a chunk before lossless coding, if they follow from its tokens."""
        ...

    def decode(self, bodies: Sequence[CodedBody]) -> Any:
        """Coefficients of all chunks, of one stream or several, whatever `restore` wants them to be.

        Raises `CorruptStream` for what cannot be decoded.
        """
        ...

    def restore(self, coefficients: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Rows [T, H * D] of one layer: keys before rotation, and values; in the dtype of the product."""
        ...
