"""Quality of a restored cache: the model reads on from it, and from the exact cache, and the
predictions are compared.

Which predictions. A text of T tokens is cut before its last n + 1. The first T - n - 1 tokens are
prefilled; that cache is coded and restored. Then tokens T-n-1 .. T-2 are fed on top of the exact
and of the restored cache, in one pass each: their n predictions are those of the last n tokens of
the text, every one of them made by looking at the cache. All three metrics are means over exactly
these n predictions. The text is fed as it is written (teacher forcing), so that errors do not
accumulate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codec import Codec
from ..errors import InvalidArgument
from ..huggingface.continuation import mean_divergence, predict, prefill
from ..process.progress import Advance, nobody
from ..process.torch_state import model_torch_state
from .methods import Method, as_method, restore, timed


@dataclass(frozen=True)
class Quality:
    """Cost and quality of one method on one text, or on several (`summarize`).

    Parameters:
        name: the name of the method.
        n_documents: number of texts.
        n_tokens: tokens of the cache.
        body_tokens: tokens of the body.
        original_bytes: size of all tokens at 16 bits a number.
        body_bytes, total_bytes, body_ratio, total_ratio: as in `kvtc.StreamInfo`.
        n_continuation: number of predictions.
        kl: mean KL(exact || restored) of the next-token distributions, in nats.
        top1_agreement: share of predictions with the same most likely token, 0 .. 1.
        perplexity_exact: of the text, from the exact cache.
        perplexity: of the text, from the restored cache.
        prefill_seconds, encode_seconds, decode_seconds: times of one text, medians over the
            repeats.
        kl_by_text: the KL of each text, in nats.
        body_bytes_by_text: bytes of the body of each text.

    Example:
        >>> from kvtc.evaluate.baselines import Fp8
        >>> from kvtc.evaluate.quality import evaluate_continuation
        >>> (quality,) = evaluate_continuation(model, token_ids[:60], {"FP8": Fp8()}, n_continuation=20)
        >>> quality.name, quality.n_tokens, round(quality.total_ratio), quality.kl < 0.01
        ('FP8', 39, 2, True)
    """

    name: str
    n_documents: int
    n_tokens: int
    body_tokens: int
    original_bytes: int
    body_bytes: int
    total_bytes: int
    body_ratio: float | None
    total_ratio: float
    n_continuation: int
    kl: float
    top1_agreement: float
    perplexity_exact: float
    perplexity: float
    prefill_seconds: float
    encode_seconds: float
    decode_seconds: float
    kl_by_text: list[float] = field(default_factory=list)
    body_bytes_by_text: list[int] = field(default_factory=list)


@model_torch_state()
def evaluate_continuation(
    model: Any,
    token_ids: Tensor | Sequence[int],
    methods: Mapping[str, Method | Codec],
    n_continuation: int,
    repeats: int = 1,
    advance: Advance = nobody,
) -> list[Quality]:
    """The quality of each method on one text, all against one exact cache.

    Parameters:
        model: a transformers causal LM; it is run in evaluation mode.
        token_ids: [T] integers, the text.
        methods: methods or codecs by name.
        n_continuation: number of predictions to compare.
        repeats: how many times prefill, encode and decode are timed; default 1. From 2 on there
            is a warm-up run.
        advance: called after each method; default: nothing is.

    Returns:
        The quality of each method, in their order.

    Raises:
        InvalidArgument: the text is too short. Encoding raises what it raises.

    Example:
        >>> from kvtc.evaluate.quality import evaluate_continuation
        >>> methods = {"joint 16x": codec, "joint 64x": kvtc.Codec(calibration, ratio=64)}
        >>> fine, coarse = evaluate_continuation(model, token_ids[:300], methods, n_continuation=32)
        >>> 0 < fine.kl < coarse.kl < 0.1
        True
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device=model.device).reshape(-1)
    n_cached = len(ids) - n_continuation - 1
    if n_continuation < 1 or n_cached < 1:
        raise InvalidArgument(
            f"{len(ids)} tokens cannot be split into a cache and {n_continuation} predictions; "
            "expected at least 1 prediction and 2 tokens more than predictions"
        )
    if repeats < 1:
        raise InvalidArgument(f"repeats must be at least 1; got {repeats}")
    cached, fed, target = ids[:n_cached], ids[n_cached:-1], ids[n_cached + 1 :]
    was_training = model.training
    model.eval()
    try:
        exact, prefill_seconds = timed(lambda: prefill(model, cached), repeats)
        expected = predict(model, exact, fed)
        found = []
        for name, method in methods.items():
            timing = prefill_seconds, repeats
            found.append(_evaluate(model, name, as_method(method), exact, cached, fed, target, expected, *timing))
            advance(1)
        return found
    finally:
        model.train(was_training)


