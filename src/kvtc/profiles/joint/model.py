"""What the encoder and the decoder of the profiles `joint` and `conditional` share."""

from __future__ import annotations

import torch

from ...backends import Backend
from ...cache import CacheGeometry
from ...calibration.artifact import Calibration
from ...calibration.joint_calibration import CoefficientModel
from ...errors import InvalidArgument
from ...process.locks import ForkSafeLock
from .plan import ServedSteps
from .transform import JointTransform


class JointModel:
    """The distributions of coefficients, and the matrices, made at first need.

    plain: of coefficients without prediction. predicted: of what prediction leaves; None for `joint`.
    """

    def __init__(self, calibration: Calibration, backend: Backend, product: torch.dtype, with_tokens: bool) -> None:
        joint = calibration.joint
        if joint is None or (with_tokens and joint.tokens is None):
            name = "conditional" if with_tokens else "joint"
            raise InvalidArgument(f"this calibration was made without the profile {name}; calibrate again with it")
        self._joint = joint
        self._tokens = joint.tokens if with_tokens else None
        self._product = product
        self._transform: JointTransform | None = None
        self._lock = ForkSafeLock()
        self.backend = backend
        self.geometry: CacheGeometry = calibration.geometry
        self.plain: CoefficientModel = joint.coefficients
        self.predicted: CoefficientModel | None = None if self._tokens is None else self._tokens.coefficients
        self.steps = ServedSteps(self.expected)

    @property
    def expected(self) -> CoefficientModel:
        """The distribution of most chunks."""
        return self.plain if self.predicted is None else self.predicted

    @property
    def rank(self) -> int:
        """r: coefficients of a token."""
        return len(self.plain.deviations)

    def transform(self) -> JointTransform:
        """The matrices on the backend's device."""
        with self._lock:
            if self._transform is None:
                self._transform = JointTransform(self._joint, self._tokens, self.geometry, self.backend, self._product)
            return self._transform
