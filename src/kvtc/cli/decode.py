"""The subcommand `decode`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from ..process.progress import Advance, note, task
from .arguments import (
    Outcome,
    Subcommands,
    add_calibration,
    add_model,
    add_output,
    check_output,
    positive,
    read_stream,
)
from .models import check_context, find_calibration, known_calibration, load_model, load_tokenizer, source_of
from .texts import add_truncate, text_ids

if TYPE_CHECKING:
    from ..cache import KVCache
    from ..codec import Codec
    from ..codec.inspection import StreamInfo


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `decode`."""
    parser = subcommands.add(decode)
    parser.add_argument("stream", type=Path)
    add_output(parser, "the cache file to write (.safetensors)", required=False)
    add_calibration(parser)
    add_model(parser)
    add_truncate(parser)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="the text the stream was made from: ids are compared; conditional needs it, from its beginning on",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="only the first N tokens")
    parser.add_argument("--start-position", type=int, metavar="P", help="move the first token to this position")
    parser.add_argument(
        "--generate", type=positive, metavar="N", help="continue the text by N tokens from the restored cache"
    )


def decode(options: argparse.Namespace) -> Outcome:
    """Restore a cache from a stream, or go on writing from it."""
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
    check_output(options.output, options.force)
    from ..cache_file import save_cache
    from ..codec import Codec
    from ..codec.inspection import inspect
    from ..container.tables import LOSSLESS
    from ..report.table import format_bytes, format_fields, format_seconds

    stream = read_stream(options.stream)
    info = inspect(stream)
    is_lossless = info.profile == LOSSLESS
    calibration = known_calibration(options) if is_lossless else find_calibration(options)
    tokenizer = load_tokenizer(options.model) if options.text is not None else None
    token_ids = text_ids(options, options.text, tokenizer) if options.text is not None else None
    if options.generate is not None and token_ids is not None:
        check_context(options.model, len(token_ids) + options.generate, "text and continuation have")
    is_conditional = info.profile == "conditional"
    model = source_of(options.model) if is_conditional and options.model is not None else None
    codec = Codec(calibration, device=options.device, model=model, lossless=is_lossless)
    if len(info.groups) > 1 or info.resume_points:
        return _go_on(options, codec, stream, info, token_ids, tokenizer)
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


def _generate(options: argparse.Namespace, cache: KVCache, token_ids: Any, tokenizer: Any) -> str:
    """The greedy continuation of the text from the restored cache."""
    from ..codec.transformers_cache import to_transformers
    from ..huggingface.models import geometry_of, keeps_every_token

    model = load_model(options.model, options.device)
    whole = geometry_of(model)
    if not keeps_every_token(model) or whole.describe() != cache.describe():
        raise InvalidArgument(
            f"to generate, the stream must hold the whole cache of {options.model}; it holds {cache.describe()}"
        )
    # The model needs the last token as input to predict the one after it; what the cache knows of it would count twice.
    past = to_transformers(cache.keys[None, :, :, :-1], cache.values[None, :, :, :-1], cache.resolved_layers())
    return _continuation(options, model, past, token_ids, tokenizer)


def _go_on(
    options: argparse.Namespace, codec: Codec, stream: bytes, info: StreamInfo, token_ids: Any, tokenizer: Any
) -> Outcome:
    """As `decode`, of a cache that is more than keys and values of every token: from its last resume point in the text."""
    from ..huggingface.support import supported
    from ..report.table import format_bytes

    groups = {(group.kind, group.layers) for group in info.groups}
    held = "; ".join(f"{kind} of layers {', '.join(map(str, layers))}" for kind, layers in sorted(groups))
    if options.output is not None or options.start_position is not None:
        raise InvalidArgument(
            f"a cache file holds keys and values of every token, and these alone can be moved; the stream holds {held}; "
            "--generate goes on from it"
        )
    kept = info.resume_points or (info.n_tokens,)
    points = [point for point in kept if point < len(token_ids)]
    if not points:
        raise InvalidArgument(
            f"the text has {len(token_ids)} tokens; expected more than {kept[0]}, after which the stream can be resumed"
        )
    model = load_model(options.model, options.device)
    if not groups <= {(group.kind, group.layers) for group in supported(model).groups}:
        raise InvalidArgument(f"the stream holds the cache of another model than {options.model}: {held}")
    started = time.perf_counter()
    cache = codec.decode(stream, token_ids[: points[-1]], points[-1])
    seconds = time.perf_counter() - started
    text = _continuation(options, model, cache, token_ids, tokenizer)
    result = {"n_tokens": points[-1], "decode_seconds": seconds, "continuation": text}
    note(f"{format_bytes(info.total_bytes)}: resumed after {points[-1]:,} of {len(token_ids):,} tokens")
    return result, text


def _continuation(options: argparse.Namespace, model: Any, past: Any, token_ids: Any, tokenizer: Any) -> str:
    """What the model writes after the text, greedily; it reads the tokens that its cache does not hold."""
    import torch

    ids = token_ids[None].to(options.device)
    with torch.no_grad(), task("generating", options.generate, "tokens") as advance:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=past,
            max_new_tokens=options.generate,
            do_sample=False,
            streamer=_Progress(advance),
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


class _Progress:
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
