"""The profiles `joint` and `conditional`: keys and values together in the metric, one step, rANS.

A chunk's bytes (docs/format.md): with `conditional` whether it is predicted; then its integers (`integers`). A chunk that
prediction would only make dearer is coded as `joint` codes it.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..calibration.artifact import Calibration
from ..calibration.joint import CoefficientModel
from ..coding.escapes import escaped_bytes
from ..coding.probability import ESCAPED_BITS
from ..coding.rans import LANES
from ..coding.rounding import Rounded, round_coefficients
from ..coding.transform import project, reconstruct, rows_of
from ..coding.uniform import MAX_SYMBOL, column_classes, dequantize
from ..container import CHUNK_BYTES, HEADER_BYTES, SECTION_BYTES
from ..errors import CorruptStream, InvalidArgument, InvalidCache
from .integers import ACTIVITY_BITS, least_bytes, read_integers, write_integers
from .interface import BodyRows, CodedBody
from .paper_rate import DEFAULT_RATIO

_STEP = struct.Struct("<f")
_SEARCH_TOKENS = 2048
_SEARCH_TURNS = 16
_STEP_RANGE = 2.0**6
"""How far from the calibrated curve's ends a step may lie."""
_CHUNK_OVERHEAD = CHUNK_BYTES + SECTION_BYTES + least_bytes(0)
# A lane of the coder costs 16 to 32 bits beyond its symbols.
_LANE_OVERHEAD = 3
_STREAM_OVERHEAD = HEADER_BYTES + SECTION_BYTES + _STEP.size


@dataclass(frozen=True)
class StepRate:
    """What the profiles with one step may spend: a ratio of original bits to all bits of the body or, if given, a step."""

    ratio: float = DEFAULT_RATIO
    step: float | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.ratio) and self.ratio >= 1):
            raise InvalidArgument(f"a ratio is original over stored bytes and at least 1; got {self.ratio}")
        if self.step is not None and not (isfinite(self.step) and self.step > 0):
            raise InvalidArgument(f"a step must be positive; got {self.step}")


@dataclass(frozen=True)
class StepPlan:
    """The step of all coefficients; a float32, as it is stored."""

    step: float

    def to_bytes(self) -> bytes:
        return _STEP.pack(self.step)


