"""The subcommand `encode`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Outcome, Subcommands, add_calibration, add_model, add_output, check_output, positive
from .models import find_calibration, known_calibration, load_model, load_tokenizer, source_of
from .texts import add_truncate, text_ids

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration import Calibration
    from ..codec import Codec
    from ..codec.resume_points import ResumePoints

CACHE_SUFFIX = ".safetensors"
PIECE_TOKENS = 512
"""Of a prefill: progress shows after each piece."""


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `encode`."""
    parser = subcommands.add(encode)
    parser.add_argument("input", type=Path, help="a saved cache (.safetensors), or a text to prefill with --model")
    add_output(parser, "the stream to write")
    add_calibration(parser)
    add_model(parser)
    add_truncate(parser)
    parser.add_argument(
        "--resume-every",
        type=positive,
        metavar="N",
        help="of a text, where the model has windows or states: keep every N tokens what it takes to go on from there (default: "
        "at the end alone)",
    )
    add_codec(parser)


def add_codec(parser: Any) -> None:
    """The options of `kvtc.Codec`, as `make_codec` takes them."""
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="paper, joint or conditional (default: joint, if the calibration serves it; conditional needs --model, and a "
        "cache that was saved with token ids)",
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--ratio", type=float, help="how many times fewer bits the coded tokens get")
    rate.add_argument("--step", type=float, help="instead: the step of joint and conditional")
    rate.add_argument(
        "--kl",
        type=float,
        metavar="NATS",
        help="instead: what the divergence of predictions does not exceed on average, by the calibration's curve (joint, "
        "conditional); below the curve nothing is lost",
    )
    rate.add_argument("--lossless", action="store_true", default=None, help="instead: keep every token bit for bit")
    parser.add_argument(
        "--fixed-size",
        action="store_true",
        default=None,
        help="pad to the same bytes for every cache of as many tokens (joint, conditional; with a ratio)",
    )
    parser.add_argument("--sink-tokens", type=int, metavar="N", help="first tokens kept exactly")
    parser.add_argument("--window-tokens", type=int, metavar="N", help="last tokens kept exactly")
    parser.add_argument(
        "--window-format",
        choices=("exact", "coded"),
        help="coded: like the body, with a quarter of its step (joint, conditional)",
    )
    parser.add_argument(
        "--coder",
        choices=("deflate", "zstd", "lz4", "none"),
        help="of the bodies of paper (default: deflate); none: of exact tokens, too",
    )
    parser.add_argument(
        "--states",
        choices=("lossless", "int8", "int6"),
        help="how recurrent states are kept (default: int8, or lossless where tokens are)",
    )
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help="tokens of a chunk, the unit of random access")


def make_codec(options: argparse.Namespace, calibration: Calibration | None) -> Codec:
    """The codec that the options of `add_codec` and `add_model` describe."""
    from ..codec import Codec

    taken = signature(Codec).parameters.keys() - {"calibration", "model"}
    given = {name: value for name, value in vars(options).items() if name in taken and value is not None}
    if options.profile == "conditional" and options.model is not None:
        given["model"] = source_of(options.model)
    return Codec(calibration, **given)


def encode(options: argparse.Namespace) -> Outcome:
    """Code a cache, or the cache of a text, into a stream.

    Options that are not given have the defaults of kvtc.Codec: ratio 16, 4 sink and 128 window
    tokens, deflate. --lossless needs no calibration. Where a model keeps more than keys and
    values of every token, such as states, the stream holds all tokens of a text but the last, with
    which the model goes on.
    """
    check_output(options.output, options.force)
    is_cache = options.input.suffix == CACHE_SUFFIX
    if not is_cache and options.model is None:
        options.usage_error(f"a text needs --model; a saved cache ends in {CACHE_SUFFIX}")
    from ..cache_file import load_cache
    from ..codec.inspection import inspect
    from ..files import write_atomically

    calibration = known_calibration(options) if options.lossless else find_calibration(options)
    prefill_seconds, points = None, None
    if is_cache:
        cache, token_ids = load_cache(options.input)
    codec = make_codec(options, calibration)
    if not is_cache:
        started = time.perf_counter()
        cache, token_ids, points = _prefill(options, calibration)
        prefill_seconds = time.perf_counter() - started
    started = time.perf_counter()
    stream = codec.encode(cache, token_ids, points=points)
    encode_seconds = time.perf_counter() - started
    write_atomically(options.output, stream)

    from ..report.table import format_bytes, format_fields, format_ratio, format_seconds

    info = inspect(stream)
    facts = asdict(replace(info, sections=()))
    times = {"prefill_seconds": prefill_seconds, "encode_seconds": encode_seconds}
    result = {"path": str(options.output), **facts, **times}
    del result["sections"]
    sizes = format_bytes(info.total_bytes), format_bytes(info.original_bytes)
    regions = f"{info.sink_tokens} sink, {info.body_tokens:,} body, {info.window_tokens} window"
    fields = [
        ("saved", f"{options.output}, {sizes[0]} for {sizes[1]} of cache"),
        ("tokens", f"{info.n_tokens:,}: {regions}"),
        ("body_ratio", format_ratio(info.body_ratio)),
        ("total_ratio", format_ratio(info.total_ratio)),
        ("encode", format_seconds(encode_seconds)),
    ]
    if prefill_seconds is not None:
        fields.append(("prefill", format_seconds(prefill_seconds)))
    return result, format_fields(fields)


def _prefill(options: argparse.Namespace, calibration: Calibration | None) -> tuple[Any, Tensor, ResumePoints | None]:
    """The cache of a text, the ids of its tokens, and what it takes to resume before its end."""
    from ..codec.resume_points import RESUME_EVERY, ResumePoints
    from ..huggingface.models import capture, keeps_every_token
    from ..huggingface.prefill import prefill

    token_ids = text_ids(options, options.input, load_tokenizer(options.model))
    model = load_model(options.model, options.device)
    if keeps_every_token(model):
        geometry = None if calibration is None else calibration.geometry
        return capture(model, token_ids, geometry, PIECE_TOKENS), token_ids, None
    points = ResumePoints(options.resume_every or RESUME_EVERY)
    cache = prefill(model, token_ids[:-1], points)
    return cache, token_ids[:-1], points if options.resume_every else None
