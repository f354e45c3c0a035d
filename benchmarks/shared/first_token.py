"""What the serving benchmarks share: held-out text, time to the first token, what a cache weighs."""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtc
from kvtc.evaluate.provenance import RESULTS_DIRECTORY
from kvtc.reference import MODEL_DIRECTORY

IMAGES = Path("docs/images")


def add_codec_arguments(parser: argparse.ArgumentParser, draws: bool = False) -> None:
    """Options of model and codec. draws: the program draws its saved results, for which it needs no
    text.
    """
    parser.add_argument("--text", type=Path, nargs="+", required=not draws, help="held-out text files")
    if draws:
        parser.add_argument("--redraw", action="store_true", help="only draw the saved results again")
    parser.add_argument("--profile", default="conditional")
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument("--window", type=int, default=128, help="last tokens kept exactly")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes by itself")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; --text may be left out only where nothing is measured."""
    options = parser.parse_args()
    if not options.text and not options.redraw:
        parser.error("--text is needed")
    return options


def start(options: argparse.Namespace) -> tuple[Any, Any, kvtc.Codec]:
    """Model, tokenizer, codec, all warm: what compiles at first use has compiled."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    codec = kvtc.Codec(
        kvtc.reference_calibration(),
        options.profile,
        ratio=options.ratio,
        window_tokens=options.window,
        model=MODEL_DIRECTORY,
    )
    ids = torch.arange(600) % 1000
    _, cache, _ = first_token(model, ids, None)
    codec.decode(codec.encode(cache, ids), ids)
    return model, tokenizer, codec


def token_ids(tokenizer: Any, path: Path, share: float, n: int) -> Tensor:
    """n token ids [n] of a text file, from a share 0 .. 1 of its length on, with the token that
    begins a text.
    """
    text = path.read_text(encoding="utf-8")
    start = int(share * len(text))
    ids = tokenizer(text[start : start + 12 * n], add_special_tokens=False).input_ids
    return torch.tensor([tokenizer.bos_token_id, *ids][:n])


def first_token(model: Any, ids: Tensor, cache: Any | None) -> tuple[Tensor, Any, float]:
    """Feed what of ids [T] a cache lacks: log-probabilities [vocabulary] of the next token, the
    cache now, seconds.

    The cache grows by what is fed.
    """
    cached = cache.get_seq_length() if cache is not None else 0
    started = time.perf_counter()
    with torch.no_grad():
        output = model(ids[None, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - started
    return output.logits[0, -1].float().log_softmax(dim=-1), output.past_key_values, seconds


def answer(model: Any, log_probabilities: Tensor, cache: Any, n: int) -> Tensor:
    """n tokens [n], the likeliest each time, the first by log_probabilities; the cache grows by n -
    1.
    """
    found = [log_probabilities.argmax()]
    for _ in range(n - 1):
        with torch.no_grad():
            logits = model(found[-1][None, None], past_key_values=cache).logits
        found.append(logits[0, -1].argmax())
    return torch.stack(found)


def follow(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [n, vocabulary] after each of ids [n], on a copy of the cache."""
    with torch.no_grad():
        logits: Tensor = model(ids[None], past_key_values=copy.deepcopy(cache)).logits[0]
    return logits.float().log_softmax(dim=-1)


def divergence(exact: Tensor, found: Tensor) -> float:
    """Mean KL(exact || found) in nats of log-probabilities [..., vocabulary]."""
    return float((exact.exp() * (exact - found)).sum(dim=-1).mean())


def raw_bytes(cache: Any) -> int:
    """Of a transformers cache, as it lies in memory."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def saved_result(name: str) -> dict[str, Any]:
    """The result that a benchmark saved last."""
    found: dict[str, Any] = json.loads((RESULTS_DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))["result"]
    return found
