"""What the profile `paper` may spend: from a ratio or an error bound to a bit allocation for keys and one for values."""

from __future__ import annotations

from math import isfinite

import numpy as np

from ...calibration.artifact import Calibration, KindCalibration
from ...coding.paper.allocation import BitAllocation, allocate_bits, allocate_bits_for_error, truncate
from ...coding.paper.group_quantizer import SymbolType
from ...errors import InvalidArgument
from ...process.locks import ForkSafeLock

DEFAULT_RATIO = 16.0

Allocations = tuple[BitAllocation, BitAllocation]


class RateTarget:
    """The rate asked for, checked once; allocations are computed on first use and kept."""

    def __init__(
        self,
        calibration: Calibration,
        ratio: float | None = None,
        key_ratio: float | None = None,
        value_ratio: float | None = None,
        max_error: float | None = None,
        allocation: str = "dynamic",
    ) -> None:
        if max_error is not None and (ratio, key_ratio, value_ratio) != (None, None, None):
            raise InvalidArgument("give either ratios or max_error, not both")
        if max_error is not None and not 0 < max_error < 1:
            raise InvalidArgument(f"max_error is relative and must lie between 0 and 1; got {max_error}")
        if allocation not in ("dynamic", "truncate"):
            raise InvalidArgument(f"allocation must be dynamic or truncate; got {allocation!r}")
        if allocation == "truncate" and max_error is not None:
            raise InvalidArgument("max_error needs allocation='dynamic': truncation measures no error")
        default = DEFAULT_RATIO if ratio is None else ratio
        ratios = (default if key_ratio is None else key_ratio, default if value_ratio is None else value_ratio)
        for value in ratios:
            if not (isfinite(value) and value >= 1):
                raise InvalidArgument(f"a ratio is original over stored bytes and at least 1; got {value}")
        self.ratios = ratios
        self.max_error = max_error
        self._calibration = calibration
        self._truncates = allocation == "truncate"
        self._known: dict[int, Allocations] = {}
        self._lock = ForkSafeLock()
        self._require_room()

    @property
    def key_parts(self) -> dict[str, list[float] | float | bool | None]:
        """What of it goes into the keys of entries."""
        max_error = None if self.max_error is None else float(self.max_error)
        ratios = [float(ratio) for ratio in self.ratios]
        return {"ratios": ratios, "max_error": max_error, "truncates": self._truncates}

    def allocations(self, original_bits: int) -> Allocations:
        """Allocations for keys and for values where a cached value counts `original_bits` bits (16, or 8 for fp8)."""
        with self._lock:
            if original_bits not in self._known:
                kinds = (self._calibration.key, self._calibration.value)
                found = tuple(
                    self._allocate(kind, ratio, original_bits) for kind, ratio in zip(kinds, self.ratios, strict=True)
                )
                if not any(allocation.runs for allocation in found):
                    raise InvalidArgument(
                        f"ratios {self.ratios} leave {self._budget(min(self.ratios), original_bits)} bits a token, too few: "
                        f"no group of a cache of {original_bits} bits a value is worth its cost; ask for a lower ratio"
                    )
                self._known[original_bits] = (found[0], found[1])
            return self._known[original_bits]

    def _require_room(self) -> None:
        """A rate that can never be met is the caller's error: say so at once; for a ratio without the dynamic program."""
        if self.max_error is not None:
            self.allocations(16)
            return
        smallest = SymbolType.FP16 if self._truncates else SymbolType.INT2
        needed = smallest.group_bits(1)
        for name, ratio in zip(("keys", "values"), self.ratios, strict=True):
            budget = self._budget(ratio, 16)
            if budget < needed:
                raise InvalidArgument(
                    f"a ratio of {ratio} for {name} leaves {budget} bits a token, too few: the smallest group costs "
                    f"{needed}; ask for a lower ratio"
                )

    def _budget(self, ratio: float, original_bits: int) -> int:
        return int(original_bits * self._calibration.geometry.row_features / ratio)

    def _allocate(self, kind: KindCalibration, ratio: float, original_bits: int) -> BitAllocation:
        budget = self._budget(ratio, original_bits)
        if self._truncates:
            return truncate(kind.basis.rank, budget)
        if self.max_error is None:
            return allocate_bits(kind.distortion, budget)
        # What the basis cannot express is lost before any bit is spent; it counts against the bound.
        expressed = float(np.sum(kind.distortion.energy, dtype=np.float64))
        total = expressed / min(1.0, kind.explained_variance) if expressed else 0.0
        allowed = self.max_error**2 * total - (total - expressed)
        if allowed < 0:
            least = (1 - expressed / total) ** 0.5
            raise InvalidArgument(
                f"a relative error of {self.max_error} cannot be met: the basis alone leaves {least:.4g}"
            )
        return allocate_bits_for_error(kind.distortion, allowed, self._budget(1, original_bits))
