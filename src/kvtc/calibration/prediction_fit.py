"""Fitting the prediction of `conditional`: a ridge regression, and a hidden layer trained on what it leaves over.

The hidden layer is trained to lower the bits that coefficients take, half the logarithm of their mean square each, and not their
squared error: that would serve the few largest. It is kept only if it lowers the bits of rows that it was not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..coding.joint.prediction import N_TOKENS_SEEN, Predictor, token_features
from ..process.progress import track
from ..process.torch_state import gradients, neutral_torch_state

REGRESSION_RIDGE = 1e-4
"""Times the number of rows: added to the features' mean squares, which are about one."""
TRAINED_COEFFICIENTS = 1024
"""The hidden layer serves the leading ones: all others are small, and would have to be held in memory."""
EPOCHS = 5
BATCH_ROWS = 512
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
HELD_OUT = 16
"""One row in so many is not trained on."""
LEAST_VARIANCE = 1e-3
"""Of all that the regression leaves over: a coefficient with less costs no bits worth saving."""

Blocks = Callable[[], Iterator[Tensor]]


@neutral_torch_state
def fit_predictor(table: Tensor, triples: Tensor, coefficients: Blocks, n_hidden: int, seed: int) -> Predictor:
    """The predictor of rows whose tokens are `triples` [n, 3], on the device of these and of `table`.

    coefficients: blocks [m, r] float32 of these rows on that device in order, as often as asked. n_hidden: 0 for a mere regression.
    """
    weights, left = _regression(table, triples, coefficients)
    n_features, rank = weights.shape
    hidden, outputs = weights.new_zeros(n_features, 0), weights.new_zeros(0, rank)
    trained = min(rank, TRAINED_COEFFICIENTS)
    if n_hidden and len(triples) >= HELD_OUT * BATCH_ROWS:
        residual = torch.cat(
            [
                (block - features @ weights)[:, :trained].half()
                for features, block in _paired(table, triples, coefficients)
            ]
        )
        found = _train(table, triples, residual, left[:trained], float(left.sum()), n_hidden, seed)
        if found is not None:
            hidden, leading = found
            outputs = torch.nn.functional.pad(leading, (0, rank - trained))
    return Predictor(table, weights, hidden, outputs)


def _paired(table: Tensor, triples: Tensor, coefficients: Blocks) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for block in coefficients():
        yield token_features(table, triples[start : start + len(block)]), block
        start += len(block)


def _regression(table: Tensor, triples: Tensor, coefficients: Blocks) -> tuple[Tensor, Tensor]:
    """Weights [3 k + 1, r] by normal equations in one pass, and the mean square [r] of what they leave."""
    n_features = N_TOKENS_SEEN * table.shape[1] + 1
    of_features = torch.zeros(n_features, n_features, dtype=torch.float64, device=table.device)
    across: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    for features, block in track(_paired(table, triples, coefficients), "regression", "blocks"):
        of_features += (features.T @ features).double()
        across = across + (features.T @ block).double()
        energy = energy + block.double().square().sum(dim=0)
    ridge = REGRESSION_RIDGE * len(triples) * torch.eye(n_features, dtype=torch.float64, device=table.device)
    weights = torch.linalg.solve(of_features + ridge, across)
    left = energy - (2 * across * weights - weights * (of_features @ weights)).sum(dim=0)
    return weights.float(), (left / len(triples)).clamp_min(0).float()


def _train(
    table: Tensor, triples: Tensor, residual: Tensor, left: Tensor, total: float, n_hidden: int, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Hidden weights [3 k + 1, h] and outputs [h, r] for residuals [n, r] float16; None where they do not pay on held-out rows."""
    least = LEAST_VARIANCE * total
    scales = (left + least).sqrt()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(triples), generator=generator).to(table.device)
    held_out, training = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    n_features = N_TOKENS_SEEN * table.shape[1] + 1
    hidden = torch.randn(n_features, n_hidden, generator=generator, dtype=torch.float32).to(table.device) / math.sqrt(
        n_features
    )
    outputs = torch.zeros(n_hidden, residual.shape[1], dtype=torch.float32, device=table.device)
    parameters = [hidden.requires_grad_(), outputs.requires_grad_()]

    def bits(rows: Tensor) -> Tensor:
        features = token_features(table, triples[rows])
        errors = residual[rows].float() / scales - (features @ hidden).relu() @ outputs
        return (errors.square().mean(dim=0) + least / scales.square()).log2().sum() / 2

    with gradients():
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        n_steps = EPOCHS * (len(training) // BATCH_ROWS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
        for _ in track(range(EPOCHS), "training prediction", "epochs"):
            shuffled = training[torch.randperm(len(training), generator=generator).to(table.device)]
            for batch in torch.split(shuffled, BATCH_ROWS)[: len(training) // BATCH_ROWS]:
                optimizer.zero_grad()
                loss: Tensor = bits(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        after = float(bits(held_out))
        before = float(
            ((residual[held_out].float() / scales).square().mean(dim=0) + least / scales.square()).log2().sum() / 2
        )
    if not after < before:
        return None
    return hidden.detach(), outputs.detach() * scales
