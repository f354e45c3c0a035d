"""The subcommands `encode` and `decode`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from ..process.progress import Advance, note, task
from .arguments import (
    MODEL_HELP,
    Outcome,
    add_output,
    add_subcommand,
    check_context,
    check_device,
    check_output,
    context_of,
    find_calibration,
    load_model,
    load_tokenizer,
    positive,
    read_stream,
    token_ids_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..cache import KVCache
    from ..calibration import Calibration

CACHE_SUFFIX = ".safetensors"
PIECE_TOKENS = 512
"""Of a prefill: progress shows after each piece."""
CODEC_OPTIONS = (
    "profile", "ratio", "step", "kl", "key_ratio", "value_ratio", "max_error", "sink_tokens", "window_tokens",
    "sink_format", "window_format", "fixed_size", "lossless", "chunk_tokens", "device",
)  # fmt: skip
PAPER_OPTIONS = {"key_ratio", "value_ratio", "max_error"}


def add_subcommands(subcommands: Any, common: argparse.ArgumentParser) -> None:
    """Add `encode` and `decode`."""
    parser = add_subcommand(
        subcommands,
        common,
        "encode",
        encode,
        "code a cache, or the cache of a text, into a stream",
        "Options that are not given have the defaults of kvtc.Codec: paper, ratio 16, 4 sink and 128 window tokens, deflate.",
    )
    parser.add_argument("input", type=Path, help="a saved cache (.safetensors), or a text to prefill with --model")
    add_output(parser, "the stream to write")
    _add_model(parser)
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="paper, joint or conditional, which needs token ids to decode (default: the last that the calibration serves "
        "and the input allows)",
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--ratio", type=float, help="how many times fewer bits the coded tokens get")
    rate.add_argument("--step", type=float, help="instead: the step of joint and conditional")
    rate.add_argument(
        "--kl",
        type=float,
        metavar="NATS",
        help="instead: the divergence of predictions to expect, by the calibration's curve (joint, conditional)",
    )
    rate.add_argument(
        "--max-error", type=float, metavar="E", help="instead: the largest relative error, 0 .. 1 (paper)"
    )
    parser.add_argument(
        "--fixed-size",
        action="store_true",
        default=None,
        help="pad to the same bytes for every cache of as many tokens (joint, conditional; with a ratio)",
    )
    parser.add_argument("--key-ratio", type=float, metavar="R", help="ratio of the keys alone (paper)")
    parser.add_argument("--value-ratio", type=float, metavar="R", help="ratio of the values alone (paper)")
    parser.add_argument("--sink-tokens", type=int, metavar="N", help="first tokens kept exactly")
    parser.add_argument("--window-tokens", type=int, metavar="N", help="last tokens kept exactly")
    parser.add_argument("--sink-format", choices=("exact", "fp8"))
    parser.add_argument(
        "--window-format",
        choices=("exact", "coded"),
        help="coded: like the body, with a quarter of its step (joint, conditional)",
    )
    parser.add_argument("--lossless", choices=("deflate", "zstd", "lz4", "none"))
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help="tokens of a chunk, the unit of random access")

    parser = add_subcommand(
        subcommands, common, "decode", decode, "restore a cache from a stream, or go on writing from it"
    )
    parser.add_argument("stream", type=Path)
    add_output(parser, "the cache file to write (.safetensors)", required=False)
    _add_model(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="the text the stream was made from: ids are compared")
    parser.add_argument("--tokens", type=int, metavar="N", help="only the first N tokens")
    parser.add_argument("--start-position", type=int, metavar="P", help="move the first token to this position")
    parser.add_argument(
        "--generate", type=positive, metavar="N", help="continue the text by N tokens from the restored cache"
    )


def encode(options: argparse.Namespace) -> Outcome:
    """`kvtc encode`."""
    check_output(options.output, options.force)
    is_cache = options.input.suffix == CACHE_SUFFIX
    if not is_cache and options.model is None:
        options.usage_error(f"a text needs --model; a saved cache ends in {CACHE_SUFFIX}")
    from ..cache_file import load_cache
    from ..codec import Codec
    from ..codec.inspection import inspect
    from ..files import write_atomically

    check_device(options.device)
    calibration = find_calibration(options)
    given = {name: getattr(options, name) for name in CODEC_OPTIONS if getattr(options, name) is not None}
    prefill_seconds = None
    if is_cache:
        cache, token_ids = load_cache(options.input)
        if token_ids is None and "joint" in calibration.profiles and not given.keys() & PAPER_OPTIONS:
            given.setdefault("profile", "joint")
    codec = Codec(calibration, **given)
    if not is_cache:
        cache, token_ids, prefill_seconds = _prefill(options, calibration)
    started = time.perf_counter()
    stream = codec.encode(cache, token_ids)
    encode_seconds = time.perf_counter() - started
    write_atomically(options.output, stream)

    from ..report.table import format_bytes, format_fields, format_ratio, format_seconds

    info = inspect(stream)
    result = {
        "path": str(options.output),
        "n_tokens": info.n_tokens,
        "sink_tokens": info.sink_tokens,
        "body_tokens": info.body_tokens,
        "window_tokens": info.window_tokens,
        "original_bytes": info.original_bytes,
        "body_bytes": info.body_bytes,
        "total_bytes": info.total_bytes,
        "padding_bytes": info.padding_bytes,
        "body_ratio": info.body_ratio,
        "total_ratio": info.total_ratio,
        "prefill_seconds": prefill_seconds,
        "encode_seconds": encode_seconds,
    }
    fields = [
        (
            "saved",
            f"{options.output}, {format_bytes(info.total_bytes)} for {format_bytes(info.original_bytes)} of cache",
        ),
        (
            "tokens",
            f"{info.n_tokens:,}: {info.sink_tokens} sink, {info.body_tokens:,} body, {info.window_tokens} window",
        ),
        ("body_ratio", format_ratio(info.body_ratio)),
        ("total_ratio", format_ratio(info.total_ratio)),
        ("encode", format_seconds(encode_seconds)),
    ]
    if prefill_seconds is not None:
        fields.append(("prefill", format_seconds(prefill_seconds)))
    return result, format_fields(fields)


def decode(options: argparse.Namespace) -> Outcome:
    """`kvtc decode`."""
    if options.output is None and options.generate is None:
        options.usage_error("nothing to do: give -o FILE, or --model, --text and --generate N")
    if options.generate is not None and (options.model is None or options.text is None):
        options.usage_error("--generate needs --model and --text")
    if options.generate is not None and (options.tokens is not None or options.start_position is not None):
        options.usage_error(
            "--generate continues the whole text where it stood: leave out --tokens and --start-position"
        )
    if options.text is not None and options.model is None:
        options.usage_error("--text needs --model, for its tokenizer")
    if options.output is not None:
        check_output(options.output, options.force)
    from ..cache_file import save_cache
    from ..codec import Codec
    from ..report.table import format_bytes, format_fields, format_seconds

    check_device(options.device)
    stream = read_stream(options.stream)
    calibration = find_calibration(options)
    tokenizer = load_tokenizer(options.model) if options.text is not None else None
    token_ids = _text_ids(options, options.text, tokenizer) if options.text is not None else None
    if options.generate is not None and token_ids is not None:
        check_context(options.model, len(token_ids) + options.generate, "text and continuation have")
    codec = Codec(calibration, device=options.device)
    started = time.perf_counter()
    cache = codec.decode_neutral(stream, token_ids, options.tokens, options.start_position)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"n_tokens": cache.n_tokens, "decode_seconds": seconds}
    texts = []
    if options.output is not None:
        save_cache(options.output, cache, None if token_ids is None else token_ids[: cache.n_tokens])
        result |= {"path": str(options.output), "file_bytes": options.output.stat().st_size}
        fields = [
            ("saved", f"{options.output}, {format_bytes(result['file_bytes'])}"),
            ("cache", f"{cache.n_tokens:,} tokens, {str(cache.dtype).removeprefix('torch.')}, {cache.describe()}"),
            ("decode", format_seconds(seconds)),
        ]
        texts.append(format_fields(fields))
    if options.generate is not None:
        result["continuation"] = _generate(options, cache, token_ids, tokenizer)
        texts.append(result["continuation"])
    return result, "\n\n".join(texts)


def _text_ids(options: argparse.Namespace, path: Path, tokenizer: Any) -> Tensor:
    """The ids of a text's tokens: all of them or, with --truncate, as many as the model reads."""
    token_ids: Tensor = token_ids_of(path, tokenizer)
    context = context_of(options.model)
    if context is None or len(token_ids) <= context:
        return token_ids
    if not options.truncate:
        raise InvalidArgument(
            f"{path} has {len(token_ids):,} tokens, more than the context of {options.model}, {context:,}; "
            f"--truncate takes the first {context:,} of them"
        )
    note(f"{path}: the first {context:,} of {len(token_ids):,} tokens")
    return token_ids[:context]


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--truncate", action="store_true", help="of a text longer than the model's context, the beginning"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default with --model reference: its own")
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--device", default="cpu", help="where model and codec run (default: cpu)")