@dataclass(frozen=True)
class _Transform:
    """Float32 matrices on the device: mean [2 p], analysis and synthesis [2 p, r] (they differ by the metric).

    rotation [r, r]: from what analysis gives to what synthesis takes and prediction adds to; None where there is no prediction.
    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    rotation: Tensor | None


@dataclass(frozen=True)
class _Coefficients:
    """Coefficients [n, r] of a chunk and their distribution. is_predicted: they are rotated, and prediction is taken off."""

    values: Tensor
    model: CoefficientModel
    is_predicted: bool

    def rounded(self, step: float) -> tuple[Rounded, npt.NDArray[np.uint8]]:
        """Their integers, and the variance classes of the ones that are coded."""
        classes = column_classes(self.model.deviations, step)
        return round_coefficients(self.values, step, classes, self.model.tables), classes


class JointCoder:
    """with_tokens: `conditional`. rate: what may be spent; None to decode only."""

    is_entropy_coded = True

    def __init__(
        self, calibration: Calibration, device: torch.device, with_tokens: bool, rate: StepRate | None = None
    ) -> None:
        name = "conditional" if with_tokens else "joint"
        joint = calibration.joint
        if joint is None or (with_tokens and joint.tokens is None):
            raise InvalidArgument(f"this calibration was made without the profile {name}; calibrate again with it")
        self.needs_tokens = with_tokens
        self.rate = rate
        self._geometry = calibration.geometry
        self._joint = joint
        self._tokens = joint.tokens if with_tokens else None
        self._model = joint.coefficients if self._tokens is None else self._tokens.coefficients
        self._device = device
        self._working: _Transform | None = None
        self._lock = threading.Lock()
        if rate is not None and rate.step is not None and not self._serves(rate.step):
            least, largest = self._step_bounds()
            raise InvalidArgument(f"the calibration serves steps of {least:.3g} to {largest:.3g}; got {rate.step}")

    def plan(self, chunks: Iterable[BodyRows], n_tokens: int, original_bits: int) -> StepPlan:
        if self.rate is None:
            raise RuntimeError("this coder only decodes")
        if self.rate.step is not None:
            return self._plan(self.rate.step)
        original = 2 * original_bits * self._geometry.row_features
        return self._plan(self._search(chunks, n_tokens, original / self.rate.ratio))

    def encode(self, rows: BodyRows, plan: StepPlan) -> bytes:
        coefficients = self._cheapest(self._coefficients(rows), plan.step)
        rounded, classes = coefficients.rounded(plan.step)
        flag = bytes([coefficients.is_predicted]) if self.needs_tokens else b""
        return flag + write_integers(rounded, classes, coefficients.model.tables)

    def read_plan(self, data: bytes) -> StepPlan:
        if len(data) != _STEP.size:
            raise CorruptStream(f"the rate of this profile takes {_STEP.size} bytes; the section has {len(data)}")
        step = float(_STEP.unpack(data)[0])
        if not self._serves(step):
            raise CorruptStream(f"a step of {step} is outside of what the calibration serves")
        return StepPlan(step)

    def body_bytes(self, plan: StepPlan, n_tokens: int) -> None:  # noqa: ARG002  they depend on the tokens' values
        return None

    def decode(self, bodies: Sequence[CodedBody], plan: StepPlan) -> Tensor:
        """Coefficients [T, r] float32, prediction added."""
        for body in bodies:
            self._check_length(body)
        transform = self._transform()
        n_tokens = sum(body.n_tokens for body in bodies)
        coefficients = torch.zeros(n_tokens, transform.synthesis.shape[1], dtype=torch.float32, device=self._device)
        first = 0
        for body in bodies:
            coefficients[first : first + body.n_tokens] = self._decode_chunk(body, plan.step, transform)
            first += body.n_tokens
        return coefficients

    def restore(self, coefficients: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        transform, geometry = self._transform(), self._geometry
        size = geometry.n_kv_heads * geometry.head_dim
        start = layer * size
        keys, values = (
            reconstruct(coefficients, transform.mean[at : at + size], transform.synthesis[at : at + size])
            for at in (start, geometry.row_features + start)
        )
        return keys, values

    def _decode_chunk(self, body: CodedBody, step: float, transform: _Transform) -> Tensor:
        """Coefficients [n, r] of one chunk as synthesis takes them; all of its bytes must be used."""
        flag, data = (body.data[0], body.data[1:]) if self.needs_tokens else (0, body.data)
        if flag > 1:
            raise CorruptStream(f"a chunk is predicted (1) or not (0); it says {flag}")
        model = self._model if flag else self._joint.coefficients
        classes = column_classes(model.deviations, step)
        values, offsets = read_integers(data, body.n_tokens, classes, model.tables)
        coefficients = torch.zeros(body.n_tokens, len(model.deviations), dtype=torch.float32, device=self._device)
        coefficients[:, : len(classes)] = dequantize(values.to(self._device), offsets.to(self._device), step)
        if flag:
            return coefficients + self._predict(body.triples)
        return coefficients if transform.rotation is None else coefficients @ transform.rotation

    def _check_length(self, body: CodedBody) -> None:
        """`CorruptStream` for less than each token takes at least: no memory is asked for by a count of tokens alone."""
        least = least_bytes(body.n_tokens) + self.needs_tokens
        if len(body.data) < least:
            raise CorruptStream(
                f"a chunk of {body.n_tokens} tokens needs at least {least} bytes; it has {len(body.data)}"
            )

    def _coefficients(self, rows: BodyRows) -> list[_Coefficients]:
        """What may be coded of rows [L, H, n, D]: with prediction, if there is any, and without."""
        transform = self._transform()
        joint = torch.cat([rows_of(rows.keys), rows_of(rows.values)], dim=1)
        plain = project(joint, transform.mean, transform.analysis)
        choices = [_Coefficients(plain, self._joint.coefficients, is_predicted=False)]
        if transform.rotation is not None:
            residual = plain @ transform.rotation - self._predict(rows.triples)
            choices.insert(0, _Coefficients(residual, self._model, is_predicted=True))
        if not all(bool(choice.values.isfinite().all()) for choice in choices):
            raise InvalidCache("the cache holds values so large that the transform overflows float32")
        return choices

    def _cheapest(self, choices: list[_Coefficients], step: float) -> _Coefficients:
        """The one whose symbols take the fewest bits at this step."""
        if len(choices) == 1:
            return choices[0]
        return min(choices, key=lambda choice: float(choice.rounded(step)[0].bits.sum(dtype=np.float64)))

    def _predict(self, triples: Tensor | None) -> Tensor:
        if self._tokens is None or triples is None:
            raise RuntimeError("prediction needs token ids")
        return self._tokens.predictor.predict(triples).to(self._device)

    def _plan(self, step: float) -> StepPlan:
        return StepPlan(float(np.float32(step)))

    def _serves(self, step: float) -> bool:
        least, largest = self._step_bounds()
        return isfinite(step) and least <= step <= largest

    def _step_bounds(self) -> tuple[float, float]:
        """Float32, as steps are: rounding never takes a step past them."""
        steps = self._model.steps
        return float(np.float32(steps.min() / _STEP_RANGE)), float(np.float32(steps.max() * _STEP_RANGE))

    def _search(self, chunks: Iterable[BodyRows], n_tokens: int, wanted: float) -> float:
        """The step at which these tokens take `wanted` bits each, all bytes of the body counted.

        Bits are those of the tables, for a sample of the tokens; the interval of steps is halved, for bits fall with the step.
        """
        if not n_tokens:
            return self._model.step_for(wanted)
        stride = max(1, n_tokens // _SEARCH_TOKENS)
        expected = self._model.step_for(wanted)
        samples: dict[bool, list[_Coefficients]] = {}
        first, n_bytes = 0, _STREAM_OVERHEAD
        for rows in chunks:
            # Not the first of each chunk: it has no predecessors to be predicted from, so it costs more than others.
            chosen = slice((stride // 2 - first) % stride, None, stride)
            triples = None if rows.triples is None else rows.triples[chosen]
            picked = BodyRows(rows.keys[:, :, chosen], rows.values[:, :, chosen], triples)
            coefficients = self._cheapest(self._coefficients(picked), expected)
            samples.setdefault(coefficients.is_predicted, []).append(coefficients)
            first += rows.n_tokens
            n_bytes += _CHUNK_OVERHEAD + self.needs_tokens + _LANE_OVERHEAD * min(LANES, rows.n_tokens)
        merged = [replace(of[0], values=torch.cat([part.values.cpu() for part in of])) for of in samples.values()]
        overhead = 8 * n_bytes / n_tokens + ACTIVITY_BITS
        low, high = np.log2(self._model.steps.min()), np.log2(self._model.steps.max())
        for _ in range(_SEARCH_TURNS):
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_bits(merged, float(2**middle)) + overhead > wanted else (low, middle)
        return float(2 ** ((low + high) / 2))

    def _transform(self) -> _Transform:
        with self._lock:
            if self._working is None:
                basis, metric = self._joint.basis, self._joint.metric
                vectors = basis.vectors.float()
                rotation = None if self._tokens is None else self._tokens.rotation.float()
                turned = vectors if rotation is None else vectors @ rotation
                self._working = _Transform(
                    metric.unweigh(basis.mean[None])[0].to(self._device),
                    metric.weigh(vectors.T).T.contiguous().to(self._device),
                    metric.unweigh(turned.T).T.contiguous().to(self._device),
                    None if rotation is None else rotation.to(self._device),
                )
            return self._working


def _mean_bits(samples: list[_Coefficients], step: float) -> float:
    """Mean bits a token of the symbols of these samples."""
    bits = 0.0
    for sample in samples:
        rounded, _ = sample.rounded(step)
        large = rounded.values[np.abs(rounded.values) > MAX_SYMBOL]
        bits += float(rounded.bits.sum(dtype=np.float64)) + 8 * escaped_bytes(large) - ESCAPED_BITS * len(large)
    return bits / sum(len(sample.values) for sample in samples)
