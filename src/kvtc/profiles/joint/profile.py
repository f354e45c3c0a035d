"""The profiles `joint` and `conditional`: keys and values together in the metric, one step, rANS."""

from __future__ import annotations

import torch

from ...backends import Backend
from ...calibration.artifact import Calibration
from ...errors import InvalidArgument
from ...recomputation import Recomputation
from ..rates import Rate
from .decoder import JointDecoder
from .encoder import JointEncoder
from .model import JointModel
from .plan import ServedSteps
from .prediction import RowPrediction


class JointProfile:
    """See `Profile`. product: dtype that both sides of a product are rounded to."""

    def __init__(self, calibration: Calibration, backend: Backend, product: torch.dtype, *_: object) -> None:
        if calibration.joint is None:
            raise InvalidArgument("this calibration was made without the profile joint; calibrate again with it")
        steps = ServedSteps(*(group.joint.coefficients for group in calibration.groups))
        self._models = [
            JointModel(group.joint, group.geometry, backend, product, group.importance, steps)
            for group in calibration.groups
        ]

    def encoder(self, rate: Rate, codes_windows: bool) -> JointEncoder:
        return JointEncoder(self._models, rate, codes_windows)

    def decoder(self, group: int = 0) -> JointDecoder:
        return JointDecoder(self._models[group])


class ConditionalProfile(JointProfile):
    """The same of what the recomputed layers leave of the rows. recomputation: of the calibrated model."""

    def __init__(
        self,
        calibration: Calibration,
        backend: Backend,
        product: torch.dtype,
        recomputation: Recomputation | None,
    ) -> None:
        conditional, geometry = calibration.conditional, calibration.geometry
        if conditional is None:
            raise InvalidArgument("this calibration was made without the profile conditional; calibrate again with it")
        if recomputation is None:
            raise InvalidArgument(
                "the profile conditional recomputes layers of the model: give Codec(..., model=), a transformers model or the "
                "path of its folder; or use joint, which needs none"
            )
        prediction = RowPrediction(conditional, geometry, recomputation, backend.device)
        steps = ServedSteps(conditional.left.coefficients)
        left, importance = conditional.left, calibration.importance
        self._models = [JointModel(left, geometry, backend, product, importance, steps, prediction)]
