"""What stands in a profile's place for streams all of whose tokens are exact: there is nothing to encode or to restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend
from ..calibration.artifact import Calibration
from ..errors import InvalidArgument
from .interface import CodedBody, Encoder
from .rates import Rate


@dataclass(frozen=True)
class NoPlan:
    """See `Plan`: no bits are spent."""

    def to_bytes(self) -> bytes:
        return b""


class LosslessProfile:
    """See `Profile`; its own decoder."""

    recomputation = None
    most_plan_bytes = 0

    def __init__(self, calibration: Calibration | None, backend: Backend, *_: object) -> None:  # noqa: ARG002  none is needed
        self._none = torch.empty(0, dtype=torch.float32, device=backend.device)

    def encoder(self, rate: Rate, codes_windows: bool) -> Encoder[None, None, NoPlan]:
        raise InvalidArgument(
            f"nothing of a lossless stream is coded at the rate {rate} (coded windows: {codes_windows})"
        )

    def decoder(self, group: int = 0) -> LosslessProfile:  # noqa: ARG002  all are alike
        return self

    def read_plan(self, data: bytes) -> NoPlan:  # noqa: ARG002  it was held against `most_plan_bytes`
        return NoPlan()

    def body_bytes(self, plan: NoPlan, n_tokens: int) -> int:  # noqa: ARG002  no token is coded
        return 0

    def fewest_bytes(self, n_tokens: int) -> int:  # noqa: ARG002
        return 0

    def entropy_decode(self, bodies: Sequence[CodedBody[NoPlan]]) -> None:
        pass

    def add_prediction(self, coefficients: None, bodies: Sequence[CodedBody[NoPlan]]) -> None:
        pass

    def reconstruct(self, coefficients: None, layer: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self._none, self._none
