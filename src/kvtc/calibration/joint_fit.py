"""Fitting for the profiles `joint` and `conditional`: one basis for keys and values together, in the metric.

The basis spans the leading principal directions of the weighted rows: with `conditional`, of what prediction leaves of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..coding.joint.basis import JointBasis, in_bytes
from ..coding.joint.importance import factors
from ..coding.joint.metric import Metric, times_blocks
from ..coding.transform import Basis, project
from ..errors import InvalidArgument
from .entropy import fit_coefficients
from .joint_calibration import JointCalibration
from .principal import principal_components
from .row_spool import RowSpool

_LEAST_ROWS, _MOST_ROWS, _TABLE_VALUES = 1024, 4096, 1 << 24
"""Of the sample that tables are counted on; so many numbers where that takes no fewer rows and no more."""
Blocks = Callable[[], Iterator[Tensor]]


class WeightedRows:
    """Joint rows in the metric, on their device, as `principal_components` reads them.

    Parameters:
        rows: gives the rows in order, float32 [n, 2 p] blocks of bounded size, as often as it is called.
        n_rows: how many there are.
        metric: of all their features.
        device: where they are.
    """

    def __init__(self, rows: Blocks, n_rows: int, metric: Metric, device: torch.device) -> None:
        self._rows = rows
        self.metric = metric.to(device)
        self.n_rows, self.device = n_rows, device

    def blocks(self, columns: slice = slice(None)) -> Iterator[Tensor]:
        """The weighted rows in order."""
        for rows in self._rows():
            yield self.metric.weigh(rows)[:, columns]


def joint_rows(keys: RowSpool, values: RowSpool, skipped: int = 0) -> Iterator[Tensor]:
    """Rows of two paired spools side by side, float32 [n, 2 p] blocks; skipped: leading features of each that are left out."""
    for sides in zip(keys.blocks(), values.blocks(), strict=True):
        yield torch.cat([side[:, skipped:] for side in sides], dim=1)


def fit_joint(
    rows: Blocks,
    n_rows: int,
    device: torch.device,
    metric: Metric,
    levels: Tensor | None,
    rank: int,
    seed: int,
    name: str,
) -> JointCalibration:
    """Fit to joint rows of un-rotated keys and of values, on their device; the calibration is on the CPU.

    Memory there at most 16 P l + 36 l^2 bytes, with P = 2 p features and l = rank + `OVERSAMPLING`, and a block of rows with its
    intermediate results. Nothing is [P, P] or [rows, P].

    Parameters:
        rows, n_rows, device, metric: as of `WeightedRows`.
        levels: uint8 [n_rows] of the tokens; None where all have one step.
        rank: vectors of the basis, at most.
        seed: of all random draws.
        name: of the profile, for progress.
    """
    if rank < 1:
        raise InvalidArgument(f"joint_rank must be at least 1; got {rank}")
    weighted = WeightedRows(rows, n_rows, metric, device)
    found = principal_components(weighted, rank, seed=seed, name=f"{name} basis").basis
    basis, coefficients = complete(found, metric, sampled(weighted, seed))
    if levels is not None:
        coefficients *= factors(levels[sample_of(weighted, seed)])
    return JointCalibration(basis, metric, fit_coefficients(coefficients))


def complete(found: Basis, metric: Metric, rows: Tensor) -> tuple[JointBasis, Tensor]:
    """The basis with its remainder, and the coefficients [n, r + P] of a sample of weighted rows [n, P] in its order."""
    vectors, scales = in_bytes(found.vectors)
    plain = vectors.float() * scales
    leading = project(rows, found.mean, plain)
    remainder = rows - found.mean - leading @ plain.T
    blocks = remainder.reshape(len(rows), -1, metric.roots.shape[-1]).transpose(0, 1).double()
    turns = torch.linalg.eigh(blocks.mT @ blocks).eigenvectors.flip(2).half()
    both = torch.cat([leading, times_blocks(remainder, turns.float())], dim=1)
    order = both.square().mean(dim=0).argsort(descending=True, stable=True)
    # The vectors keep their order among themselves: at any step those that are coded are the first ones.
    order[order < len(scales)] = torch.arange(len(scales))
    return JointBasis(found.mean, vectors, scales, turns, order.int()), both[:, order]


def table_rows(features: int) -> int:
    """How many rows of so many features tables are counted on, if there are as many."""
    return min(_MOST_ROWS, max(_LEAST_ROWS, _TABLE_VALUES // features))


def sample_of(rows: WeightedRows, seed: int) -> Tensor:
    """Numbers of the rows that tables are counted on, int64, rising."""
    n = table_rows(len(rows.metric.roots.flatten(0, 1)))
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(rows.n_rows)[:n]))


def sampled(rows: WeightedRows, seed: int) -> Tensor:
    """These rows, weighted, on the CPU."""
    chosen, found, start = sample_of(rows, seed), [], 0
    for block in rows.blocks():
        inside = chosen[(chosen >= start) & (chosen < start + len(block))] - start
        found.append(block[inside.to(block.device)].cpu())
        start += len(block)
    return torch.cat(found)
