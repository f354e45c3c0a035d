"""The seam between the codec and a profile: what passes from one stage to the next, as types.

A profile is a folder beside this file, and is registered by its name and number (`profiles.register`). It brings an encoder and a
decoder. Which types it puts between its own stages (coefficients, symbols, plan) is its own business, and the type checker's:

encoder   rows -> predict -> project -> coefficients -> quantize -> symbols -> entropy_code -> bytes
decoder   bytes -> entropy_decode -> coefficients -> add_prediction -> reconstruct, layer by layer -> rows

Where a profile predicts, it has a `recomputation`: the codec recomputes the first layers of the model from token ids, and hands the
profile what they give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..backends import Bytes
from ..recomputation import Recomputation, Recomputed
from .rates import Rate


class Plan(Protocol):
    """How bits are spent in one stream: decided once by the encoder, stored in the section `rate`."""

    def to_bytes(self) -> bytes:
        """The bytes of the section."""
        ...


PlanT = TypeVar("PlanT", bound=Plan)
CoefficientsT = TypeVar("CoefficientsT")
SymbolsT = TypeVar("SymbolsT")
_ProposedT = TypeVar("_ProposedT", bound=Plan, covariant=True)


@dataclass(frozen=True, eq=False)
class Rows:
    """The joint rows of coded tokens of some chunks that follow one another, their keys un-rotated.

    Attributes:
        values: [n, P] float32 on the backend's device; keys of all layers and heads, then values.
        recomputed: what the first layers compute of these tokens; None where the profile predicts nothing.
        counts: tokens of each chunk; they sum to n.
        original_bits: bits of one value in the cache: 16, or 8.
        is_window: whether these are windows of the chunks; else bodies.
        group: which of the groups of the calibration they are of.
    """

    values: Tensor
    recomputed: Recomputed | None
    counts: tuple[int, ...]
    original_bits: int = 16
    is_window: bool = False
    group: int = 0

    @property
    def n_tokens(self) -> int:
        """n."""
        return self.values.shape[0]

    @property
    def spans(self) -> list[slice]:
        """The rows of each chunk."""
        stops = list(accumulate(self.counts))
        return [slice(stop - count, stop) for stop, count in zip(stops, self.counts, strict=True)]


@dataclass(frozen=True)
class Budget:
    """What the coded rows of one stream may cost.

    Attributes:
        original_bytes: of the body tokens in the cache, of all groups that are coded.
        original_bits: bits of one value in the cache: 16, or 8.
        other_bytes: bytes of the stream that count for the body besides its coded rows.
        at_most: bytes that all coded rows together may take, whatever they hold; None where there is no such limit.
    """

    original_bytes: int
    original_bits: int
    other_bytes: int
    at_most: int | None = None


@dataclass(frozen=True)
class CodedRows:
    """The coded bytes of one stream: an entry for each chunk with a body, and for each chunk with a coded window, in order.

    Where several groups are coded, those of the first come first.
    """

    bodies: list[bytes] = field(default_factory=list)
    windows: list[bytes] = field(default_factory=list)

    def add(self, chunks: Sequence[bytes], is_window: bool) -> None:
        """Append the coded bytes of some chunks."""
        (self.windows if is_window else self.bodies).extend(chunks)

    def __iter__(self) -> Iterator[bytes]:
        yield from self.bodies
        yield from self.windows


@dataclass(frozen=True)
class CodedBody(Generic[PlanT]):
    """The coded bytes of one chunk's body, or of its window, with all that its decoder needs besides.

    Attributes:
        data: bytes, or uint8 [bytes] on a device.
        n_tokens: tokens that they hold.
        plan: how bits are spent in the stream that they come from.
        recomputed: as of `Rows`.
        is_window: whether it is a window.
    """

    data: Bytes
    n_tokens: int
    plan: PlanT
    recomputed: Recomputed | None
    is_window: bool = False

    def on(self, device: torch.device) -> CodedBody[PlanT]:
        """The same; bytes that are on a device move to this one, to be read on its current stream."""
        if not isinstance(self.data, Tensor):
            return self
        data = self.data.to(device)
        if data.is_cuda:
            # A store may evict them before they are read, and give their memory to others on another stream.
            data.record_stream(torch.cuda.current_stream(device))
        return replace(self, data=data)


class Search(Protocol[_ProposedT]):
    """The search for the plan whose coded rows take the bytes asked for. It proposes; the codec codes; it looks at the bytes."""

    @property
    def plan(self) -> _ProposedT:
        """The plan to code with next."""
        ...

    def goes_on_after(self, coded: CodedRows) -> bool:
        """Take what was coded with `plan`; whether `plan` is another one now, to be tried as well."""
        ...

    @property
    def best(self) -> tuple[_ProposedT, CodedRows]:
        """The plan that is kept, and what was coded with it."""
        ...


class Settled(Generic[PlanT]):
    """The search of a plan that is given: there is nothing to look for."""

    def __init__(self, plan: PlanT) -> None:
        self.plan = plan
        self._coded = CodedRows()

    def goes_on_after(self, coded: CodedRows) -> bool:
        """Keep the rows; there is no other plan."""
        self._coded = coded
        return False

    @property
    def best(self) -> tuple[PlanT, CodedRows]:
        """The plan, and the rows coded with it."""
        return self.plan, self._coded


class Encoder(Protocol[CoefficientsT, SymbolsT, PlanT]):
    """The stages of a profile that turn rows into bytes, at one rate. Safe to share between threads.

    A chunk's bytes depend on nothing but the chunk and the plan, as far as the backend's products do.
    """

    @property
    def recomputation(self) -> Recomputation | None:
        """Recomputes the layers that prediction needs; None where the profile predicts nothing."""
        ...

    is_entropy_coded: bool
    """Whether coded bytes are final; otherwise a lossless coder is applied to them (`coding.lossless`)."""

    def predict(self, rows: Rows) -> Tensor | None:
        """What the recomputed layers say of the rows of all deeper ones, float32 [n, P']; None without prediction."""
        ...

    def project(self, rows: Rows, predicted: Tensor | None) -> CoefficientsT:
        """Rows, less what is predicted of them, in the calibrated basis. Raises `InvalidCache` where float32 overflows."""
        ...

    def search(self, coefficients: Sequence[CoefficientsT], budget: Budget) -> Search[PlanT]:
        """The search for the plan that meets the rate, for all coefficients of a stream."""
        ...

    def quantize(self, coefficients: CoefficientsT, plan: PlanT) -> SymbolsT:
        """Coefficients as integers."""
        ...

    def entropy_code(self, symbols: SymbolsT) -> list[bytes]:
        """Integers as bytes, an entry for each chunk."""
        ...

    def plan_bytes(self) -> int:
        """Bytes of the plan of every stream; 0 where streams differ."""
        ...

    def least_bytes(self, n_tokens: int) -> int:
        """Bytes that suffice for a chunk of n_tokens, whatever it holds. Raises `InvalidArgument` where none do."""
        ...


class Decoder(Protocol[CoefficientsT, PlanT]):
    """The stages of a profile that turn bytes into rows. Safe to share between threads."""

    @property
    def recomputation(self) -> Recomputation | None:
        """Recomputes the layers that prediction needs; None where the profile predicts nothing."""
        ...

    most_plan_bytes: int
    """Bytes that no plan of the calibration exceeds."""

    def read_plan(self, data: bytes) -> PlanT:
        """The plan of a stream. Raises `CorruptStream` where the bytes cannot be one."""
        ...

    def body_bytes(self, plan: PlanT, n_tokens: int) -> int | None:
        """Bytes of a chunk of n_tokens before lossless coding; None where they do not follow from its tokens."""
        ...

    def fewest_bytes(self, n_tokens: int) -> int:
        """Bytes that no chunk of n_tokens is shorter than, where `body_bytes` does not say how many."""
        ...

    def entropy_decode(self, bodies: Sequence[CodedBody[PlanT]]) -> CoefficientsT:
        """Coefficients of all chunks, of one stream or of several, dequantized in the same pass.

        Raises `CorruptStream` for what cannot be decoded.
        """
        ...

    def add_prediction(self, coefficients: CoefficientsT, bodies: Sequence[CodedBody[PlanT]]) -> CoefficientsT:
        """Coefficients with what the recomputed layers say of the rows, which `reconstruct` adds."""
        ...

    def reconstruct(self, coefficients: CoefficientsT, layer: int) -> tuple[Tensor, Tensor]:
        """Rows of one layer, [T, H * D] in the dtype of the product: keys before rotation, and values."""
        ...


class Profile(Protocol[CoefficientsT, SymbolsT, PlanT]):
    """A profile made ready for one calibration, backend and precision; encoder and decoder share its matrices."""

    def encoder(self, rate: Rate, codes_windows: bool) -> Encoder[CoefficientsT, SymbolsT, PlanT]:
        """The encoder at a rate. codes_windows: whether windows are coded rather than exact.

        Raises `InvalidArgument` for a rate, or windows, that the profile cannot serve.
        """
        ...

    def decoder(self, group: int = 0) -> Decoder[CoefficientsT, PlanT]:
        """The decoder of every stream of the profile. group: of the calibration; `joint` alone has others than the first."""
        ...
