"""Steps and what they cost in quality: a curve measured with the model, so that a codec can be asked for a quality.

It plays no part in coding: streams hold the step, and the fingerprint does not cover the curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import CorruptCalibration, InvalidArgument
from .joint_calibration import LARGEST, expect


@dataclass(frozen=True, eq=False)
class QualityCurve:
    """Of one profile. steps, kl float64 [S], both rising, S at least 2.

    kl: of next-token predictions from a restored cache against those from the exact one, in nats, with nothing but sinks kept
    exactly: what the mean over many texts does not exceed, with a confidence of 95 %.
    """

    steps: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]

    @classmethod
    def from_measurements(cls, steps: list[float], kl: list[float]) -> QualityCurve:
        """Steps in any order and the KL measured at each; where noise makes it fall with the step, it stands still instead."""
        order = np.argsort(steps)
        rising = np.maximum.accumulate(np.asarray(kl, np.float64)[order])
        return cls(np.asarray(steps, np.float64)[order], np.maximum(rising, np.finfo(np.float64).tiny))

    def step_for(self, kl: float) -> float:
        """The step at which predictions diverge by so much at most; `InvalidArgument` past the ends of the curve."""
        if not self.kl[0] <= kl <= self.kl[-1]:
            raise InvalidArgument(
                f"a KL of {kl:g} nats is outside of what was measured: {self.kl[0]:.3g} .. {self.kl[-1]:.3g}; a ratio= asks for "
                "any other size"
            )
        # Of several steps with one KL the largest: it costs least.
        last = np.append(np.diff(self.kl) > 0, True)
        return float(np.exp(np.interp(np.log(kl), np.log(self.kl[last]), np.log(self.steps[last]))))

    def tensor(self) -> Tensor:
        """[2, S] float64, as the calibration file holds it."""
        return torch.from_numpy(np.stack([self.steps, self.kl]))

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor) -> QualityCurve:
        """Inverse of `tensor`; `CorruptCalibration` for what is no curve."""
        expect(name, tensor, (2, tensor.numel() // 2), torch.float64, 0, LARGEST)
        steps, kl = tensor.numpy()
        if len(steps) < 2 or min(steps[0], kl[0]) <= 0:
            raise CorruptCalibration(f"{name} must hold two or more positive steps and KLs")
        if bool((np.diff(steps) <= 0).any() or (np.diff(kl) < 0).any()):
            raise CorruptCalibration(f"{name} must hold rising steps and rising KLs")
        return cls(steps, kl)