def summarize(qualities: Sequence[Quality]) -> Quality:
    """The quality of one method over several texts.

    Counts, bytes and seconds are sums, and ratios are computed from the sums. KL, agreement and
    log-perplexity are means over all predictions.

    Parameters:
        qualities: of one method, one for each text.

    Returns:
        The quality over all of them.

    Raises:
        InvalidArgument: there are no results, or they are of several methods.

    Example:
        >>> from kvtc.evaluate.baselines import Fp8
        >>> from kvtc.evaluate.quality import evaluate_continuation, summarize
        >>> texts = token_ids[:60], token_ids[60:120]
        >>> found = [evaluate_continuation(model, text, {"FP8": Fp8()}, n_continuation=20)[0] for text in texts]
        >>> summarize(found).n_documents, summarize(found).n_continuation
        (2, 40)
    """
    names = {quality.name for quality in qualities}
    if len(names) != 1:
        raise InvalidArgument(f"expected results of one method, got {len(names)}: {', '.join(sorted(names))}")
    n = sum(quality.n_continuation for quality in qualities)

    def total(field: str) -> int:
        return sum(getattr(quality, field) for quality in qualities)

    def seconds(field: str) -> float:
        return math.fsum(getattr(quality, field) for quality in qualities)

    def mean(value: Callable[[Quality], float]) -> float:
        return math.fsum(value(quality) * quality.n_continuation for quality in qualities) / n

    body_tokens, original = total("body_tokens"), total("original_bytes")
    body_original = math.fsum((quality.body_ratio or 0) * quality.body_bytes for quality in qualities)
    return Quality(
        name=names.pop(),
        n_documents=total("n_documents"),
        n_tokens=total("n_tokens"),
        body_tokens=body_tokens,
        original_bytes=original,
        body_bytes=total("body_bytes"),
        total_bytes=total("total_bytes"),
        body_ratio=body_original / total("body_bytes") if body_tokens else None,
        total_ratio=original / total("total_bytes"),
        n_continuation=n,
        kl=mean(lambda quality: quality.kl),
        top1_agreement=mean(lambda quality: quality.top1_agreement),
        perplexity_exact=math.exp(mean(lambda quality: math.log(quality.perplexity_exact))),
        perplexity=math.exp(mean(lambda quality: math.log(quality.perplexity))),
        prefill_seconds=seconds("prefill_seconds"),
        encode_seconds=seconds("encode_seconds"),
        decode_seconds=seconds("decode_seconds"),
        kl_by_text=[kl for quality in qualities for kl in quality.kl_by_text],
        body_bytes_by_text=[size for quality in qualities for size in quality.body_bytes_by_text],
    )


def _evaluate(
    model: Any,
    name: str,
    method: Method,
    exact: Any,
    cached: Tensor,
    fed: Tensor,
    target: Tensor,
    expected: Tensor,
    prefill_seconds: float,
    repeats: int,
) -> Quality:
    restored = restore(method, model, exact, cached, repeats)
    cost = restored.cost
    found = predict(model, restored.cache, fed, first_position=len(cached))
    kl = mean_divergence(expected, found)
    agreement = (expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean()
    return Quality(
        name=name,
        n_documents=1,
        n_tokens=cost.n_tokens,
        body_tokens=cost.body_tokens,
        original_bytes=cost.original_bytes,
        body_bytes=cost.body_bytes,
        total_bytes=cost.total_bytes,
        body_ratio=cost.body_ratio,
        total_ratio=cost.total_ratio,
        n_continuation=len(target),
        kl=kl,
        top1_agreement=float(agreement),
        perplexity_exact=perplexity(expected, target),
        perplexity=perplexity(found, target),
        prefill_seconds=prefill_seconds,
        encode_seconds=restored.encode_seconds,
        decode_seconds=restored.decode_seconds,
        kl_by_text=[kl],
        body_bytes_by_text=[cost.body_bytes],
    )


def perplexity(log_probabilities: Tensor, target: Tensor) -> float:
    """Of target [n] under log-probabilities [n, vocabulary]."""
    return float((-log_probabilities.gather(1, target[:, None]).mean()).exp())
