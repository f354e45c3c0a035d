"""The profiles `joint` and `conditional`: keys and values together in the metric, one step, rANS.

A chunk's bytes (docs/format.md): with `conditional` whether the chunk is predicted, for where prediction would only make it dearer
it is left out; then its integers (`integers`).
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from ...backends import Backend, CodedIntegers
from ...calibration.artifact import Calibration
from ...coding.joint.uniform_quantizer import column_classes
from ...coding.product import PackedRows
from ...coding.rans import count_lanes
from ...errors import CorruptStream, InvalidArgument
from ...process.locks import ForkSafeLock
from ..interface import Allowance, BodyRows, CodedBody, CodedRows
from .chunk_bytes import heads_of, join_integers, least_bytes, split_integers
from .step_search import SEARCH_TOKENS, CostEstimate, Sample, StepRate, finest_step, nearest_step
from .transform import Coefficients, JointTransform, cheapest

_STEP = struct.Struct("<f")
_STEP_RANGE = 2.0**6
"""How far from the calibrated curve's ends a step may lie."""
# A lane of the coder costs 16 to 32 bits beyond its symbols.
_LANE_BYTES = 3
_NEAR = 0.01
"""How far a body may be from the size that its ratio gives, as a share of it, before another step is tried."""


@dataclass(frozen=True)
class StepPlan:
    """The step of all coefficients of bodies, and of coded windows if there may be any; float32, as they are stored."""

    step: float
    window_step: float | None = None

    def to_bytes(self) -> bytes:
        return b"".join(_STEP.pack(step) for step in (self.step, self.window_step) if step is not None)

    def step_of(self, coded: CodedBody) -> float:
        """The step that coded rows were divided by."""
        step = self.window_step if coded.is_window else self.step
        if step is None:
            raise CorruptStream("a window is coded, but the rate gives no step for it")
        return step


