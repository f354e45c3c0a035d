"""Repeated use: the cache goes through the codec again and again while the text goes on, and errors
may add up.

Two uses are measured by one loop. Every 16 tokens, as the kvtc paper simulates generation (arXiv
2511.01815, section 4): with a window of 112 tokens after coding it floats between 112 and 128. And
between the turns of a conversation, some hundred tokens each.

The text is fed as it is written. What each turn adds to the cache comes from a model that looks at
a restored cache, and the whole cache is coded anew after every turn, so that the oldest tokens have
been coded as often as there were turns. The predictions are compared with those from the exact
cache, over the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codec import Codec
from ..errors import InvalidArgument
from ..huggingface.continuation import predict, prefill, read_on
from ..process.progress import Advance, nobody
from ..process.torch_state import model_torch_state
from .methods import Cost, Method, as_method, restore
from .quality import perplexity


@dataclass(frozen=True)
class MultiTurn:
    """One method in multi-turn use, on one text or on several.

    Parameters:
        name: the name of the method.
        turn_tokens: tokens of a turn.
        n_codings: how many times the first tokens were coded.
        n_continuation: number of predictions.
        kl, top1_agreement, perplexity, perplexity_exact: over all predictions, as in `Quality`.
        kl_by_turn: the KL of each turn, the first turn first.
        kl_once: the KL of the same predictions where only the prefix was coded, once.
        body_ratio, total_ratio: those of the last stream (bytes are summed over the texts).
    """

    name: str
    turn_tokens: int
    n_documents: int
    n_tokens: int
    n_codings: int
    n_continuation: int
    kl: float
    kl_once: float
    kl_by_turn: list[float]
    top1_agreement: float
    perplexity_exact: float
    perplexity: float
    body_ratio: float | None
    total_ratio: float


@model_torch_state()
def evaluate_turns(
    model: Any,
    texts: Sequence[Tensor],
    methods: Mapping[str, Method | Codec],
    turn_tokens: int,
    n_turns: int,
    advance: Advance = nobody,
) -> list[MultiTurn]:
    """Multi-turn use of each method: a prefix is prefilled and coded, and then again after every
    turn.

    Parameters:
        model: a transformers causal LM.
        texts: token ids [T] of each text; all but the last n_turns * turn_tokens + 1 tokens are the
            prefix.
        methods: methods by name.
        turn_tokens: tokens of a turn.
        n_turns: number of turns.
        advance: called after each method on each text.

    Raises:
        InvalidArgument: if a text is too short, or a method evicts tokens: what it would evict next
            depends on tokens that the restored cache no longer holds.
    """
    if turn_tokens < 1 or n_turns < 1:
        raise InvalidArgument(f"expected at least 1 turn of at least 1 token; got {n_turns} of {turn_tokens}")
    n_fed = turn_tokens * n_turns
    found: dict[str, list[_Text]] = {name: [] for name in methods}
    for ids in texts:
        if len(ids) < n_fed + 2:
            raise InvalidArgument(f"a text of {len(ids)} tokens is too short for {n_turns} turns of {turn_tokens}")
        cached, fed, target = ids[: -n_fed - 1], ids[-n_fed - 1 : -1], ids[-n_fed:]
        exact = prefill(model, cached)
        expected = predict(model, exact, fed)
        for name, method in methods.items():
            found[name].append(_one_text(model, as_method(method), exact, cached, fed, target, expected, turn_tokens))
            advance(1)
    return [_summary(name, turn_tokens, measured) for name, measured in found.items()]


@dataclass(frozen=True)
class _Text:
    """kl, kl_once: [n] of each prediction; agrees [n]; cost of the last stream."""

    kl: Tensor
    kl_once: Tensor
    agrees: Tensor
    log_perplexity_exact: float
    log_perplexity: float
    cost: Cost


def _one_text(
    model: Any,
    method: Method,
    exact: Any,
    cached: Tensor,
    fed: Tensor,
    target: Tensor,
    expected: Tensor,
    turn_tokens: int,
) -> _Text:
    restored = restore(method, model, exact, cached)
    if restored.cache.get_seq_length() != len(cached):
        raise InvalidArgument("methods that drop tokens cannot code a cache again; leave them out of multi-turn use")
    once = predict(model, restored.cache, fed)
    known, found = cached, []
    for start in range(0, len(fed), turn_tokens):
        turn = fed[start : start + turn_tokens]
        found.append(read_on(model, restored.cache, turn))
        known = torch.cat([known, turn])
        restored = restore(method, model, restored.cache, known)
    predicted = torch.cat(found)
    return _Text(
        kl=_kl(expected, predicted),
        kl_once=_kl(expected, once),
        agrees=(expected.argmax(dim=-1) == predicted.argmax(dim=-1)).float(),
        log_perplexity_exact=math.log(perplexity(expected, target)),
        log_perplexity=math.log(perplexity(predicted, target)),
        cost=restored.cost,
    )


def _kl(expected: Tensor, found: Tensor) -> Tensor:
    return (expected.exp() * (expected - found)).sum(dim=-1)


def _summary(name: str, turn_tokens: int, texts: Sequence[_Text]) -> MultiTurn:
    kl = torch.stack([text.kl for text in texts])
    n_turns = kl.shape[1] // turn_tokens
    costs = [text.cost for text in texts]
    body_bytes = sum(cost.body_bytes for cost in costs)
    body_original = math.fsum(cost.body_original_bytes for cost in costs)
    return MultiTurn(
        name=name,
        turn_tokens=turn_tokens,
        n_documents=len(texts),
        n_tokens=sum(cost.n_tokens for cost in costs),
        n_codings=n_turns + 1,
        n_continuation=kl.numel(),
        kl=float(kl.mean()),
        kl_once=float(torch.stack([text.kl_once for text in texts]).mean()),
        kl_by_turn=kl.reshape(len(texts), n_turns, turn_tokens).mean(dim=(0, 2)).tolist(),
        top1_agreement=float(torch.stack([text.agrees for text in texts]).mean()),
        perplexity_exact=math.exp(math.fsum(text.log_perplexity_exact for text in texts) / len(texts)),
        perplexity=math.exp(math.fsum(text.log_perplexity for text in texts) / len(texts)),
        body_ratio=body_original / body_bytes if body_bytes else None,
        total_ratio=sum(cost.original_bytes for cost in costs) / sum(cost.total_bytes for cost in costs),
    )
