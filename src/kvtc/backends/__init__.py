"""Backends: who does the arithmetic of the stages, and for which device.

reference   torch and numba, on any device of torch: the definition
triton      kernels for CUDA devices, on the CPU too where Triton interprets them

Lossless coding is the host's with either, but for what `nvcomp` takes.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from ..errors import BackendUnavailable, InvalidArgument
from . import nvcomp
from .interface import Backend, Bytes, CodedIntegers, IntegerBytes, Rounded, Target
from .reference import ReferenceBackend

NAMES = ("auto", "reference", "triton")

__all__ = [
    "NAMES",
    "Backend",
    "Bytes",
    "Choice",
    "CodedIntegers",
    "IntegerBytes",
    "ReferenceBackend",
    "Rounded",
    "Target",
    "choose",
    "make_backend",
]


@dataclass(frozen=True)
class Choice:
    """A backend for a device by name, and why it is that one."""

    name: str
    reason: str


def choose(device: torch.device, wanted: str = "auto") -> Choice:
    """Which backend computes on a device. Raises `InvalidArgument`, or `BackendUnavailable` where a named one cannot run there."""
    if wanted not in NAMES:
        raise InvalidArgument(f"backend is {wanted!r}; expected one of {', '.join(NAMES)}")
    obstacle = _triton_obstacle(device)
    if wanted == "triton" and obstacle is not None:
        raise BackendUnavailable(f"the backend triton cannot run on {device}: {obstacle}")
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device.type == "cuda" and obstacle is None:
        return Choice("triton", "a CUDA device, and Triton is installed")
    return Choice("reference", obstacle if device.type == "cuda" and obstacle else f"a device of type {device.type}")


def make_backend(device: torch.device, wanted: str = "auto") -> Backend:
    """The backend that `choose` names; on a CUDA device with nvCOMP for the lossless stage, where that is installed."""
    backend: Backend
    if choose(device, wanted).name == "reference":
        backend = ReferenceBackend(device)
    else:
        from .triton import TritonBackend

        backend = TritonBackend(device)
    if nvcomp.obstacle(device) is None:
        backend.block_coder = nvcomp.NvcompBlockCoder(device)
    return backend


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot compute on a device; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "its kernels run on CUDA devices, and on the CPU only with TRITON_INTERPRET=1 in the environment"