def _prefill(options: argparse.Namespace, calibration: Calibration) -> tuple[KVCache, Tensor, float]:
    """The cache of a text, the ids of its tokens, and seconds."""
    from ..huggingface.models import capture

    token_ids = _text_ids(options, options.input, load_tokenizer(options.model))
    model = load_model(options.model, options.device)
    started = time.perf_counter()
    cache = capture(model, token_ids, calibration.geometry, PIECE_TOKENS)
    return cache, token_ids, time.perf_counter() - started


def _generate(options: argparse.Namespace, cache: KVCache, token_ids: Any, tokenizer: Any) -> str:
    """The greedy continuation of the text from the restored cache."""
    import torch

    from ..codec.transformers_cache import to_transformers
    from ..huggingface.models import geometry_of

    model = load_model(options.model, options.device)
    whole = geometry_of(model)
    if whole.describe() != cache.describe():
        raise InvalidArgument(
            f"to generate, the stream must hold the whole cache: {whole.describe()}; it holds {cache.describe()}"
        )
    # The model needs the last token as input to predict the one after it; what the cache knows of it would count twice.
    past = to_transformers(cache.keys[None, :, :, :-1], cache.values[None, :, :, :-1], cache.first_layer)
    ids = token_ids[None].to(options.device)
    with torch.no_grad(), task("generating", options.generate, "tokens") as advance:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=past,
            max_new_tokens=options.generate,
            do_sample=False,
            streamer=_Teller(advance),
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


class _Teller:
    """Hears of every token that `generate` has found, as a streamer of transformers does."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._has_begun = False

    def put(self, _: Any) -> None:
        """The prompt comes first."""
        if self._has_begun:
            self._advance(1)
        self._has_begun = True

    def end(self) -> None:
        """Nothing is left to say."""
