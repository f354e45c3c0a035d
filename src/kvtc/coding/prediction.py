"""Prediction of coefficients from token ids: what a token and its two predecessors say of its row.

Whoever decodes knows the ids, for they are what a cache is looked up by; only what they do not say has to be stored. Features are
rows of a rank-reduced table of the model's input embeddings, and a linear map leads from them to coefficients. On decode the
prediction is only ever added to values: neither parsing nor the choice of tables depends on it, so rounding differences between
devices stay rounding differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

N_TOKENS_SEEN = 3
NO_TOKEN = -1
"""Stands for the predecessor of the first tokens."""
_EMBEDDINGS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class Predictor:
    """table [vocabulary, k] float16, weights [3 k + 1, r] float16 (the token's features, its predecessors', and a constant)."""

    table: Tensor
    weights: Tensor

    def predict(self, triples: Tensor) -> Tensor:
        """Triples [T, 3] int64 from `token_triples` -> coefficients [T, r] float32."""
        features = token_features(self.table, triples)
        predicted: Tensor = features @ self.weights.to(features.device).float()
        return predicted


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
    rows = table[triples.clamp(0, table.shape[0] - 1)].float() * known[..., None]
    return torch.cat([rows.flatten(1), torch.ones(len(triples), 1, device=table.device)], dim=1)


def reduce_embeddings(embeddings: Tensor, rank: int) -> Tensor:
    """Input embeddings [vocabulary, hidden] -> their best rows of `rank` features, float16, of unit mean square."""
    # Block by block: in float32 a large vocabulary takes gigabytes.
    blocks = torch.split(embeddings.detach(), _EMBEDDINGS_AT_ONCE)
    mean = torch.stack([block.float().sum(dim=0) for block in blocks]).sum(dim=0).cpu() / len(embeddings)
    moments = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in blocks:
        rows = block.float().cpu() - mean
        moments += rows.T @ rows
    leading = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :rank].float()
    reduced = torch.cat([(block.float().cpu() - mean) @ leading for block in blocks])
    return (reduced / reduced.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)).to(torch.float16)
