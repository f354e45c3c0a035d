"""Prediction of coefficients from token ids: what a token and its two predecessors say of its row.

Whoever decodes knows the ids, for they are what a cache is looked up by; only what they do not say has to be stored. Features are
rows of a reduced table of the model's input embeddings; a linear map and one hidden layer lead from them to coefficients. On
decode the prediction is only ever added to values: neither parsing nor the choice of tables depends on it, so rounding differences
between devices stay rounding differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..device import CPU, settle
from ..product import Columns, PackedRows

N_TOKENS_SEEN = 3
NO_TOKEN = -1
"""Stands for the predecessor of the first tokens."""
_EMBEDDINGS_AT_ONCE = 8192
FEATURE_UNIT = 32.0
"""A feature of 1 is this entry of the table."""
_LARGEST = 127


@dataclass(frozen=True, eq=False)
class Predictor:
    """f W + max(f A, 0) B of features f: a token's, its two predecessors', and 1.

    table [vocabulary, k] int8; weights W [3 k + 1, r], hidden A [3 k + 1, h] and outputs B [h, r] float16; h may be 0.
    """

    table: Tensor
    weights: Tensor
    hidden: Tensor
    outputs: Tensor

    def predict(self, triples: Tensor) -> Tensor:
        """Triples [T, 3] int64 from `token_triples` -> coefficients [T, r] float32."""
        features = PackedRows(token_features(self.table, triples))
        weights, hidden, outputs = self._columns
        return weights.times(features) + outputs.times(hidden.times(features).relu())

    def to(self, device: torch.device) -> Predictor:
        """The same on a device."""
        matrices = (part.to(device) for part in (self.weights, self.hidden, self.outputs))
        return Predictor(self.table.to(device), *matrices)

    @cached_property
    def _columns(self) -> tuple[Columns, Columns, Columns]:
        found = Columns(self.weights), Columns(self.hidden), Columns(self.outputs)
        settle(self.weights.device)
        return found


def token_triples(
    token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], chunk_tokens: int | None = None
) -> Tensor:
    """Ids and positions [T] of a chunk -> [T, 3]: each token, its predecessor and the one before.

    `NO_TOKEN` where the chunk holds none at that position: a chunk is coded, and decoded, without its neighbours.
    chunk_tokens: the tokens are those of several chunks of this grid.
    """
    cells = positions // chunk_tokens if chunk_tokens is not None else np.zeros_like(positions)
    triples = np.full((len(token_ids), N_TOKENS_SEEN), NO_TOKEN, np.int64)
    for back in range(N_TOKENS_SEEN):
        here, before = slice(back, None), slice(None, len(token_ids) - back)
        adjoin = (positions[here] - positions[before] == back) & (cells[here] == cells[before])
        triples[here, back] = np.where(adjoin, token_ids[before], NO_TOKEN)
    return torch.from_numpy(triples)


def token_features(table: Tensor, triples: Tensor) -> Tensor:
    """Triples [T, 3] -> features [T, 3 k + 1] float32; a missing token, or one outside the table, has zeros."""
    triples = triples.to(table.device)
    known = (triples >= 0) & (triples < table.shape[0])
    rows = table[triples.clamp(0, table.shape[0] - 1)].float() * known[..., None] / FEATURE_UNIT
    return torch.cat([rows.flatten(1), torch.ones(len(triples), 1, dtype=torch.float32, device=table.device)], dim=1)


def reduce_embeddings(embeddings: Tensor, rank: int, device: torch.device = CPU) -> Tensor:
    """Input embeddings [vocabulary, hidden] -> a table [vocabulary, min(rank, hidden)] int8 of their leading directions.

    It is computed, and stays, on `device`.

    Each token's embedding is taken at unit length, as the normalization before the first attention takes it: keys and values of
    the first layer are then linear in it. Each column has its own scale, which the weights behind it take up.
    """
    # Block by block: in float32 a large vocabulary takes gigabytes.
    blocks = torch.split(embeddings.detach(), _EMBEDDINGS_AT_ONCE)
    mean = torch.stack([_at_unit_length(block, device).sum(dim=0) for block in blocks]).sum(dim=0) / len(embeddings)
    moments = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for block in blocks:
        rows = _at_unit_length(block, device) - mean
        moments += rows.T @ rows
    leading = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :rank].float()
    reduced = torch.cat([(_at_unit_length(block, device) - mean) @ leading for block in blocks])
    largest = reduced.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    table: Tensor = (reduced * (_LARGEST / largest)).round().to(torch.int8)
    return table


def _at_unit_length(embeddings: Tensor, device: torch.device) -> Tensor:
    return torch.nn.functional.normalize(embeddings.to(device).float(), dim=1)
