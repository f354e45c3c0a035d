"""Where a chunk stands in its text: said by the engine, or found from the keys themselves.

Keys are coded as they were before rotation, so the coder must know by how much each was rotated. If
an engine does not say where a chunk stands, its mean key is rotated back by every possible offset,
and the offset with the result nearest to the calibrated mean key is taken. A wrong offset does not
falsify the cache: rotation is orthogonal, and the stream records the offset. But keys that are
rotated back by a wrong offset, like those of another model or layout, are not what the basis was
calibrated for. Such keys are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..calibration import Calibration
from ..coding.joint.basis import joint_times_scales
from ..coding.transform import cache_side_of, rows_of
from ..errors import UnsupportedLayout
from ..process.locks import ForkSafeLock
from ..process.torch_state import neutral_torch_state

_SAMPLED_TOKENS, _SAMPLED_DIRECTIONS = 8, 256
_LARGEST_DEVIATION = 2.5
"""Keys of the calibrated model are near 1, of texts unlike any calibrated on below 2; turned or
read wrongly they are above 3."""
_TYPICAL = 0.53
"""Geometric mean of the size of a normally distributed number, in standard deviations."""
_TINY = 1e-12


@dataclass(frozen=True)
class _KnownKeys:
    """Of keys before rotation, as rows of F features: their mean [F], some directions of what is known [P, n], and how far rows
    are from their mean along these [n]. P: F, or the features of keys and values where only joint rows are known."""

    mean: Tensor
    row_mean: Tensor
    vectors: Tensor
    deviations: Tensor


@lru_cache(maxsize=16)
def _known_keys(calibration: Calibration) -> _KnownKeys:
    if calibration.joint is None or calibration.key is not None:
        basis = calibration.sides[0].basis
        some = slice(None, None, max(1, basis.rank // _SAMPLED_DIRECTIONS))
        mean, vectors, deviations = basis.mean, basis.vectors[:, some], basis.spectrum[some].sqrt()
    else:
        joint, metric = calibration.joint.basis, calibration.joint.metric
        some = slice(None, None, max(1, joint.rank // _SAMPLED_DIRECTIONS))
        mean = metric.unweigh(joint.mean[None])[0]
        weighed = joint_times_scales(joint.vectors[:, some], joint.scales[:, some], joint.turns)
        vectors = metric.weigh(weighed.mT.contiguous()).mT
        deviations = torch.from_numpy(calibration.joint.coefficients.deviations)[joint.of_vectors.cpu()][some]
    mean, vectors, deviations = (one.float().cpu() for one in (mean, vectors, deviations))
    n_features = calibration.geometry.side_features[0]
    return _KnownKeys(mean[:n_features], mean, vectors, deviations.clamp_min(_TINY**0.5))


@neutral_torch_state
def find_start(keys: Tensor, calibration: Calibration, spacing: int, limit: int) -> int:
    """The likeliest position of a chunk's first token.

    Parameters:
        keys: [L, H, T, D], as an engine caches them, rotated.
        calibration: Of these layers and heads.
        spacing: Positions that are tried are multiples of it.
        limit: They are below it.
    """
    geometry = calibration.geometry
    mean = cache_side_of(_known_keys(calibration).mean[None], geometry.n_layers, geometry.n_kv_heads)
    starts = torch.arange(0, max(limit, 1), spacing)
    offsets = torch.arange(keys.shape[2])
    # Frequencies that depend on a text's length are refused before anything is coded, so any length
    # serves here.
    distance = torch.zeros(len(starts), dtype=torch.float32)
    for layer in range(geometry.n_layers):
        turned = geometry.rope.turn_layer(layer, keys[layer].cpu(), offsets, 1, inverse=True)
        candidates = turned.mean(dim=1, keepdim=True).expand(-1, len(starts), -1)
        candidates = geometry.rope.turn_layer(layer, candidates, starts, 1, inverse=True)
        distance += (candidates - mean[layer]).square().sum(dim=(0, 2))
    return int(starts[distance.argmin()])


@neutral_torch_state
def check_fit(keys: Tensor, values: Tensor, calibration: Calibration, start: int) -> None:
    """Refuse keys that are not those of the calibrated model, or are not at this position.

    Of a few tokens and directions of the calibrated basis: the distance of the keys from the
    calibrated mean, divided by the distance that keys had at calibration. It is a geometric mean,
    so that a few outliers do not count.

    Parameters:
        keys, values: [L, H, T, D], as an engine caches them, rotated.
        calibration: Of these layers and heads.
        start: Position of the first token.

    Raises:
        UnsupportedLayout: The keys do not fit.
    """
    geometry, known = calibration.geometry, _known_keys(calibration)
    every = max(1, keys.shape[2] // _SAMPLED_TOKENS)
    positions = torch.arange(start + every // 2, start + keys.shape[2], every)
    sample = geometry.rope.unrotate(keys[:, :, every // 2 :: every].cpu(), positions, 1)
    rows = torch.cat([rows_of(sample), rows_of(values[:, :, every // 2 :: every].cpu())], dim=1)
    coefficients = (rows[:, : len(known.row_mean)] - known.row_mean) @ known.vectors
    relative = coefficients.abs() / known.deviations
    deviation = float(relative.clamp_min(_TINY).log().mean().exp()) / _TYPICAL
    if deviation > _LARGEST_DEVIATION:
        raise UnsupportedLayout(
            f"these keys are {deviation:.1f} times as far from the calibrated mean as keys were at calibration; expected at most "
            f"{_LARGEST_DEVIATION}: another model, another layout of pages, or not at position {start}"
        )


class KnownStarts:
    """Positions of chunks by the engine's names of them. Safe to share between threads.

    Parameters:
        capacity: Names that are remembered; the oldest is forgotten first.
    """

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._lock = ForkSafeLock()
        self._starts: OrderedDict[bytes, int] = OrderedDict()
        self._capacity = capacity

    def learn(self, names: Sequence[bytes], n_tokens: int) -> None:
        """Note the chunks of one text, in order, each of n_tokens."""
        with self._lock:
            for index, name in enumerate(names):
                self._starts[name] = index * n_tokens
                self._starts.move_to_end(name)
            while len(self._starts) > self._capacity:
                self._starts.popitem(last=False)

    def get(self, name: bytes) -> int | None:
        """The position of a chunk's first token; None: not known."""
        with self._lock:
            return self._starts.get(name)