class JointCoder:
    """with_tokens: `conditional`. product: dtype of products. rate: what may be spent; None to decode only."""

    is_entropy_coded = True
    most_rate_bytes = 2 * _STEP.size

    def __init__(
        self,
        calibration: Calibration,
        backend: Backend,
        product: torch.dtype,
        with_tokens: bool,
        rate: StepRate | None = None,
    ) -> None:
        name = "conditional" if with_tokens else "joint"
        joint = calibration.joint
        if joint is None or (with_tokens and joint.tokens is None):
            raise InvalidArgument(f"this calibration was made without the profile {name}; calibrate again with it")
        self.needs_tokens = with_tokens
        self.rate = rate
        self.rate_bytes: int | None = _STEP.size * (2 if rate is not None and rate.finer_window else 1)
        self._geometry = calibration.geometry
        self._joint = joint
        self._tokens = joint.tokens if with_tokens else None
        self._model = joint.coefficients if self._tokens is None else self._tokens.coefficients
        self._backend, self._product = backend, product
        self._working: JointTransform | None = None
        self._lock = ForkSafeLock()
        if rate is not None and rate.step is not None:
            self._require_served(rate.step)

    def encode_all(self, chunks: Callable[[bool], Iterable[BodyRows]], allowance: Allowance) -> CodedRows:
        if self.rate is None:
            raise RuntimeError("this coder only decodes")
        if allowance.at_most is not None:
            return self._fill(chunks, allowance.at_most)
        if self.rate.step is not None:
            plan = self._plan(self.rate.step)
            bodies = self._encode_rows(chunks(False), plan.step)
        else:
            plan, bodies = self._meet(chunks(False), lambda step: self._encode_rows(chunks(False), step), allowance)
        return CodedRows(plan, bodies, self._encode_windows(chunks, plan))

    @property
    def finer_window(self) -> float | None:
        """The step over that of coded windows; None where windows are exact."""
        return self._rate().finer_window

    def with_step(self, step: float) -> JointCoder:
        """The same coder at one step; the matrices are shared."""
        self._transform()
        other = copy.copy(self)
        other._lock = ForkSafeLock()
        other.rate = StepRate(step=step, finer_window=self.finer_window)
        other._require_served(step)
        return other

    def least_bytes(self, n_tokens: int) -> int:
        return len(self._encode_nothing(n_tokens))

    def fewest_bytes(self, n_tokens: int) -> int:
        return least_bytes(n_tokens) + self.needs_tokens

    def _meet(
        self, rows: Iterable[BodyRows], encode: Callable[[float], list[bytes]], allowance: Allowance
    ) -> tuple[StepPlan, list[bytes]]:
        """The step that gives the ratio, and the bodies coded with it."""
        ratio = self._rate().ratio
        token_bytes = 2 * self._geometry.row_features * allowance.original_bits / 8
        if not allowance.n_tokens:
            return self._plan(self._model.step_for(8 * token_bytes / ratio)), []
        expected = self._model.step_for(8 * token_bytes / ratio)
        estimate = CostEstimate(*self._sample(rows, allowance.n_tokens, expected), expected)
        wanted = token_bytes * allowance.n_tokens / ratio
        least, most = float(self._model.steps.min()), float(self._model.steps.max())
        step, coded = nearest_step(wanted - allowance.other_bytes, _NEAR * wanted, estimate, encode, least, most)
        return self._plan(step), coded

    def _fill(self, chunks: Callable[[bool], Iterable[BodyRows]], at_most: int) -> CodedRows:
        """Bodies and windows at the finest step at which all of them fit."""
        counts = [sum(rows.n_tokens for rows in chunks(is_window)) for is_window in (False, True)]
        expected = self._model.step_for(8 * max(1, at_most) / max(1, sum(counts)))
        found = [self._sample(chunks(bool(index)), n, expected, bool(index)) for index, n in enumerate(counts) if n]
        samples = [sample for some, _ in found for sample in some]
        estimate = CostEstimate(samples, sum(fixed for _, fixed in found), expected)

        def encode(step: float) -> list[bytes]:
            return self._encode_rows(chunks(False), step) + self._encode_windows(chunks, self._plan(step))

        largest = self._step_bounds()[1]
        fitting = finest_step(at_most, estimate, encode, float(self._model.steps.min()), largest) if found else None
        if fitting is not None:
            plan, coded = self._plan(fitting[0]), fitting[1]
        else:
            plan = StepPlan(largest, largest if self._rate().finer_window else None)
            coded = [self._encode_nothing(rows.n_tokens) for is_window in (False, True) for rows in chunks(is_window)]
        cut = len(coded) - sum(1 for _ in chunks(True))
        return CodedRows(plan, coded[:cut], coded[cut:])

    def _encode_rows(self, chunks: Iterable[BodyRows], step: float) -> list[bytes]:
        return [data for rows in chunks for data in self._encode(self._transform().choices(rows), rows.spans, step)]

    def _encode_windows(self, chunks: Callable[[bool], Iterable[BodyRows]], plan: StepPlan) -> list[bytes]:
        return [] if plan.window_step is None else self._encode_rows(chunks(True), plan.window_step)

    def _encode(self, choices: Sequence[Coefficients], spans: Sequence[slice], step: float) -> list[bytes]:
        """The bytes of chunks, each made of the choice that is cheapest for it."""
        rounded = [choice.rounded(step, self._backend) for choice in choices]
        chosen = [cheapest(rounded, span) for span in spans]
        coded = [b""] * len(spans)
        for index, rows in enumerate(rounded):
            mine = [chunk for chunk, choice in enumerate(chosen) if choice == index]
            flag = bytes([rows.coefficients.is_predicted]) if self.needs_tokens else b""
            for chunk, parts in zip(mine, rows.write([spans[chunk] for chunk in mine], self._backend), strict=True):
                coded[chunk] = flag + join_integers(parts)
        return coded

    def _encode_nothing(self, n_tokens: int) -> bytes:
        """A chunk whose coefficients are all zero at the largest step: it has the same bytes whatever the cache holds."""
        zeros = torch.zeros(n_tokens, len(self._model.deviations), dtype=torch.float32, device=self._backend.device)
        choice = Coefficients(zeros, self._model, self.needs_tokens)
        return self._encode([choice], [slice(0, n_tokens)], self._step_bounds()[1])[0]

    def read_plan(self, data: bytes) -> StepPlan:
        if len(data) not in (_STEP.size, 2 * _STEP.size):
            raise CorruptStream(
                f"the rate of this profile takes one step or two of {_STEP.size} bytes; got {len(data)}"
            )
        steps = [float(step) for (step,) in _STEP.iter_unpack(data)]
        for step in steps:
            if not self._serves(step):
                raise CorruptStream(f"a step of {step} is outside of what the calibration serves")
        return StepPlan(*steps)

    def body_bytes(self, plan: StepPlan, n_tokens: int) -> None:  # noqa: ARG002  they depend on the tokens' values
        return None

    def decode(self, bodies: Sequence[CodedBody]) -> PackedRows:
        """Coefficients [T, n] as the transform restores rows from them, n <= r: no further ones are needed."""
        flags, chunks = [], []
        least = [self.fewest_bytes(body.n_tokens) for body in bodies]
        for body, head in zip(bodies, heads_of([body.data for body in bodies], least), strict=True):
            flag, integers = self._split(body, head)
            flags.append(flag)
            chunks.append(integers)
        transform = self._transform()
        widest = max((len(chunk.classes) for chunk in chunks), default=0)
        rank = widest if transform.rank_follows_coding else len(self._model.deviations)
        coefficients = self._backend.read_integers(chunks, rank)
        if transform.rank_follows_coding:
            return transform.packed(_without_zeros(coefficients))
        tokens = torch.tensor([flag for flag, body in zip(flags, bodies, strict=True) for _ in range(body.n_tokens)])
        for flag in sorted(set(flags)):
            triples = [body.triples for body, its in zip(bodies, flags, strict=True) if its == flag]
            joined = torch.cat([part for part in triples if part is not None])
            here = slice(None) if len(set(flags)) == 1 else (tokens == flag).nonzero()[:, 0].to(coefficients.device)
            coefficients[here] = transform.completed(coefficients[here], bool(flag), joined)
        return transform.packed(coefficients)

    def restore(self, coefficients: PackedRows, layer: int) -> tuple[Tensor, Tensor]:
        return self._transform().restore(coefficients, layer)

    def _split(self, body: CodedBody, head: bytes) -> tuple[int, CodedIntegers]:
        """Whether a chunk is predicted, and the parts of its bytes; head: its least bytes."""
        flag, data = (head[0], body.data[1:]) if self.needs_tokens else (0, body.data)
        if flag > 1:
            raise CorruptStream(f"a chunk is predicted (1) or not (0); it says {flag}")
        model = self._model if flag else self._joint.coefficients
        step = body.plan.step_of(body)
        classes, head = column_classes(model.deviations, step), head[int(self.needs_tokens) :]
        return flag, split_integers(data, head, body.n_tokens, classes, model.tables, step)

    def _require_served(self, step: float) -> None:
        if not self._serves(step):
            least, largest = self._step_bounds()
            raise InvalidArgument(f"the calibration serves steps of {least:.3g} to {largest:.3g}; got {step}")

    def _serves(self, step: float) -> bool:
        least, largest = self._step_bounds()
        return isfinite(step) and least <= step <= largest

    def _step_bounds(self) -> tuple[float, float]:
        """Float32, as steps are: rounding never takes a step past them."""
        steps = self._model.steps
        return float(np.float32(steps.min() / _STEP_RANGE)), float(np.float32(steps.max() * _STEP_RANGE))

    def _rate(self) -> StepRate:
        if self.rate is None:
            raise RuntimeError("this coder only decodes")
        return self.rate

    def _plan(self, step: float) -> StepPlan:
        """A step of the body, and what follows from it, as they are stored."""
        finer, least = self._rate().finer_window, self._step_bounds()[0]
        return StepPlan(float(np.float32(step)), float(np.float32(max(least, step / finer))) if finer else None)

    def _sample(
        self, chunks: Iterable[BodyRows], n_tokens: int, expected: float, is_window: bool = False
    ) -> tuple[list[Sample], float]:
        """Some of the tokens of chunks, and what chunks of so many tokens cost at any step; expected: a step near the one found."""
        stride = max(1, n_tokens // SEARCH_TOKENS)
        finer = (self._rate().finer_window or 1.0) if is_window else 1.0
        parts: dict[bool, list[Coefficients]] = {}
        first, fixed = 0, 0.0
        for rows in (part for batch in chunks for part in single_chunks(batch)):
            # Not the first of each chunk: it has no predecessors to be predicted from, so it costs more than others.
            chosen = slice((stride // 2 - first) % stride, None, stride)
            triples = None if rows.triples is None else rows.triples[chosen]
            picked = rows.rows[chosen]
            choices = self._transform().choices(BodyRows(picked, triples, (len(picked),)))
            rounded = [choice.rounded(expected / finer, self._backend) for choice in choices]
            coefficients = choices[cheapest(rounded, slice(None))]
            parts.setdefault(coefficients.is_predicted, []).append(coefficients)
            first += rows.n_tokens
            n_lanes = count_lanes(coefficients.values.shape[1], rows.n_tokens)
            fixed += least_bytes(rows.n_tokens) + self.needs_tokens + _LANE_BYTES * n_lanes
        weight = n_tokens / sum(len(part.values) for of in parts.values() for part in of)
        merged = [replace(of[0], values=torch.cat([part.values.cpu() for part in of])) for of in parts.values()]
        return [Sample(coefficients, weight, finer) for coefficients in merged], fixed

    def _transform(self) -> JointTransform:
        with self._lock:
            if self._working is None:
                self._working = JointTransform(self._joint, self._tokens, self._geometry, self._backend, self._product)
            return self._working


def _without_zeros(coefficients: Tensor) -> Tensor:
    """Up to the last column that holds anything: at high ratios many that may be coded are zero throughout."""
    used = coefficients.any(dim=0).nonzero()
    return coefficients[:, : int(used[-1]) + 1 if len(used) else 0]


def single_chunks(rows: BodyRows) -> Iterable[BodyRows]:
    """The rows of each chunk."""
    for span, count in zip(rows.spans, rows.counts, strict=True):
        yield BodyRows(rows.rows[span], None if rows.triples is None else rows.triples[span], (count,))
