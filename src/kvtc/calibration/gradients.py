"""From gradients to the metric and to the importance of tokens.

A gradient g says how the model's log-likelihood changes with a token's row; E[g g^T] is the sensitivity of a head. Few tokens hold
most of it: on SmolLM2-135M one in a hundred holds two thirds. So gradients are divided by what a regression says of the token, and
the metric describes the ordinary token; the others get finer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from ..coding.joint.importance import Importance
from ..coding.joint.metric import Metric
from ..errors import InvalidArgument

METRIC_POWER, METRIC_RIDGE = 0.75, 0.01
"""Power of the sensitivity in the metric, and the share of its mean diagonal that is added to every direction."""
LEADING_COEFFICIENTS = 256
"""Those that tell a token's sensitivity."""
_REGRESSION_RIDGE = 0.25
"""Times the number of tokens, where the mean square of every coefficient is one."""
_LEAST_TOKENS = 4096
"""Of fewer no regression is fitted: it would tell nothing of other tokens."""
_SKETCH_PASSES, _OVERSAMPLING = 2, 64
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class GradientSample:
    """Some tokens of the calibration text: joint rows float16 [n, P]; directions float16 [n, P], their gradients at unit length,
    those of keys un-rotated; sizes float32 [n], the lengths. n_heads: of all layers. dims: features of a key and of a value."""

    rows: Tensor
    directions: Tensor
    sizes: Tensor
    n_heads: int
    dims: tuple[int, int]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and gradients, float32, some at a time."""
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            yield self.rows[some].float(), self.directions[some].float() * self.sizes[some, None]


def fit_metric(sample: GradientSample, seed: int, unit: float | None = None) -> tuple[Metric, Importance | None]:
    """The metric of ordinary tokens, and how levels follow from rows; None for too few tokens.

    unit: of the metric; None: its own.

    Raises `InvalidArgument` for a sample of no tokens, or gradients that are not finite.
    """
    metric = _metric(sample, torch.zeros(len(sample.rows), dtype=torch.float32), unit)
    if len(sample.rows) < _LEAST_TOKENS:
        return metric, None
    mean = sample.rows.mean(dim=0, dtype=torch.float32)
    directions = _log_sensitivity_directions(sample, mean, metric, seed)
    logs = torch.cat([(rows - mean) @ directions for rows, _ in sample.blocks()])
    metric = _metric(sample, logs, unit)
    # A level is half an octave of the step, whose square falls as the sensitivity rises.
    weights = _log_sensitivity_directions(sample, mean, metric, seed) / log(2)
    return metric, Importance(torch.cat([weights, -(mean @ weights)[None]]))


def _log_sensitivity_directions(sample: GradientSample, mean: Tensor, metric: Metric, seed: int) -> Tensor:
    """[P]: times rows less their mean, the logarithms of the squared gradients in the metric, but for a constant."""
    coefficients, vectors = _leading(sample, mean, metric, seed)
    squares = [metric.unweigh(gradients).square().sum(dim=1) for _, gradients in sample.blocks()]
    logs = torch.cat(squares).clamp_min(torch.finfo(torch.float32).tiny).log()
    return vectors @ _regression(coefficients, logs)


def _metric(sample: GradientSample, logs: Tensor, unit: float | None) -> Metric:
    """The metric of gradients whose squares are divided by the exponentials of `logs` [n]."""
    if not len(sample.rows):
        raise InvalidArgument("the metric of joint and conditional needs gradients of at least one token")
    totals = [torch.zeros(sample.n_heads, dim, dim, dtype=torch.float64) for dim in sample.dims]
    divided = replace(sample, sizes=sample.sizes * (-logs / 2).exp())
    for _, gradients in divided.blocks():
        sides = torch.split(gradients, [sample.n_heads * dim for dim in sample.dims], dim=1)
        for side, dim, total in zip(sides, sample.dims, totals, strict=True):
            heads = side.reshape(len(side), -1, dim).transpose(0, 1)
            total += (heads.mT @ heads).double()
    keys, values = (total / len(sample.rows) for total in totals)
    return Metric.from_sensitivity(keys[None], values[None], METRIC_POWER, METRIC_RIDGE, unit)


def _leading(sample: GradientSample, mean: Tensor, metric: Metric, seed: int) -> tuple[Tensor, Tensor]:
    """Leading principal coefficients [n, k] of the sample's rows in the metric, and vectors [P, k] that lead from rows to them.

    By a randomized SVD.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(LEADING_COEFFICIENTS + _OVERSAMPLING, len(mean))
    guess = torch.randn(len(mean), width, generator=generator, dtype=torch.float32)
    for _ in range(_SKETCH_PASSES):
        image = torch.zeros_like(guess)
        for rows, _ in sample.blocks():
            weighted = metric.weigh(rows - mean)
            image += weighted.T @ (weighted @ guess)
        guess = torch.linalg.qr(image).Q
    found = torch.cat([metric.weigh(rows - mean) @ guess for rows, _ in sample.blocks()])
    directions = torch.linalg.eigh(found.T @ found).eigenvectors.flip(1)[:, :LEADING_COEFFICIENTS]
    return found @ directions, metric.weigh((guess @ directions).T).T


def _regression(coefficients: Tensor, logs: Tensor) -> Tensor:
    """Weights [k] with which coefficients [n, k] tell logarithms [n] but for their mean."""
    deviations = coefficients.square().mean(dim=0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    features = (coefficients / deviations).double()
    ridge = _REGRESSION_RIDGE * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    centred = features - features.mean(dim=0)
    solved: Tensor = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (logs - logs.mean()).double())
    return solved.float() / deviations
