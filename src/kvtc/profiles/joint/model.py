"""What the encoder and the decoder of the profiles `joint` and `conditional` share."""

from __future__ import annotations

from functools import cached_property

import torch

from ...backends import Backend
from ...cache import CacheGeometry
from ...calibration.joint_calibration import CoefficientModel, JointCalibration
from ...coding.joint.importance import Importance
from ...coding.joint.uniform_quantizer import BOUNDS
from ...process.locks import ForkSafeLock
from ...recomputation import Recomputation
from .chunk_bytes import least_bytes, level_bytes
from .plan import ServedSteps
from .prediction import RowPrediction
from .transform import JointTransform


class JointModel:
    """The distribution of coefficients, and the matrices, made at first need.

    geometry: of the group. importance: of tokens; None where all have one step. steps: that the tables of all groups serve.
    prediction: what is taken off the rows before they are coded; None for `joint`.
    """

    def __init__(
        self,
        joint: JointCalibration,
        geometry: CacheGeometry,
        backend: Backend,
        product: torch.dtype,
        importance: Importance | None,
        steps: ServedSteps,
        prediction: RowPrediction | None = None,
    ) -> None:
        self._joint = joint
        self._product = product
        self._transform: JointTransform | None = None
        self._lock = ForkSafeLock()
        self.backend = backend
        self.geometry = geometry
        self.importance = None if importance is None else importance.to(backend.device)
        self.prediction = prediction
        self.coefficients: CoefficientModel = joint.coefficients
        self.steps = steps

    @property
    def recomputation(self) -> Recomputation | None:
        """Recomputes the layers that prediction needs."""
        return None if self.prediction is None else self.prediction.recomputation

    @property
    def n_own(self) -> int:
        """How many of the cache's layers are recomputed, and not coded."""
        return 0 if self.prediction is None else self.prediction.n_own

    @cached_property
    def cheap_step(self) -> float:
        """The finest step that needs no coefficient of the remainder, for which rows are projected twice."""
        places = (~self._joint.basis.of_vectors).nonzero()
        return float(self.coefficients.deviations[int(places[0])] / BOUNDS[0]) if len(places) else 0.0

    def least_bytes(self, n_tokens: int) -> int:
        """What a chunk of n_tokens takes at least."""
        return least_bytes(n_tokens) + (0 if self.importance is None else level_bytes(n_tokens))

    def transform(self) -> JointTransform:
        """The matrices on the backend's device."""
        with self._lock:
            if self._transform is None:
                n_coded = self.geometry.n_layers - self.n_own
                self._transform = JointTransform(self._joint, n_coded, self.backend, self._product)
            return self._transform
