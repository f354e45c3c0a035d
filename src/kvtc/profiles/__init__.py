"""Profiles: which part stands at each stage of the pipeline.

One that ships with kvtc is a folder here, a class in the table below, and a number in `container.tables`; any other one calls
`register`.

stage           paper                                   joint                       conditional
prediction      none                                    none                        from recomputed layers
transform       keys and values apart                   together                    together, of what prediction leaves
metric          squared error                           sensitivity of predictions  the same
quantizer       groups chosen by a dynamic program      one step                    one step
entropy coder   DEFLATE, or another general coder       rANS, calibrated tables     the same

Lossless streams have none of these stages (`lossless`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backends import Backend
from ..calibration.artifact import Calibration
from ..container.tables import LOSSLESS, name_profile
from ..recomputation import Recomputation
from .interface import Decoder, Encoder, Profile
from .joint.profile import ConditionalProfile, JointProfile
from .lossless import LosslessProfile
from .paper.profile import PaperProfile

# Any: which types a profile puts between its own stages concerns nobody else.
AnyProfile = Profile[Any, Any, Any]
AnyEncoder = Encoder[Any, Any, Any]
AnyDecoder = Decoder[Any, Any]
MakeProfile = Callable[[Calibration, Backend, torch.dtype, Recomputation | None], AnyProfile]

_MADE_BY: dict[str, MakeProfile] = {
    "paper": PaperProfile,
    "joint": JointProfile,
    "conditional": ConditionalProfile,
    LOSSLESS: LosslessProfile,
}


def register(name: str, number: int, make: MakeProfile) -> None:
    """Add a profile that does not ship with kvtc.

    Parameters:
        name: as users ask for it and `inspect` shows it.
        number: 1 to 255, which names it in a stream's header.
        make: makes it ready for a calibration, a backend, the dtype that products are rounded to, and what
            recomputes layers (None: the codec has no model).

    Raises:
        InvalidArgument: the name or the number is taken, or the number is out of range.
    """
    name_profile(name, number)
    _MADE_BY[name] = make


def make_profile(
    name: str, calibration: Calibration, backend: Backend, product: torch.dtype, recomputation: Recomputation | None
) -> AnyProfile:
    """A registered profile, ready for a calibration.

    Raises `InvalidArgument` where the calibration was made without it, or where it needs a model and there is none.
    """
    return _MADE_BY[name](calibration, backend, product, recomputation)


__all__ = ["AnyDecoder", "AnyEncoder", "AnyProfile", "LosslessProfile", "make_profile", "register"]
