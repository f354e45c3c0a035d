"""The profile `paper`: keys and values apart, groups of coefficients under a bit allocation, as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ...backends import Backend
from ...calibration.artifact import Calibration
from ...coding.paper.allocation import most_bytes
from ...coding.paper.groups import chunk_bytes
from ...coding.product import PackedRows, all_finite
from ...errors import InvalidArgument, InvalidCache
from ...process.locks import ForkSafeLock
from ..interface import Budget, CodedBody, Rows, Settled
from ..rates import Rate
from .plan import PaperPlan
from .rate import allocations_for, check_rate
from .transform import PaperTransform, SideTransform


@dataclass(frozen=True, eq=False)
class SideCoefficients:
    """Coefficients [n, r] float32 of keys and of values, as many as any bit is spent on, and the rows of each chunk."""

    sides: tuple[Tensor, Tensor]
    spans: list[slice]


PackedSides = tuple[list[bytes], list[bytes]]
"""Quantized groups of keys and of values, an entry for each chunk."""


@dataclass(frozen=True, eq=False)
class DecodedSide:
    """Coefficients [T, n] of keys, or of values, and the transform that leads back from them."""

    coefficients: PackedRows
    transform: SideTransform


DecodedSides = tuple[DecodedSide, DecodedSide]


class PaperProfile:
    """See `Profile`. product: dtype that both sides of a product are rounded to."""

    def __init__(self, calibration: Calibration, backend: Backend, product: torch.dtype, *_: object) -> None:
        self._calibration, self._backend = calibration, backend
        self._transform = PaperTransform(calibration, backend.device, product)

    def encoder(self, rate: Rate, codes_windows: bool) -> PaperEncoder:
        if codes_windows:
            raise InvalidArgument("the profile paper keeps its window exactly: use joint or conditional to code it")
        return PaperEncoder(self._calibration, self._backend, self._transform, rate)

    def decoder(self, group: int = 0) -> PaperDecoder:  # noqa: ARG002  there is one
        return PaperDecoder(self._calibration, self._backend, self._transform)


class PaperEncoder:
    """See `Encoder`. rate: `Ratio`, `SideRatios`, `MaxError` or `Truncation`."""

    recomputation = None
    is_entropy_coded = False

    def __init__(self, calibration: Calibration, backend: Backend, transform: PaperTransform, rate: Rate) -> None:
        check_rate(rate, calibration)
        self._calibration, self._backend, self._transform, self._rate = calibration, backend, transform, rate
        self._plans: dict[int, PaperPlan] = {}
        self._lock = ForkSafeLock()

    def plan(self, original_bits: int) -> PaperPlan:
        """The plan of every cache of so many bits a value; the dynamic program runs once for each."""
        with self._lock:
            if original_bits not in self._plans:
                self._plans[original_bits] = PaperPlan(allocations_for(self._rate, self._calibration, original_bits))
            return self._plans[original_bits]

    def predict(self, rows: Rows) -> None:  # noqa: ARG002  the profile predicts nothing
        return None

    def project(self, rows: Rows, predicted: Tensor | None) -> SideCoefficients:  # noqa: ARG002
        key_rows, value_rows = torch.split(rows.values, list(self._calibration.geometry.side_features), dim=1)
        key, value = self.plan(rows.original_bits).allocations
        keys = self._transform.side(0, key.n_coefficients).coefficients(key_rows, key.n_coefficients)
        values = self._transform.side(1, value.n_coefficients).coefficients(value_rows, value.n_coefficients)
        if not (all_finite(keys) and all_finite(values)):
            raise InvalidCache("the cache holds values so large that the transform overflows float32")
        return SideCoefficients((keys, values), rows.spans)

    def search(self, coefficients: Sequence[SideCoefficients], budget: Budget) -> Settled[PaperPlan]:  # noqa: ARG002
        return Settled(self.plan(budget.original_bits))

    def quantize(self, coefficients: SideCoefficients, plan: PaperPlan) -> PackedSides:
        keys, values = (
            self._backend.pack_groups(side, coefficients.spans, allocation)
            for side, allocation in zip(coefficients.sides, plan.allocations, strict=True)
        )
        return keys, values

    def entropy_code(self, symbols: PackedSides) -> list[bytes]:
        # A lossless coder follows, that of the container's sections.
        return [keys + values for keys, values in zip(*symbols, strict=True)]

    def plan_bytes(self) -> int:
        return 0

    def least_bytes(self, n_tokens: int) -> int:  # noqa: ARG002  the profile has no such bound
        raise InvalidArgument("the profile paper cannot keep to a fixed size: use joint or conditional")


class PaperDecoder:
    """See `Decoder`."""

    recomputation = None

    def __init__(self, calibration: Calibration, backend: Backend, transform: PaperTransform) -> None:
        key, value = calibration.sides
        self._ranks = key.basis.rank, value.basis.rank
        self._backend, self._transform = backend, transform
        self.most_plan_bytes = sum(map(most_bytes, self._ranks))

    def read_plan(self, data: bytes) -> PaperPlan:
        return PaperPlan.from_bytes(data, self._ranks)

    def body_bytes(self, plan: PaperPlan, n_tokens: int) -> int:
        return sum(chunk_bytes(allocation, n_tokens) for allocation in plan.allocations)

    def fewest_bytes(self, n_tokens: int) -> int:  # noqa: ARG002  `body_bytes` says how many
        return 0

    def entropy_decode(self, bodies: Sequence[CodedBody[PaperPlan]]) -> DecodedSides:
        plans = [(plan, list(same)) for plan, same in groupby(bodies, key=lambda body: body.plan)]
        return self._decoded(0, plans), self._decoded(1, plans)

    def add_prediction(self, coefficients: DecodedSides, bodies: Sequence[CodedBody[PaperPlan]]) -> DecodedSides:  # noqa: ARG002
        return coefficients

    def reconstruct(self, coefficients: DecodedSides, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = (side.transform.rows(side.coefficients, layer) for side in coefficients)
        return keys, values

    def _decoded(self, index: int, plans: list[tuple[PaperPlan, list[CodedBody[PaperPlan]]]]) -> DecodedSide:
        widest = max((plan.allocations[index].n_coefficients for plan, _ in plans), default=0)
        parts = []
        for plan, bodies in plans:
            allocation = plan.allocations[index]
            cuts = [chunk_bytes(plan.allocations[0], body.n_tokens) for body in bodies]
            data = [body.data[cut:] if index else body.data[:cut] for body, cut in zip(bodies, cuts, strict=True)]
            found = self._backend.unpack_groups(data, [body.n_tokens for body in bodies], allocation)
            n_more = widest - allocation.n_coefficients
            parts.append(torch.nn.functional.pad(found, (0, n_more)) if n_more else found)
        none = torch.zeros(0, widest, dtype=torch.float32, device=self._backend.device)
        coefficients = parts[0] if len(parts) == 1 else torch.cat([none, *parts])
        return DecodedSide(PackedRows(coefficients, self._transform.product), self._transform.side(index, widest))
