"""Fitting for the profiles `joint` and `conditional`: one basis for keys and values together, in the metric.

The basis spans the leading principal directions of the weighted rows: with `conditional`, of what prediction leaves of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..coding.joint.basis import JointBasis, joint_in_bytes, joint_times_scales
from ..coding.joint.blocks import HeadBlocks
from ..coding.joint.importance import factors
from ..coding.joint.metric import Metric
from ..coding.transform import Basis, project
from .entropy import fit_coefficients
from .joint_calibration import JointCalibration
from .moments import Covariance

_LEAST_ROWS, _MOST_ROWS, _TABLE_VALUES = 1024, 4096, 1 << 24
"""Of the sample that tables are counted on; so many numbers where that takes no fewer rows and no more."""


def fit_joint(
    covariance: Covariance, rows: Tensor, metric: Metric, levels: Tensor | None, rank: int
) -> JointCalibration:
    """Fit to joint rows of un-rotated keys and of values; the calibration is on the CPU.

    Parameters:
        covariance: of all rows.
        rows: [n, P] float32, those that tables are counted on.
        metric: of their features.
        levels: uint8 [n], of the tokens of these rows; None where all have one step.
        rank: vectors of the basis, at most.
    """
    found = covariance.weighed(metric).components(rank)
    basis, coefficients = complete(found, metric, metric.weigh(rows))
    if levels is not None:
        coefficients *= factors(levels)
    return JointCalibration(basis, metric, fit_coefficients(coefficients))


def complete(found: Basis, metric: Metric, rows: Tensor) -> tuple[JointBasis, Tensor]:
    """The basis with its remainder, and the coefficients [n, r + P] of a sample of weighted rows [n, P] in its order."""
    vectors, scales = joint_in_bytes(found.vectors, metric.roots)
    plain = joint_times_scales(vectors, scales, metric.roots)
    leading = project(rows, found.mean, plain)
    remainder = rows - found.mean - leading @ plain.T
    turns = HeadBlocks(*(_principal(heads) for heads in metric.roots.split(remainder)))
    both = torch.cat([leading, turns.map(Tensor.float).times(remainder)], dim=1)
    order = both.square().mean(dim=0).argsort(descending=True, stable=True)
    # The vectors keep their order among themselves: at any step those that are coded are the first ones.
    order[order < scales.shape[1]] = torch.arange(scales.shape[1])
    return JointBasis(found.mean, vectors, scales, turns, order.int()), both[:, order]


def _principal(heads: Tensor) -> Tensor:
    """Principal directions float16 [n, D, D], the leading one first, of heads [T, n, D]."""
    blocks = heads.transpose(0, 1).double()
    found: Tensor = torch.linalg.eigh(blocks.mT @ blocks).eigenvectors.flip(2).half()
    return found


def table_rows(features: int) -> int:
    """How many rows of so many features tables are counted on, if there are as many."""
    return min(_MOST_ROWS, max(_LEAST_ROWS, _TABLE_VALUES // features))
