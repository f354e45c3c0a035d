"""Encoding with one step (docs/format.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...backends import Rounded
from ...coding.joint.importance import multiply
from ...coding.joint.uniform_quantizer import column_classes
from ...coding.product import all_finite
from ...coding.rans import count_lanes
from ...errors import InvalidArgument, InvalidCache
from ..interface import Budget, CodedRows, Rows, Search, Settled
from ..rates import FixedSize, Rate, Ratio, Step, Truncation
from .chunk_bytes import join_integers, join_levels
from .model import JointModel
from .plan import FINER_WINDOW, STEP_BYTES, StepPlan
from .step_search import SEARCH_TOKENS, CostEstimate, FinestStep, NearestStep, Sample

# A lane of the coder costs 16 to 32 bits beyond its symbols.
_LANE_BYTES = 3
_NEAR = 0.01
"""How far a body may be from the size that its ratio gives, as a share of it, before another step is tried."""
_FINER = 1.5
"""How much finer than expected a step may turn out, where a finer one would need more coefficients than are projected."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Coefficients [n, c] float32 of a batch of chunks, the first c of each token, and the rows of each chunk.

    levels: uint8 [n] of the tokens, as their coefficients are multiplied; None where all have one step. model: of their group.
    """

    values: Tensor
    levels: Tensor | None
    spans: list[slice]
    is_window: bool
    model: JointModel


@dataclass(frozen=True, eq=False)
class Integers:
    """Quantized coefficients of some chunks. classes [c]: variance classes of the c coefficients that are coded. model: theirs."""

    levels: Tensor | None
    spans: list[slice]
    rounded: Rounded
    classes: npt.NDArray[np.uint8]
    model: JointModel


class JointEncoder:
    """See `Encoder`. models: of the groups of the calibration, which share the step. rate: `Ratio`, `FixedSize` or `Step`."""

    is_entropy_coded = True

    def __init__(self, models: Sequence[JointModel], rate: Rate, codes_windows: bool) -> None:
        if not isinstance(rate, Ratio | Step) or isinstance(rate, Truncation):
            raise InvalidArgument(
                f"{type(rate).__name__} is no rate of joint and conditional; give a ratio, a step or a kl"
            )
        self._models, self._rate, self._codes_windows = models, rate, codes_windows
        self._backend, self._steps = models[0].backend, models[0].steps
        self.recomputation = models[0].recomputation
        if isinstance(rate, Step):
            self._steps.check(rate.step)

    def predict(self, rows: Rows) -> Tensor | None:
        prediction = self._models[rows.group].prediction
        return None if prediction is None or rows.recomputed is None else prediction.rows(rows.recomputed)

    def project(self, rows: Rows, predicted: Tensor | None) -> Coefficients:
        model = self._models[rows.group]
        values, prediction = rows.values, model.prediction
        if prediction is not None and predicted is not None:
            values = prediction.coded(values) - predicted
        n_columns = self._n_columns(model, rows.original_bits, rows.is_window)
        coefficients = model.transform().project(values, n_columns)
        importance, levels = model.importance, None
        if importance is not None:
            levels = importance.levels(rows.values)
            multiply(coefficients, levels)
        if not all_finite(coefficients):
            raise InvalidCache("the cache holds values so large that the transform overflows float32")
        return Coefficients(coefficients, levels, rows.spans, rows.is_window, model)

    def search(self, coefficients: Sequence[Coefficients], budget: Budget) -> Search[StepPlan]:
        steps, expected = self._steps, min(self._expected_step(model, budget.original_bits) for model in self._models)
        curves = [model.coefficients.steps for model in self._models]
        least = max(float(max(curve.min() for curve in curves)), self._finest_step(budget.original_bits))
        if isinstance(self._rate, Step):
            return Settled(self._plan(self._rate.step))
        if budget.at_most is not None:
            if not coefficients:
                return Settled(self._plan(steps.most))
            estimate = self._estimate(coefficients, expected)
            nothing = [(batch.is_window, span.stop - span.start) for batch in coefficients for span in batch.spans]
            return FinestStep(
                budget.at_most, estimate, least, steps.most, self._plan, lambda: self._code_nothing(nothing)
            )
        bodies = [batch for batch in coefficients if not batch.is_window]
        if not bodies:
            return Settled(self._plan(expected))
        wanted = budget.original_bytes / self._ratio
        most = min(steps.most, float(max(curve.max() for curve in curves)))
        estimate = self._estimate(bodies, expected)
        return NearestStep(wanted - budget.other_bytes, _NEAR * wanted, estimate, least, most, self._plan)

    def quantize(self, coefficients: Coefficients, plan: StepPlan) -> Integers:
        return self._round(coefficients, plan.step_of(coefficients.is_window))

    def entropy_code(self, symbols: Integers) -> list[bytes]:
        tables = symbols.model.coefficients.tables
        written = self._backend.write_integers(symbols.rounded, symbols.spans, symbols.classes, tables)
        if symbols.levels is None:
            return [join_integers(data) for data in written]
        levels = [join_levels(symbols.levels[span]) for span in symbols.spans]
        return [head + join_integers(data) for head, data in zip(levels, written, strict=True)]

    def plan_bytes(self) -> int:
        return STEP_BYTES * (2 if self._codes_windows else 1)

    def least_bytes(self, n_tokens: int) -> int:
        return len(self._nothing(n_tokens))

    def _round(self, coefficients: Coefficients, step: float) -> Integers:
        model = coefficients.model.coefficients
        classes = column_classes(model.deviations, step)
        rounded = self._backend.round(coefficients.values, step, classes, model.tables)
        return Integers(coefficients.levels, coefficients.spans, rounded, classes, coefficients.model)

    def _plan(self, step: float) -> StepPlan:
        return self._steps.plan(step, self._codes_windows)

    @property
    def _ratio(self) -> float:
        return self._rate.ratio if isinstance(self._rate, Ratio) else 1.0

    def _expected_step(self, model: JointModel, original_bits: int) -> float:
        """A step near the one that the search would find for a group alone."""
        if isinstance(self._rate, Step):
            return self._rate.step
        return model.coefficients.step_for(model.geometry.joint_features * original_bits / self._ratio)

    def _finest_step(self, original_bits: int) -> float:
        """No step of a body is finer than this: of all groups together none is than the finest of one of them alone."""
        if isinstance(self._rate, Step):
            return self._rate.step
        if isinstance(self._rate, FixedSize):
            # Exact tokens may leave any number of bytes over.
            return self._steps.least
        alone = [min(self._expected_step(its, original_bits) / _FINER, its.cheap_step) for its in self._models]
        return max(self._steps.least, min(alone))

    def _n_columns(self, model: JointModel, original_bits: int, is_window: bool) -> int:
        """Coefficients that the finest step codes."""
        finest = self._finest_step(original_bits) / (FINER_WINDOW if is_window else 1)
        return len(column_classes(model.coefficients.deviations, float(np.nextafter(np.float32(finest), 0))))

    def _estimate(self, coefficients: Sequence[Coefficients], near: float) -> CostEstimate:
        """What all chunks cost, from a sample of their tokens."""
        samples, fixed = [], 0
        for model in self._models:
            its = [batch for batch in coefficients if batch.model is model]
            n_tokens = sum(len(batch.values) for batch in its)
            stride = max(1, n_tokens // SEARCH_TOKENS)
            sampled: dict[float, list[Tensor]] = {}
            first = 0
            for batch in its:
                chosen = batch.values[(stride // 2 - first) % stride :: stride]
                sampled.setdefault(FINER_WINDOW if batch.is_window else 1.0, []).append(chosen.cpu())
                first += len(batch.values)
                for span in batch.spans:
                    count = span.stop - span.start
                    fixed += model.least_bytes(count) + _LANE_BYTES * count_lanes(batch.values.shape[1], count)
            weight = n_tokens / max(1, sum(len(some) for of in sampled.values() for some in of))
            samples += [Sample(torch.cat(of), model.coefficients, weight, finer) for finer, of in sampled.items()]
        return CostEstimate(samples, fixed, near)

    def _nothing(self, n_tokens: int) -> bytes:
        """A chunk whose coefficients are all zero at the largest step: it has the same bytes whatever the cache holds."""
        model = self._models[0]
        device, n_coefficients = self._backend.device, len(model.coefficients.deviations)
        zeros = torch.zeros(n_tokens, n_coefficients, dtype=torch.float32, device=device)
        levels = None if model.importance is None else torch.zeros(n_tokens, dtype=torch.uint8, device=device)
        part = Coefficients(zeros, levels, [slice(0, n_tokens)], False, model)
        return self.entropy_code(self._round(part, self._steps.most))[0]

    def _code_nothing(self, chunks: Sequence[tuple[bool, int]]) -> tuple[StepPlan, CodedRows]:
        """Chunks, windows (True) or bodies with their tokens, in the fewest bytes."""
        most, coded = self._steps.most, CodedRows()
        for is_window, n_tokens in chunks:
            coded.add([self._nothing(n_tokens)], is_window)
        return StepPlan(most, most if self._codes_windows else None), coded
