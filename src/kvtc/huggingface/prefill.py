"""Reading tokens with a model of transformers so that its cache can later be resumed in the middle."""

from __future__ import annotations

from typing import Any

from ..codec.resume_points import ResumePoints
from ..errors import InvalidArgument
from ..process.progress import task
from ..process.torch_state import evaluation_mode
from . import continuation
from .models import as_ids


def prefill(model: Any, token_ids: Any, points: ResumePoints, cache: Any = None, n_tokens: int = 0) -> Any:
    """Let a model read a text in pieces that end where resume points are due, and take these points.

    Parameters:
        model: a transformers causal LM.
        token_ids: [T] integers, the text.
        points: takes the points.
        cache: a transformers cache of the first n_tokens tokens, which are not read again; it may be changed. None
            (default): there is none.
        n_tokens: tokens of `cache`; 0 (default): the cache is not used.

    Returns:
        The model's cache of all T tokens.

    Raises:
        InvalidArgument: the ids are no text, or fewer than the cache has tokens.
        UnsupportedModel: the model keeps no cache.
        InvalidCache: as `ResumePoints.take`.

    Example:
        >>> points = kvtc.ResumePoints(every=256)
        >>> kvtc.prefill(model, token_ids, points).get_seq_length(), sorted(points.taken)
        (600, [256, 512])
    """
    ids = as_ids(token_ids)
    if not 0 <= n_tokens <= len(ids) or not len(ids):
        raise InvalidArgument(f"a cache of {n_tokens} tokens does not begin a text of {len(ids)}")
    cache, ids = cache if n_tokens else None, ids.to(model.get_input_embeddings().weight.device)
    with evaluation_mode(model), task("prefill", len(ids) - n_tokens, "tokens") as advance:
        while n_tokens < len(ids):
            piece = ids[n_tokens : n_tokens + points.tokens_to_next(n_tokens)]
            cache = continuation.prefill(model, piece, cache)
            n_tokens += len(piece)
            points.take(cache, n_tokens)
            advance(len(piece))
    return cache
