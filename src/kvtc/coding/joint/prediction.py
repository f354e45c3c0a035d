"""Features of a hidden state from which the rows of deeper layers are predicted, linearly."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_RMS = 1e-6
_LARGEST, _UNIT = 50.0, 10.0
"""Of an entry of a hidden state; a feature of 1 is this entry."""


def n_features(width: int) -> int:
    """Features of a hidden state of this width."""
    return 2 * width + 1


def hidden_features(hidden: Tensor) -> Tensor:
    """Features of hidden states, in which the rows of deeper layers are nearly linear.

    A layer reads its input after a normalization, so the first part is the state at unit root mean square; the second
    part is the state itself, without the few entries that dwarf all others.

    Parameters:
        hidden: [n, d] of any floating-point dtype.

    Returns:
        [n, 2 d + 1] float32; the last feature is 1.
    """
    hidden = hidden.float()
    rms = hidden.square().mean(dim=1, keepdim=True).sqrt().clamp_min(_LEAST_RMS)
    plain = hidden.clamp(-_LARGEST, _LARGEST) / _UNIT
    return torch.cat([hidden / rms, plain, torch.ones_like(rms)], dim=1)
