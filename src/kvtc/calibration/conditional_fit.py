"""Fitting for the profile `conditional`: a ridge regression of rows on the hidden state, and a basis of what it leaves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..coding.joint.metric import Metric
from ..coding.joint.prediction import hidden_features, n_features
from ..process.progress import track
from .conditional_calibration import ConditionalCalibration, own_layers
from .joint_fit import fit_joint, joint_rows
from .rows import CalibrationRows

REGRESSION_RIDGE = 1e-3
"""Times the number of rows: added to the features' mean squares, which are about one."""


def fit_conditional(
    rows: CalibrationRows,
    hidden_layer: int,
    identity: bytes,
    metric: Metric,
    levels: Tensor | None,
    rank: int,
    seed: int,
) -> ConditionalCalibration:
    """Fit to rows that were accumulated with hidden states, on their device; the calibration is on the CPU.

    Two passes over the rows more than `fit_joint`. Memory there: 8 (2 d + 1) (2 d + 1 + 2 p) bytes for hidden states of d
    features, and what `fit_joint` needs.

    Parameters:
        rows: with the hidden states that enter a layer.
        hidden_layer: that layer, and how many layers are recomputed.
        identity: of their weights.
        metric: of all layers.
        levels, rank, seed: as of `fit_joint`.
    """
    geometry, device = rows.geometry, rows.keys.device
    n_own = own_layers(hidden_layer, geometry)
    behind = geometry.behind(n_own)
    skipped = n_own * geometry.n_kv_heads * geometry.head_dim
    weights, explained = _regression(rows, skipped, behind.n_layers)
    used = weights.to(device).float()

    def left() -> Iterator[Tensor]:
        return (block - features @ used for features, block in _paired(rows, skipped))

    its_metric = metric.behind(n_own, behind.n_layers)
    joint = fit_joint(left, rows.n_rows, device, its_metric, levels, rank, seed, "conditional")
    return ConditionalCalibration(hidden_layer, identity, weights, explained, joint)


def _paired(rows: CalibrationRows, skipped: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of the hidden states, and the joint rows that go with them, block by block."""
    if rows.hidden is None:
        raise RuntimeError("the rows were accumulated without hidden states")
    states = rows.hidden.blocks(rows_at_once=rows.keys.rows_at_once)
    for hidden, block in zip(states, joint_rows(rows.keys, rows.values, skipped), strict=True):
        yield hidden_features(hidden), block


def _regression(rows: CalibrationRows, skipped: int, n_layers: int) -> tuple[Tensor, Tensor]:
    """Weights [2 d + 1, 2 p'] float16 by normal equations, and the share of variance [L', 2] that they explain."""
    if rows.hidden is None:
        raise RuntimeError("the rows were accumulated without hidden states")
    n, device = n_features(rows.hidden.features), rows.keys.device
    of_features = torch.zeros(n, n, dtype=torch.float64, device=device)
    across = torch.zeros((), dtype=torch.float64, device=device)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for features, block in track(_paired(rows, skipped), "regression", "blocks"):
        of_features += (features.T @ features).double()
        across = across + (features.T @ block).double()
        squares = squares + block.double().square().sum(dim=0)
    ridge = REGRESSION_RIDGE * rows.n_rows * torch.eye(n, dtype=torch.float64, device=device)
    weights = torch.linalg.solve(of_features + ridge, across)
    # The last feature is 1, so its products are sums.
    variance = squares - across[-1].square() / rows.n_rows
    left = squares - (weights * (2 * across - of_features @ weights)).sum(dim=0)
    sums = torch.stack([left, variance]).reshape(2, 2, n_layers, -1).sum(dim=-1)
    explained = 1 - sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)
    return weights.half().cpu(), explained.T.float().cpu().contiguous()
