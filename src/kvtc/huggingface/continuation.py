"""A model that reads on from a cache: what it predicts from an exact cache, and from a restored one."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..process.torch_state import model_torch_state, neutral_torch_state

CACHES = ("past_key_values", "cache_params")
"""What models call their cache, in arguments and outputs."""


def prefill(model: Any, token_ids: Tensor, cache: Any = None) -> Any:
    """Run the model over token_ids [T], on top of a cache if there is one, which it may change, and return its cache of batch 1.

    Raises `UnsupportedModel` for a model that gives none.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in parameters), CACHES[0])
    arguments = {} if cache is None else {name: cache}
    # Logits of every token would take [T, vocabulary] floats, and only the cache is wanted.
    arguments |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    with model_torch_state():
        found = getattr(model(token_ids[None], use_cache=True, **arguments), name, None)
    if found is None:
        raise UnsupportedModel(f"{type(model).__name__} gives no cache; expected one as {' or '.join(CACHES)}")
    return found


def predict(model: Any, cache: Any, token_ids: Tensor, first_position: int | None = None) -> Tensor:
    """Log-probabilities [n, vocabulary] float32 of the token after each of token_ids [n], fed on top of a cache.

    first_position: where the first of them stands; None: right after the cached tokens. It is needed where tokens were evicted.
    The cache is left as it is: the pass runs on a copy, for it appends to what it is given.

    Raises `UnsupportedModel` where tokens were evicted and the model, as with ALiBi, can only count what is cached.
    """
    return read_on(model, copy.deepcopy(cache), token_ids, first_position)


def read_on(model: Any, cache: Any, token_ids: Tensor, first_position: int | None = None) -> Tensor:
    """As `predict`, but the cache is gone on with: afterwards it holds the tokens too."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), Tensor):
            layer.keys, layer.values = layer.keys.to(token_ids.device), layer.values.to(token_ids.device)
    positions = {}
    if first_position is not None:
        if "position_ids" in inspect.signature(model.forward).parameters:
            stop = first_position + len(token_ids)
            positions = {"position_ids": torch.arange(first_position, stop, device=token_ids.device)[None]}
        elif first_position != cache.get_seq_length():
            raise UnsupportedModel(
                f"{type(model).__name__} takes no position_ids; it cannot read token {first_position} "
                f"on top of a cache of {cache.get_seq_length()} tokens"
            )
    with model_torch_state():
        logits = model(token_ids[None], past_key_values=cache, **positions).logits[0]
        log_probabilities: Tensor = logits.float().log_softmax(dim=-1)
    return log_probabilities


@neutral_torch_state
def mean_divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL(expected || found), in nats, of log-probabilities [n, vocabulary]."""
    return float((expected.exp() * (expected - found)).sum(dim=-1).mean())
