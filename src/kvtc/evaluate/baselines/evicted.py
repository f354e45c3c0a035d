"""Eviction and kvtc together: some tokens are dropped, the others are coded.

A row of kvtc is one token in all layers and heads, so one choice of tokens is made for all of them:
TOVA by the attention averaged over the heads of all layers, H2O by what they gathered on average.
Published are a choice for each layer (TOVA) and for each head (H2O), which keep more of what
matters to each. The kept tokens' positions are in the stream and counted; they are rotated as
where they stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache import KVCache
from ...codec import Codec
from ...codec.inspection import inspect
from ...codec.opened_stream import positions_of
from ...codec.transformers_cache import to_transformers
from ..methods import Cost
from .eviction import Eviction, attention_queries
from .stream import cache_sides

_N_TOKENS_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class EvictedKvtc:
    """Tokens are evicted first, and kvtc codes the rest.

        stream = number of tokens read, 4 bytes | kvtc stream

    Parameters:
        eviction: chooses the tokens that are kept.
        codec: codes them; its sinks and window are counted among the kept tokens.

    Example:
        >>> from kvtc.evaluate.baselines import EvictedKvtc, Tova
        >>> method = EvictedKvtc(eviction=Tova(share=1 / 2), codec=codec.with_window(0))
        >>> method.measure(method.encode(model, cache, token_ids)).body_ratio > 30
        True
    """

    eviction: Eviction
    codec: Codec

    def encode(self, model: Any, cache: Any, token_ids: Tensor, /) -> bytes:
        """As `Method.encode`."""
        keys, values = cache_sides(cache)
        n_tokens = keys.shape[2]
        queries = torch.cat(attention_queries(model, token_ids))
        n_kept = max(1, round(self.eviction.share * n_tokens))
        # Query heads of one key-value head stand together, layer after layer: to the choice all layers are one.
        kept = torch.from_numpy(self.eviction.kept_tokens(queries, keys.flatten(0, 1).float(), n_kept)[0])
        part = KVCache(keys[:, :, kept], values[:, :, kept], kept, rope_length=n_tokens)
        stream = self.codec.encode(part, token_ids.cpu()[kept])
        return n_tokens.to_bytes(_N_TOKENS_BYTES, "little") + stream

    def decode(self, stream: bytes, token_ids: Tensor, /) -> Any:
        """As `Method.decode`."""
        stream = stream[_N_TOKENS_BYTES:]
        cache = self.codec.decode(stream, token_ids.cpu()[positions_of(stream)])
        return to_transformers(cache.keys[None], cache.values[None], cache.resolved_layers())

    def measure(self, stream: bytes, /) -> Cost:
        """As `Method.measure`: the body are the evicted and the coded tokens, of their original size."""
        n_tokens = int.from_bytes(stream[:_N_TOKENS_BYTES], "little")
        info = inspect(stream[_N_TOKENS_BYTES:])
        is_coded = info.body_tokens > 0
        token_bytes = info.original_bytes // info.n_tokens
        body_tokens = n_tokens - (info.n_tokens - info.body_tokens) * is_coded
        return Cost(
            n_tokens=n_tokens,
            body_tokens=body_tokens,
            original_bytes=n_tokens * token_bytes,
            body_original_bytes=body_tokens * token_bytes,
            body_bytes=len(stream) - (info.total_bytes - info.body_bytes) * is_coded,
            total_bytes=len(stream),
        )
