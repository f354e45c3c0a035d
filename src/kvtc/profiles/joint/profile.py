"""The profiles `joint` and `conditional`: keys and values together in the metric, one step, rANS."""

from __future__ import annotations

import torch

from ...backends import Backend
from ...calibration.artifact import Calibration
from ..rates import Rate
from .decoder import JointDecoder
from .encoder import JointEncoder
from .model import JointModel


class JointProfile:
    """See `Profile`. product: dtype that both sides of a product are rounded to. with_tokens: `conditional`."""

    def __init__(self, calibration: Calibration, backend: Backend, product: torch.dtype, with_tokens: bool) -> None:
        self._model = JointModel(calibration, backend, product, with_tokens)

    def encoder(self, rate: Rate, codes_windows: bool) -> JointEncoder:
        return JointEncoder(self._model, rate, codes_windows)

    def decoder(self) -> JointDecoder:
        return JointDecoder(self._model)
