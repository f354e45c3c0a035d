"""Fitting for the profiles `joint` and `conditional`: one basis for keys and values together, in the metric.

The basis spans the leading principal directions of the weighted rows. For `conditional` coefficients are predicted from token ids
(`prediction_fit`), and a rotation inside that span decorrelates what that leaves over; so both profiles share the one large matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..cache import CacheGeometry
from ..coding.joint.metric import Metric
from ..coding.joint.prediction import Predictor
from ..coding.transform import Basis, project
from ..errors import InvalidArgument
from ..process.progress import track
from .entropy import fit_coefficients
from .joint_calibration import JointCalibration, TokenCoding
from .prediction_fit import fit_predictor
from .principal import principal_components
from .row_spool import RowSpool

TABLE_ROWS = 4096


class WeightedRows:
    """Joint rows of two paired spools in the metric, on their device, as `principal_components` reads them."""

    def __init__(self, keys: RowSpool, values: RowSpool, metric: Metric) -> None:
        self._spools = keys, values
        self._metric = metric.to(keys.device)
        self.n_rows = keys.n_rows
        self.device = keys.device

    def blocks(self, columns: slice = slice(None)) -> Iterator[Tensor]:
        """The rows in order, float32 [n, 2 p] blocks of bounded size."""
        for keys, values in zip(*(spool.blocks() for spool in self._spools), strict=True):
            yield self._metric.weigh(torch.cat([keys, values], dim=1))[:, columns]


def fit_joint(
    geometry: CacheGeometry,
    keys: RowSpool,
    values: RowSpool,
    metric: Metric,
    rank: int,
    seed: int,
    table: Tensor | None = None,
    triples: Tensor | None = None,
    n_hidden: int = 0,
) -> JointCalibration:
    """Fit to paired spools of un-rotated keys and of values, on their device; the calibration is on the CPU.

    Memory there at most 16 P l + 36 l^2 bytes, with P = 2 p features and l = rank + `OVERSAMPLING`, `TRAINED_COEFFICIENTS` float16
    numbers a row, and a block of rows with its intermediate results. Nothing is [P, P] or [rows, P].
    table [vocabulary, k] and triples [n, 3], each row's token and its predecessors: for `conditional`; without them it is left out.
    n_hidden: units of the predictor's hidden layer.
    """
    if rank < 1:
        raise InvalidArgument(f"joint_rank must be at least 1; got {rank}")
    rows = WeightedRows(keys, values, metric)
    basis = principal_components(rows, rank, seed=seed, name="joint basis").basis
    sample = np.sort(np.random.default_rng(seed).permutation(rows.n_rows)[:TABLE_ROWS])
    coefficients = _sampled(rows, basis, sample)
    tokens = None
    if table is not None and triples is not None:
        tokens = _fit_tokens(geometry, rows, basis, metric, table, triples, n_hidden, seed, sample)
    return JointCalibration(basis, metric, fit_coefficients(coefficients), tokens)


def _sampled(rows: WeightedRows, basis: Basis, sample: np.ndarray) -> Tensor:
    mean, vectors = basis.matrices(rows.device)
    found, start = [], 0
    for block in rows.blocks():
        found.append(project(_chosen(block, sample, start), mean, vectors).cpu())
        start += len(block)
    return torch.cat(found)


def _chosen(block: Tensor, sample: np.ndarray, start: int) -> Tensor:
    """Those rows of a block that are in the sample; the block's first row is number `start`."""
    inside = sample[(sample >= start) & (sample < start + len(block))] - start
    return block[torch.from_numpy(inside).to(block.device)]


def _fit_tokens(
    geometry: CacheGeometry,
    rows: WeightedRows,
    basis: Basis,
    metric: Metric,
    table: Tensor,
    triples: Tensor,
    n_hidden: int,
    seed: int,
    sample: np.ndarray,
) -> TokenCoding:
    """Prediction, then the principal directions of what it leaves over: memory of a few matrices [r, r]."""
    mean, vectors = basis.matrices(rows.device)

    def coefficients() -> Iterator[Tensor]:
        return (project(block, mean, vectors) for block in rows.blocks())

    table, triples = table.to(rows.device), triples[: rows.n_rows].to(rows.device)
    plain = fit_predictor(table, triples, coefficients, n_hidden, seed)
    before, after = (torch.zeros(basis.rank, basis.rank, dtype=torch.float64, device=rows.device) for _ in range(2))
    sampled, start = [], 0
    for block in track(coefficients(), "what prediction leaves", "blocks"):
        residual = block - plain.predict(triples[start : start + len(block)])
        before += (block.T @ block).double()
        after += (residual.T @ residual).double()
        sampled.append(_chosen(residual, sample, start).cpu())
        start += len(block)
    rotation = torch.linalg.eigh(after).eigenvectors.flip(1).float().to(torch.float16)
    turn = rotation.float()
    matrices = (plain.weights @ turn).half(), plain.hidden.half().contiguous(), (plain.outputs @ turn).half()
    predictor = Predictor(table.cpu(), *(matrix.cpu() for matrix in matrices))
    explained = _explained(geometry, vectors, metric.to(rows.device), before, after)
    left = torch.cat(sampled) @ turn.cpu()
    return TokenCoding(predictor, rotation.cpu(), fit_coefficients(left), explained)


def _explained(geometry: CacheGeometry, vectors: Tensor, metric: Metric, before: Tensor, after: Tensor) -> Tensor:
    """[L, 2]: one less the share of each layer's key and value variance that is left, inside the span of the basis."""
    plain = metric.unweigh(vectors.T).T
    moments = before.float(), after.float()
    # Layer by layer, keys and then values: a product of all of them would be another matrix as large as the basis.
    sums = torch.tensor(
        [
            [float(torch.vdot((part @ moment).flatten(), part.flatten())) for moment in moments]
            for part in plain.chunk(2 * geometry.n_layers)
        ],
        dtype=torch.float32,
    )
    total, left = sums.T
    explained: Tensor = 1 - left / total.clamp_min(torch.finfo(torch.float32).tiny)
    return explained.reshape(2, geometry.n_layers).T.contiguous()
