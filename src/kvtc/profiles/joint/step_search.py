"""What the profiles with one step may spend, and the search for the step that spends it.

Bytes are estimated first, from the tables and for a sample of the tokens. Then the chunks are coded; where their real bytes miss
what is wanted, the estimate is scaled by how far it was off, and asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, log2, sqrt

import numpy as np

from ...coding.joint.escapes import escaped_bytes
from ...coding.joint.probability import ESCAPED_BITS
from ...coding.joint.rounding import round_coefficients
from ...coding.joint.uniform_quantizer import MAX_SYMBOL, column_classes
from ...errors import InvalidArgument
from ..paper.rate import DEFAULT_RATIO
from .transform import Coefficients

SEARCH_TOKENS = 2048
FINER_WINDOW = 4.0
"""The step of the body over that of a coded window; with a finer one a window costs more bits than its tokens are worth."""
_TURNS = 16
_ACCURATE = 1e-3
"""Of the logarithm of the bytes."""
_SLOPE = -0.7
"""Of the logarithm of the bytes over that of the step, before anything is known."""
_CORRECTIONS = 3
_FILL_TURNS, _MOST_FILL_TURNS = 5, 14
# A fixed size is aimed at a little below, and full enough a little below that.
_AIM, _FULL = 0.995, 0.985
_APART = 1.0005

Encode = Callable[[float], list[bytes]]


@dataclass(frozen=True)
class StepRate:
    """What the profiles with one step may spend: a ratio of original bits to all bits of the body or, if given, a step.

    finer_window: the step over that of coded windows; None where windows are kept exactly.
    """

    ratio: float = DEFAULT_RATIO
    step: float | None = None
    finer_window: float | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.ratio) and self.ratio >= 1):
            raise InvalidArgument(f"a ratio is original over stored bytes and at least 1; got {self.ratio}")
        if self.step is not None and not (isfinite(self.step) and self.step > 0):
            raise InvalidArgument(f"a step must be positive; got {self.step}")

    @property
    def key_parts(self) -> dict[str, float | None]:
        """What of it goes into the keys of entries."""
        step = None if self.step is None else float(self.step)
        return {"ratio": float(self.ratio), "step": step, "finer_window": self.finer_window}


@dataclass(frozen=True)
class Sample:
    """Coefficients of every so many-th token, on the CPU; weight: tokens that each stands for.

    finer: the step over theirs.
    """

    coefficients: Coefficients
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
        bits = (s.weight * symbol_bits(s.coefficients, step / s.finer) for s in self._samples)
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


def symbol_bits(coefficients: Coefficients, step: float) -> float:
    """Bits of the symbols of all tokens, escaped values included."""
    model = coefficients.model
    rounded = round_coefficients(coefficients.values, step, column_classes(model.deviations, step), model.tables)
    large = rounded.values[np.abs(rounded.values) > MAX_SYMBOL]
    return float(rounded.bits.sum(dtype=np.float64)) + 8 * escaped_bytes(large) - ESCAPED_BITS * len(large)


def nearest_step(
    n_bytes: float, near: float, estimate: CostEstimate, encode: Encode, low: float, high: float
) -> tuple[float, list[bytes]]:
    """The step, low .. high, whose coded rows take n_bytes but for `near`, and these rows; the nearest of a few where none does."""
    step = estimate.step_for(n_bytes, low, high)
    best, coded = step, encode(step)
    least = abs(_size(coded) - n_bytes)
    tried, size = {step}, _size(coded)
    for _ in range(_CORRECTIONS):
        step = estimate.step_for(n_bytes * estimate.bytes_at(step) / size, low, high)
        if least <= near or step in tried:
            break
        found = encode(step)
        size = _size(found)
        tried.add(step)
        if abs(size - n_bytes) < least:
            best, coded, least = step, found, abs(size - n_bytes)
    return best, coded


def finest_step(
    n_bytes: int, estimate: CostEstimate, encode: Encode, low: float, high: float
) -> tuple[float, list[bytes]] | None:
    """A step, low .. high, whose coded rows take n_bytes at most and hardly less, and these rows; None if none is found."""
    best: tuple[float, list[bytes]] | None = None
    off, fits, exceeds = 1.0, high, low
    for turn in range(_MOST_FILL_TURNS):
        if best is not None and turn >= _FILL_TURNS:
            break
        step = estimate.step_for(_AIM * n_bytes / off, low, high)
        if turn and not _APART * exceeds < step < fits / _APART:
            step = float(np.float32(sqrt(exceeds * fits)))
        coded = encode(step)
        size = _size(coded)
        off = size / estimate.bytes_at(step)
        if size > n_bytes:
            exceeds = step
        else:
            fits, best = step, (step, coded)
            if size >= _FULL * n_bytes or step <= _APART * low:
                break
    return best


def _size(coded: list[bytes]) -> int:
    return sum(map(len, coded))
