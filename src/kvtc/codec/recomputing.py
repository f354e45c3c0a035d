"""Which tokens layers are recomputed of, for a cache that is encoded and for chunks that are decoded (`conditional`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..cache import KVCache, TokenIds
from ..calibration.artifact import Calibration
from ..container.tables import Chunk
from ..errors import CorruptStream, InvalidArgument
from ..recomputation import Recomputation, Recomputed, open_recomputation


def recomputation_of(model: Any, calibration: Calibration | None, device: torch.device) -> Recomputation | None:
    """What recomputes the first layers of the calibrated model, if it is given. Raises `InvalidArgument` for another model."""
    conditional = None if calibration is None else calibration.conditional
    if model is None or conditional is None:
        return None
    found = open_recomputation(model, conditional.n_layers, device)
    if found.identity != conditional.identity:
        raise InvalidArgument(
            "the embedding and first layers of the model given have other weights than those that the calibration was made with: "
            f"expected {conditional.identity.hex()[:16]}, found {found.identity.hex()[:16]}"
        )
    return found


def recompute_cache(
    recomputation: Recomputation | None, cache: KVCache, token_ids: TokenIds | None, profile: str
) -> Recomputed | None:
    """What the first layers compute of the cache's tokens; None without a recomputation.

    Raises `InvalidArgument` for a cache with gaps, and where ids are missing.
    """
    if recomputation is None or not cache.n_tokens:
        return None
    positions = cache.resolved_positions()
    first, stop = int(positions[0]), int(positions[-1]) + 1
    if stop - first != cache.n_tokens:
        raise InvalidArgument(
            f"the profile {profile} recomputes layers from all tokens: expected a cache without gaps, found "
            f"{cache.n_tokens} tokens at positions {first} .. {stop - 1}; use joint"
        )
    return recomputation.run(check_prefix(profile, token_ids, stop)).part(slice(first, None))


def recompute_chunks(
    recomputation: Recomputation | None, chunks: list[Chunk], token_ids: TokenIds | None, first: int
) -> Recomputed | None:
    """What the first layers compute of all tokens of the chunks, the first of which stands at position `first`."""
    if recomputation is None or token_ids is None or not chunks:
        return None
    position = first
    for index, chunk in enumerate(chunks):
        if chunk.explicit_positions or chunk.first_position != position:
            raise CorruptStream(f"chunk {index} does not go on at position {position}, but its rows need all tokens")
        position += chunk.n_tokens
    # Of tokens that are decoded only because they share a chunk with others, the ids may be unknown. None comes before others.
    ids = np.concatenate([token_ids[:position], np.zeros(max(0, position - len(token_ids)), np.int64)])
    return recomputation.run(ids).part(slice(first, None))


def check_prefix(profile: str, token_ids: TokenIds | None, n_needed: int) -> TokenIds:
    """Token ids, unless they are too few to be those of all tokens from position 0 on, as recomputing layers needs them.

    Raises `InvalidArgument`.
    """
    found = 0 if token_ids is None else len(token_ids)
    if token_ids is None or found < n_needed:
        raise InvalidArgument(
            f"the profile {profile} recomputes layers from the ids of all tokens from position 0 on: expected {n_needed} "
            f"token_ids, found {found or 'none'}; or use joint"
        )
    return token_ids
