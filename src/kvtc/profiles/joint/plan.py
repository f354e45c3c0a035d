"""How the profiles `joint` and `conditional` spend bits in one stream: the step, and which steps a calibration serves."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import isfinite

import numpy as np

from ...calibration.joint_calibration import CoefficientModel
from ...errors import CorruptStream, InvalidArgument

FINER_WINDOW = 4.0
"""The step of bodies over that of coded windows; with a finer one a window costs more bits than its tokens are worth."""
_STEP = struct.Struct("<f")
STEP_BYTES = _STEP.size
_STEP_RANGE = 2.0**6
"""How far from the ends of the calibrated curve a step may lie, as a factor."""


@dataclass(frozen=True)
class StepPlan:
    """The step of all coefficients of bodies, and of coded windows if there may be any; float32, as they are stored."""

    step: float
    window_step: float | None = None

    def to_bytes(self) -> bytes:
        """One step, or both."""
        return b"".join(_STEP.pack(step) for step in (self.step, self.window_step) if step is not None)

    def step_of(self, is_window: bool) -> float:
        """The step of windows, or of bodies. Raises `CorruptStream` where there is none."""
        if not is_window:
            return self.step
        if self.window_step is None:
            raise CorruptStream("a window is coded, but the rate gives no step for it")
        return self.window_step


class ServedSteps:
    """The steps, float32, that a calibration's tables serve, least to most. models: of the groups of a stream."""

    def __init__(self, *models: CoefficientModel) -> None:
        # Float32, as steps are: rounding never takes a step past them.
        self.least = max(float(np.float32(model.steps.min() / _STEP_RANGE)) for model in models)
        self.most = min(float(np.float32(model.steps.max() * _STEP_RANGE)) for model in models)

    def __contains__(self, step: float) -> bool:
        return isfinite(step) and self.least <= step <= self.most

    def check(self, step: float) -> None:
        """Raise `InvalidArgument` for a step outside."""
        if step not in self:
            raise InvalidArgument(f"the calibration serves steps of {self.least:.3g} to {self.most:.3g}; got {step}")

    def plan(self, step: float, codes_windows: bool) -> StepPlan:
        """A step of bodies, and the one of coded windows that follows from it, as they are stored."""
        window_step = max(self.least, step / FINER_WINDOW) if codes_windows else None
        return StepPlan(float(np.float32(step)), None if window_step is None else float(np.float32(window_step)))

    def read_plan(self, data: bytes) -> StepPlan:
        """Inverse of `StepPlan.to_bytes`. Raises `CorruptStream`."""
        if len(data) not in (_STEP.size, 2 * _STEP.size):
            raise CorruptStream(
                f"the rate of this profile takes one step or two of {_STEP.size} bytes; got {len(data)}"
            )
        steps = [float(step) for (step,) in _STEP.iter_unpack(data)]
        for step in steps:
            if step not in self:
                raise CorruptStream(f"a step of {step} is outside of what the calibration serves")
        return StepPlan(*steps)
