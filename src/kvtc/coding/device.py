"""Devices that arithmetic is asked to run on."""

from __future__ import annotations

import torch

from ..errors import InvalidArgument
from ..process.torch_state import neutral_torch_state

CPU = torch.device("cpu")


@neutral_torch_state
def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this torch can compute on it; `InvalidArgument` if not."""
    try:
        return torch.empty(0, dtype=torch.uint8, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error


def settle(device: torch.device) -> None:
    """Wait for what this thread asked of a device, so that other threads, on CUDA streams of their own, may use what it made."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
