"""H2O and TOVA: keep some tokens, drop the others, by the attention they get.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", arXiv 2306.14048: each key-value head keeps its most recent tokens and those that gathered
the most attention so far, half of the budget each. Oren et al., "Transformers are Multi-State RNNs"
(TOVA), arXiv 2401.06104: each layer drops the token that the newest token attends to least, on
average over the heads. Budgets as in the kvtc paper: 1/8 of the cache, for H2O 1/16 recent and 1/16
heavy.

The prompt is read token by token: once the budget is full, each further token drops one. The
attention weights are the model's own, renormalized over what is kept; scores are computed for a
block of queries at a time. Query heads that share a key-value head add up. Kept tokens are stored
at 16 bits a value, with keys rotated as they were, so that neither positions nor scores are needed
to read on from them; fed tokens take the positions that follow the whole prompt.

Differences: hidden states are those of the exact prompt (the cache to be stored is given), so
dropping a token does not change the keys and values of later ones, which favours the baselines.
Nothing is dropped any more while the continuation is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...codec import transformers_cache as interop
from ...process.torch_state import model_torch_state
from ..methods import Cost
from .stream import Header, Reader, cache_sides, to_bytes, to_stored

_NAME = "kvtc_queries"
_QUERIES_AT_ONCE = 128

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Eviction(ABC):
    """A method that keeps some tokens and drops the others, by the attention that they get.

    Parameters:
        share: tokens kept over tokens read, at least one is; default 1/8.

    Example:
        >>> from kvtc.evaluate.baselines.eviction import Eviction
        >>> class Oldest(Eviction):
        ...     def kept_tokens(self, queries, keys, n_kept):
        ...         return torch.arange(n_kept).expand(len(keys), n_kept)
        >>> method = Oldest(share=1 / 2)
        >>> method.decode(method.encode(model, cache, token_ids), token_ids).get_seq_length()
        300
    """

    share: float = 1 / 8

    @abstractmethod
    def kept_tokens(self, queries: Tensor, keys: Tensor, n_kept: int) -> Indices:
        """The tokens that each head keeps.

        Parameters:
            queries: [H_q, T, D] float32, as attention scores them.
            keys: [H, T, D] float32.
            n_kept: how many each head keeps.

        Returns:
            [H, n_kept] int64, increasing.
        """

    def encode(self, model: Any, cache: Any, token_ids: Tensor, /) -> bytes:
        """As `Method.encode`."""
        keys, values = cache_sides(cache)
        header = Header.of(keys, values, max(1, round(self.share * keys.shape[2])))
        queries = attention_queries(model, token_ids)
        kept = [
            self.kept_tokens(layer_queries, layer_keys.float(), header.n_exact)
            for layer_queries, layer_keys in zip(queries, keys, strict=True)
        ]
        index = torch.from_numpy(np.stack(kept))[..., None]
        sides = [side.gather(2, index.expand(*index.shape[:3], side.shape[3])) for side in (keys, values)]
        return header.write() + to_bytes(*(to_stored(side, header) for side in sides))

    def decode(self, stream: bytes, _token_ids: Tensor, /) -> Any:
        """As `Method.decode`."""
        header = Header.read(stream)
        reader = Reader(stream[Header.SIZE :])
        keys, values = (reader.take(shape, header.stored_dtype).to(header.dtype) for shape in header.exact_shapes)
        return interop.to_transformers(keys[None], values[None], range(len(keys)))

    def measure(self, stream: bytes, /) -> Cost:
        """As `Method.measure`: all tokens are the body, for what is kept stands for all of them."""
        header = Header.read(stream)
        n_bytes, original = len(stream), header.n_tokens * header.token_bytes
        return Cost(header.n_tokens, header.n_tokens, original, original, n_bytes, n_bytes)


@dataclass(frozen=True, kw_only=True)
class H2O(Eviction):
    """H2O keeps recent tokens and those that gathered most attention.

    Parameters:
        share: tokens kept over tokens read, at least one is; default 1/8.
        recent_share: of the kept tokens, the share that is kept for being recent; default 1/2.
        is_shared: whether all heads keep the same tokens, by the mean of their attention.
            Published is a choice for each head. Default False.

    Example:
        >>> from kvtc.evaluate.baselines import H2O
        >>> method = H2O(share=1 / 4)
        >>> coded = method.encode(model, cache, token_ids)
        >>> method.decode(coded, token_ids).get_seq_length()
        150
    """

    recent_share: float = 0.5
    is_shared: bool = False

    def kept_tokens(self, queries: Tensor, keys: Tensor, n_kept: int) -> Indices:
        n_recent = round(self.recent_share * n_kept)
        n_choices = 1 if self.is_shared else len(keys)
        kept = np.zeros((n_choices, 0), np.int64)
        gathered = np.zeros((n_choices, 0), np.float32)
        for token, scores in enumerate(_scores(queries, keys)):
            kept = np.append(kept, np.full((n_choices, 1), token), axis=1)
            weights = _softmax(np.take_along_axis(scores, kept[:, None], axis=2)).sum(axis=1)
            if self.is_shared:
                weights = weights.mean(axis=0, keepdims=True)
            gathered = np.append(gathered, np.zeros((n_choices, 1), np.float32), axis=1) + weights
            if kept.shape[1] > n_kept:
                # Tokens stand in order of age: the recent ones are the last.
                dropped = gathered[:, : n_kept + 1 - n_recent].argmin(axis=1)
                kept, gathered = _without(kept, dropped), _without(gathered, dropped)
        return np.repeat(kept, len(keys) // n_choices, axis=0)


@dataclass(frozen=True, kw_only=True)
class Tova(Eviction):
    """TOVA keeps the tokens that the newest token attends to most: one choice for all heads of a
    layer.

    Parameters:
        share: tokens kept over tokens read, at least one is; default 1/8.

    Example:
        >>> from kvtc.evaluate.baselines import Tova
        >>> method = Tova(share=1 / 4)
        >>> round(method.measure(method.encode(model, cache, token_ids)).total_ratio, 1)
        4.0
    """

    def kept_tokens(self, queries: Tensor, keys: Tensor, n_kept: int) -> Indices:
        kept = np.zeros((1, 0), np.int64)
        for token, scores in enumerate(_scores(queries, keys)):
            kept = np.append(kept, np.full((1, 1), token), axis=1)
            if kept.shape[1] > n_kept:
                weights = _softmax(scores[:, :, kept[0]]).mean(axis=(0, 1))
                kept = _without(kept, weights.argmin(keepdims=True))
        return np.repeat(kept, len(keys), axis=0)


def attention_queries(model: Any, token_ids: Tensor) -> list[Tensor]:
    """Queries [H_q, T, D] float32 of each layer on token_ids [T], as they are multiplied with
    cached keys: rotated and scaled.
    """
    found: dict[int, Tensor] = {}
    with _recording(model, found), model_torch_state():
        model(token_ids[None].to(model.device), use_cache=False)
    return [found[layer] for layer in sorted(found)]


@contextmanager
def _recording(model: Any, found: dict[int, Tensor]) -> Iterator[None]:
    """Inside, attention leaves its queries in `found`, by layer."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    def attend(module: Any, query: Tensor, *arguments: Any, scaling: float | None = None, **more: Any) -> Any:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found[int(module.layer_idx)] = query[0].float().cpu() * scale
        return sdpa_attention_forward(module, query, *arguments, scaling=scaling, **more)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    usual = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _scores(queries: Tensor, keys: Tensor) -> Iterator[Floats]:
    """For each token the scores [H, H_q / H, token + 1] that it gives to itself and those before."""
    shared = queries.reshape(len(keys), -1, *queries.shape[1:])
    for start in range(0, queries.shape[1], _QUERIES_AT_ONCE):
        block = shared[:, :, start : start + _QUERIES_AT_ONCE]
        stop = start + block.shape[2]
        scores = (block @ keys[:, None, :stop].mT).numpy()
        for token in range(start, stop):
            yield scores[:, :, token - start, : token + 1]


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return found


def _without(table: npt.NDArray[Any], dropped: Indices) -> npt.NDArray[Any]:
    """[n, m] -> [n, m - 1]: row i without entry dropped[i]."""
    order = np.arange(table.shape[1] - 1)
    return np.take_along_axis(table, order + (order >= dropped[:, None]), axis=1)
