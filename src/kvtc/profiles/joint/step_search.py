"""The search for the step at which coded rows take the bytes asked for (`joint`, `conditional`).

Bytes are estimated first, from the tables and for a sample of the tokens. Then the codec codes all chunks at the step found; where
their real bytes miss what is wanted, the estimate is scaled by how far it was off, and asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, inf, log2, sqrt

import numpy as np
from torch import Tensor

from ...calibration.joint_calibration import CoefficientModel
from ...coding.joint.escapes import escaped_bytes
from ...coding.joint.probability import ESCAPED_BITS
from ...coding.joint.rounding import round_coefficients
from ...coding.joint.uniform_quantizer import MAX_SYMBOL, column_classes
from ..interface import CodedRows
from .plan import StepPlan

SEARCH_TOKENS = 640
_TURNS = 16
_ACCURATE = 4e-3
"""Of the logarithm of the bytes."""
_SLOPE = -0.7
"""Of the logarithm of the bytes over that of the step, before anything is known."""
_CORRECTIONS = 3
_FILL_TURNS, _MOST_FILL_TURNS = 5, 14
# A fixed size is aimed at a little below, and full enough a little below that.
_AIM, _FULL = 0.995, 0.985
_APART = 1.0005

PlanOf = Callable[[float], StepPlan]


@dataclass(frozen=True)
class Sample:
    """Coefficients [n, r] of every so many-th token, on the CPU, and their distribution.

    weight: tokens that each stands for. finer: the stream's step over theirs.
    """

    values: Tensor
    model: CoefficientModel
    weight: float
    finer: float = 1.0


class CostEstimate:
    """Bytes of coded rows at a step, from the bits of the tables.

    fixed_bytes: what they cost at any step. near: a step to begin at.
    """

    def __init__(self, samples: Sequence[Sample], fixed_bytes: float, near: float) -> None:
        self._samples = samples
        self._fixed = fixed_bytes
        self._near = log2(near)
        self._slope = _SLOPE

    def bytes_at(self, step: float) -> float:
        """Expected bytes."""
        bits = (s.weight * symbol_bits(s.values, s.model, step / s.finer) for s in self._samples)
        return self._fixed + fsum(bits) / 8

    def step_for(self, n_bytes: float, low: float, high: float) -> float:
        """The step, low .. high, at which so many bytes are expected.

        By secants on a log-log scale, within an interval that shrinks, for bytes fall with the step.
        """
        least, most = log2(low), log2(high)
        place = min(max(self._near, least), most)
        before: tuple[float, float] | None = None
        for _ in range(_TURNS):
            excess = log2(self.bytes_at(2**place) / max(1.0, n_bytes))
            if abs(excess) < _ACCURATE:
                break
            if before is not None and (excess - before[1]) * (place - before[0]) < 0:
                self._slope = (excess - before[1]) / (place - before[0])
            before = place, excess
            least, most = (place, most) if excess > 0 else (least, place)
            place -= excess / self._slope
            if not least < place < most:
                place = (least + most) / 2
        self._near = place
        return float(np.float32(2**place))


def symbol_bits(values: Tensor, model: CoefficientModel, step: float) -> float:
    """Bits of the symbols of all coefficients [n, r] at a step, escaped values included."""
    rounded = round_coefficients(values, step, column_classes(model.deviations, step), model.tables)
    escaped = rounded.escaped()
    large = escaped[np.abs(escaped) > MAX_SYMBOL]
    return float(rounded.bits.sum(dtype=np.float64)) + 8 * escaped_bytes(large) - ESCAPED_BITS * len(large)


class NearestStep:
    """The search for the step whose bodies take n_bytes, but for `near`; the nearest of a few where none does.

    low, high: within which steps may lie. plan_of: the plan of a step.
    """

    def __init__(
        self, n_bytes: float, near: float, estimate: CostEstimate, low: float, high: float, plan_of: PlanOf
    ) -> None:
        self._wanted, self._near, self._estimate, self._plan_of = n_bytes, near, estimate, plan_of
        self._bounds = low, high
        self._tried = [estimate.step_for(n_bytes, low, high)]
        self.plan = plan_of(self._tried[0])
        self._missed = inf
        self._best = self.plan, CodedRows()

    def goes_on_after(self, coded: CodedRows) -> bool:
        """See `Search`."""
        size, step = sum(map(len, coded.bodies)), self._tried[-1]
        if abs(size - self._wanted) < self._missed:
            self._best, self._missed = (self.plan, coded), abs(size - self._wanted)
        if self._missed <= self._near or len(self._tried) > _CORRECTIONS:
            return False
        step = self._estimate.step_for(self._wanted * self._estimate.bytes_at(step) / size, *self._bounds)
        if step in self._tried:
            return False
        self._tried.append(step)
        self.plan = self._plan_of(step)
        return True

    @property
    def best(self) -> tuple[StepPlan, CodedRows]:
        """See `Search`."""
        return self._best


class FinestStep:
    """The search for a step at which bodies and windows take n_bytes at most, and hardly less.

    low, high: within which steps may lie. plan_of: the plan of a step. nothing: what is coded where no step is found.
    """

    def __init__(
        self,
        n_bytes: int,
        estimate: CostEstimate,
        low: float,
        high: float,
        plan_of: PlanOf,
        nothing: Callable[[], tuple[StepPlan, CodedRows]],
    ) -> None:
        self._most, self._estimate, self._plan_of, self._nothing = n_bytes, estimate, plan_of, nothing
        self._bounds = low, high
        self._exceeds, self._fits = low, high
        self._turn = 0
        self._step = estimate.step_for(_AIM * n_bytes, low, high)
        self.plan = plan_of(self._step)
        self._best: tuple[StepPlan, CodedRows] | None = None

    def goes_on_after(self, coded: CodedRows) -> bool:
        """See `Search`."""
        size, low = sum(map(len, coded)), self._bounds[0]
        if size > self._most:
            self._exceeds = self._step
        else:
            self._fits, self._best = self._step, (self.plan, coded)
            if size >= _FULL * self._most or self._step <= _APART * low:
                return False
        self._turn += 1
        if self._turn >= (_MOST_FILL_TURNS if self._best is None else _FILL_TURNS):
            return False
        off = size / self._estimate.bytes_at(self._step)
        step = self._estimate.step_for(_AIM * self._most / off, *self._bounds)
        if not _APART * self._exceeds < step < self._fits / _APART:
            step = float(np.float32(sqrt(self._exceeds * self._fits)))
        self._step, self.plan = step, self._plan_of(step)
        return True

    @property
    def best(self) -> tuple[StepPlan, CodedRows]:
        """See `Search`."""
        return self._nothing() if self._best is None else self._best
