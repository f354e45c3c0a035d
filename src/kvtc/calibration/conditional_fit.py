"""Fitting for the profile `conditional`: a ridge regression of rows on the hidden state, and a basis of what it leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coding.joint.metric import Metric
from ..coding.joint.prediction import hidden_features
from .conditional_calibration import ConditionalCalibration, own_layers
from .joint_fit import fit_joint
from .rows import CalibrationRows

REGRESSION_RIDGE = 1e-3
"""Times the number of rows: added to the features' mean squares, which are about one."""


def fit_conditional(
    rows: CalibrationRows,
    sample: tuple[Tensor, Tensor],
    hidden_layer: int,
    identity: bytes,
    metric: Metric,
    levels: Tensor | None,
    rank: int,
) -> ConditionalCalibration:
    """Fit to rows that were gathered with hidden states; the calibration is on the CPU.

    Parameters:
        rows: with the hidden states that enter a layer.
        sample: joint rows [n, P] and hidden states [n, d] of some of their tokens.
        hidden_layer: that layer, and how many layers are recomputed.
        identity: of their weights.
        metric: of all layers.
        levels, rank: as of `fit_joint`.
    """
    n_own = own_layers(hidden_layer, rows.geometry)
    behind = rows.geometry.behind(n_own)
    p, total = rows.geometry.side_features[0], rows.geometry.joint_features
    key_features, value_features = behind.side_features
    chosen = torch.cat([torch.arange(p - key_features, p), torch.arange(total - value_features, total)])
    weights, left_variances, covariance = rows.moments.regression(REGRESSION_RIDGE)
    weights = weights.cpu()[:, chosen].half()
    variances = torch.stack([left_variances, rows.moments.variances()]).cpu()[:, chosen]
    sides = torch.split(variances, list(behind.side_features), dim=1)
    sums = torch.stack([side.reshape(2, behind.n_layers, -1).sum(dim=-1) for side in sides], dim=1)
    explained = (1 - sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)).T.float().contiguous()
    of_sample, hidden = sample
    left = of_sample[:, chosen] - hidden_features(hidden) @ weights.float()
    its_metric = metric.behind(n_own, behind.n_layers)
    joint = fit_joint(covariance.of(chosen), left, its_metric, levels, rank)
    return ConditionalCalibration(hidden_layer, identity, weights, explained, joint)
