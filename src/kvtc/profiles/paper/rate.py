"""From a rate to the bit allocations of the profile `paper`, one for keys and one for values."""

from __future__ import annotations

import numpy as np

from ...calibration.artifact import Calibration, SideCalibration
from ...coding.paper.allocation import BitAllocation, allocate_bits, allocate_bits_for_error, truncate
from ...coding.paper.group_quantizer import SymbolType
from ...errors import InvalidArgument
from ..rates import FixedSize, MaxError, Rate, Ratio, SideRatios, Step, Truncation

SideAllocations = tuple[BitAllocation, BitAllocation]


def check_rate(rate: Rate, calibration: Calibration) -> None:
    """Raise `InvalidArgument` for a rate that the profile lacks, or that no cache of 16 bits can meet.

    The dynamic program is not run for it.
    """
    if isinstance(rate, Step):
        raise InvalidArgument("the profile paper has no step, which step and kl decide; give a ratio")
    if isinstance(rate, FixedSize):
        raise InvalidArgument("the profile paper cannot keep to a fixed size: use joint or conditional")
    if isinstance(rate, MaxError):
        allocations_for(rate, calibration, 16)
        return
    needed = (SymbolType.FP16 if isinstance(rate, Truncation) else SymbolType.INT2).group_bits(1)
    ratios = _ratios(rate)
    for name, ratio, budget in zip(("keys", "values"), ratios, _budgets(calibration, ratios, 16), strict=True):
        if budget < needed:
            raise InvalidArgument(
                f"a ratio of {ratio} for {name} leaves {budget} bits a token, too few: the smallest group costs "
                f"{needed}; ask for a lower ratio"
            )


def allocations_for(rate: Rate, calibration: Calibration, original_bits: int) -> SideAllocations:
    """The allocations of keys and of values where a cached value counts `original_bits` bits (16, or 8 for fp8).

    Raises `InvalidArgument` where nothing would be stored at all.
    """
    sides = calibration.sides
    if isinstance(rate, MaxError):
        key, value = (
            _allocate_for_error(side, rate.max_error, most)
            for side, most in zip(sides, _budgets(calibration, (1, 1), original_bits), strict=True)
        )
        return key, value
    ratios = _ratios(rate)
    budgets = _budgets(calibration, ratios, original_bits)
    key, value = (
        truncate(side.basis.rank, budget) if isinstance(rate, Truncation) else allocate_bits(side.distortion, budget)
        for side, budget in zip(sides, budgets, strict=True)
    )
    if not (key.runs or value.runs):
        raise InvalidArgument(
            f"ratios {ratios} leave {max(budgets)} bits a token, too few: no group of a cache of {original_bits} bits a value "
            "is worth its cost; ask for a lower ratio"
        )
    return key, value


def _ratios(rate: Rate) -> tuple[float, float]:
    """Of keys and of values."""
    if isinstance(rate, SideRatios):
        return rate.key_ratio, rate.value_ratio
    if isinstance(rate, Ratio):
        return rate.ratio, rate.ratio
    raise InvalidArgument(f"the profile paper has no {type(rate).__name__}")


def _budgets(calibration: Calibration, ratios: tuple[float, float], original_bits: int) -> list[int]:
    """Bits that keys, and values, of one token may take."""
    features = calibration.geometry.side_features
    return [int(original_bits * n / ratio) for n, ratio in zip(features, ratios, strict=True)]


def _allocate_for_error(side: SideCalibration, max_error: float, most_bits: int) -> BitAllocation:
    # What the basis cannot express is lost before any bit is spent; it counts against the bound.
    expressed = float(np.sum(side.distortion.energy, dtype=np.float64))
    total = expressed / min(1.0, side.explained_variance) if expressed else 0.0
    allowed = max_error**2 * total - (total - expressed)
    if allowed < 0:
        least = (1 - expressed / total) ** 0.5
        raise InvalidArgument(f"a relative error of {max_error} cannot be met: the basis alone leaves {least:.4g}")
    return allocate_bits_for_error(side.distortion, allowed, most_bits)
