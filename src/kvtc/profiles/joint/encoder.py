"""Encoding with one step: what prediction leaves of a chunk, or the chunk as it is where that takes fewer bits.

A chunk's bytes (docs/format.md): with `conditional` whether the chunk is predicted; then its integers (`chunk_bytes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...backends import Rounded
from ...calibration.joint_calibration import CoefficientModel
from ...coding.joint.uniform_quantizer import column_classes
from ...coding.rans import count_lanes
from ...errors import InvalidArgument, InvalidCache
from ..interface import Budget, CodedRows, Rows, Search, Settled
from ..rates import Rate, Ratio, Step, Truncation
from .chunk_bytes import join_integers, least_bytes
from .model import JointModel
from .plan import FINER_WINDOW, STEP_BYTES, StepPlan
from .step_search import SEARCH_TOKENS, CostEstimate, FinestStep, NearestStep, Sample

# A lane of the coder costs 16 to 32 bits beyond its symbols.
_LANE_BYTES = 3
_NEAR = 0.01
"""How far a body may be from the size that its ratio gives, as a share of it, before another step is tried."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Coefficients [n, r] float32 of some chunks, and their distribution.

    is_predicted: whether they are rotated, and prediction is taken off. spans: rows of each chunk. chunks: which of its batch
    each is.
    """

    values: Tensor
    model: CoefficientModel
    is_predicted: bool
    spans: list[slice]
    chunks: list[int]

    def of(self, chunks: list[int]) -> Coefficients:
        """Some of the chunks."""
        if len(chunks) == len(self.chunks):
            return self
        kept = [self.spans[chunk] for chunk in chunks]
        stops = np.cumsum([span.stop - span.start for span in kept]).tolist()
        spans = [slice(stop - span.stop + span.start, stop) for stop, span in zip(stops, kept, strict=True)]
        return Coefficients(
            torch.cat([self.values[span] for span in kept]), self.model, self.is_predicted, spans, chunks
        )


@dataclass(frozen=True, eq=False)
class ChunkCoefficients:
    """Coefficients of a batch of chunks: of those that are predicted, and of those that are not."""

    parts: list[Coefficients]
    is_window: bool


@dataclass(frozen=True, eq=False)
class Integers:
    """Quantized coefficients of some chunks. classes [c]: variance classes of the c coefficients that are coded."""

    coefficients: Coefficients
    rounded: Rounded
    classes: npt.NDArray[np.uint8]


class JointEncoder:
    """See `Encoder`. rate: `Ratio`, `FixedSize` or `Step`."""

    is_entropy_coded = True

    def __init__(self, model: JointModel, rate: Rate, codes_windows: bool) -> None:
        if not isinstance(rate, Ratio | Step) or isinstance(rate, Truncation):
            raise InvalidArgument(
                f"{type(rate).__name__} is no rate of joint and conditional; give a ratio, a step or a kl"
            )
        if isinstance(rate, Step):
            model.steps.check(rate.step)
        self.needs_tokens = model.predicted is not None
        self._model, self._rate, self._codes_windows = model, rate, codes_windows
        self._backend = model.backend

    def predict(self, rows: Rows) -> Tensor | None:
        return self._model.transform().predict(rows.triples) if self.needs_tokens else None

    def project(self, rows: Rows, predicted: Tensor | None) -> ChunkCoefficients:
        transform, chunks = self._model.transform(), list(range(len(rows.counts)))
        plain = transform.project(rows.values)
        choices = [Coefficients(plain, self._model.plain, is_predicted=False, spans=rows.spans, chunks=chunks)]
        if predicted is not None and self._model.predicted is not None:
            left = transform.rotated(plain) - predicted
            choices.insert(0, Coefficients(left, self._model.predicted, True, rows.spans, chunks))
        if not all(bool(choice.values.isfinite().all()) for choice in choices):
            raise InvalidCache("the cache holds values so large that the transform overflows float32")
        if len(choices) == 1:
            return ChunkCoefficients(choices, rows.is_window)
        step = self._expected_step(rows.original_bits) / (FINER_WINDOW if rows.is_window else 1)
        bits = [self._round(choice, step).rounded.bits for choice in choices]
        costs = np.array([[its_bits[span].sum(dtype=np.float64) for span in rows.spans] for its_bits in bits])
        cheapest = costs.argmin(axis=0)
        parts = [choices[index].of(np.flatnonzero(cheapest == index).tolist()) for index in np.unique(cheapest)]
        return ChunkCoefficients(parts, rows.is_window)

    def search(self, coefficients: Sequence[ChunkCoefficients], budget: Budget) -> Search[StepPlan]:
        steps, expected = self._model.steps, self._expected_step(budget.original_bits)
        least = float(self._model.expected.steps.min())
        if isinstance(self._rate, Step):
            return Settled(self._plan(self._rate.step))
        if budget.at_most is not None:
            if not coefficients:
                return Settled(self._plan(steps.most))
            estimate = self._estimate(coefficients, expected)
            nothing = [(batch.is_window, span.stop - span.start) for batch in coefficients for span in _spans(batch)]
            return FinestStep(
                budget.at_most, estimate, least, steps.most, self._plan, lambda: self._code_nothing(nothing)
            )
        bodies = [batch for batch in coefficients if not batch.is_window]
        if not bodies:
            return Settled(self._plan(expected))
        wanted = self._body_bytes(budget.original_bits) * budget.n_tokens
        most = float(self._model.expected.steps.max())
        estimate = self._estimate(bodies, expected)
        return NearestStep(wanted - budget.other_bytes, _NEAR * wanted, estimate, least, most, self._plan)

    def quantize(self, coefficients: ChunkCoefficients, plan: StepPlan) -> list[Integers]:
        step = plan.step_of(coefficients.is_window)
        return [self._round(part, step) for part in coefficients.parts]

    def entropy_code(self, symbols: list[Integers]) -> list[bytes]:
        coded: dict[int, bytes] = {}
        for part in symbols:
            its = part.coefficients
            flag = bytes([its.is_predicted]) if self.needs_tokens else b""
            written = self._backend.write_integers(part.rounded, its.spans, part.classes, its.model.tables)
            coded |= {chunk: flag + join_integers(data) for chunk, data in zip(its.chunks, written, strict=True)}
        return [coded[chunk] for chunk in sorted(coded)]

    def plan_bytes(self) -> int:
        return STEP_BYTES * (2 if self._codes_windows else 1)

    def least_bytes(self, n_tokens: int) -> int:
        return len(self._nothing(n_tokens))

    def _round(self, coefficients: Coefficients, step: float) -> Integers:
        classes = column_classes(coefficients.model.deviations, step)
        rounded = self._backend.round(coefficients.values, step, classes, coefficients.model.tables)
        return Integers(coefficients, rounded, classes)

    def _plan(self, step: float) -> StepPlan:
        return self._model.steps.plan(step, self._codes_windows)

    def _body_bytes(self, original_bits: int) -> float:
        """What a body token may take at the ratio."""
        ratio = self._rate.ratio if isinstance(self._rate, Ratio) else 1.0
        return 2 * self._model.geometry.row_features * original_bits / 8 / ratio

    def _expected_step(self, original_bits: int) -> float:
        """A step near the one that the search will find."""
        if isinstance(self._rate, Step):
            return self._rate.step
        return self._model.expected.step_for(8 * self._body_bytes(original_bits))

    def _estimate(self, coefficients: Sequence[ChunkCoefficients], near: float) -> CostEstimate:
        """What all chunks cost, from a sample of their tokens."""
        parts = [(part, FINER_WINDOW if batch.is_window else 1.0) for batch in coefficients for part in batch.parts]
        n_tokens = sum(len(part.values) for part, _ in parts)
        stride = max(1, n_tokens // SEARCH_TOKENS)
        sampled: dict[tuple[bool, float], list[Tensor]] = {}
        first, fixed = 0, 0
        for part, finer in parts:
            # Not the first of each chunk: it has no predecessors to be predicted from, so it costs more than others.
            chosen = part.values[(stride // 2 - first) % stride :: stride]
            sampled.setdefault((part.is_predicted, finer), []).append(chosen.cpu())
            first += len(part.values)
            for span in part.spans:
                count = span.stop - span.start
                fixed += least_bytes(count) + self.needs_tokens + _LANE_BYTES * count_lanes(self._model.rank, count)
        weight = n_tokens / sum(len(some) for of in sampled.values() for some in of)
        models = {part.is_predicted: part.model for part, _ in parts}
        samples = [
            Sample(torch.cat(of), models[is_predicted], weight, finer) for (is_predicted, finer), of in sampled.items()
        ]
        return CostEstimate(samples, fixed, near)

    def _nothing(self, n_tokens: int) -> bytes:
        """A chunk whose coefficients are all zero at the largest step: it has the same bytes whatever the cache holds."""
        zeros = torch.zeros(n_tokens, self._model.rank, dtype=torch.float32, device=self._backend.device)
        part = Coefficients(zeros, self._model.expected, self.needs_tokens, [slice(0, n_tokens)], [0])
        return self.entropy_code([self._round(part, self._model.steps.most)])[0]

    def _code_nothing(self, chunks: Sequence[tuple[bool, int]]) -> tuple[StepPlan, CodedRows]:
        """Chunks, windows (True) or bodies with their tokens, in the fewest bytes."""
        most, coded = self._model.steps.most, CodedRows()
        for is_window, n_tokens in chunks:
            coded.add([self._nothing(n_tokens)], is_window)
        return StepPlan(most, most if self._codes_windows else None), coded


def _spans(batch: ChunkCoefficients) -> list[slice]:
    """The spans of a batch's chunks, in order of the chunks."""
    found = {chunk: span for part in batch.parts for chunk, span in zip(part.chunks, part.spans, strict=True)}
    return [found[chunk] for chunk in sorted(found)]
