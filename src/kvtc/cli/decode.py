"""The subcommand `decode`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from ..process.progress import Advance, task
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
from .models import check_context, find_calibration, load_model, load_tokenizer, source_of
from .texts import add_truncate, text_ids

if TYPE_CHECKING:
    from ..cache import KVCache


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
    from ..report.table import format_bytes, format_fields, format_seconds

    stream = read_stream(options.stream)
    calibration = find_calibration(options)
    tokenizer = load_tokenizer(options.model) if options.text is not None else None
    token_ids = text_ids(options, options.text, tokenizer) if options.text is not None else None
    if options.generate is not None and token_ids is not None:
        check_context(options.model, len(token_ids) + options.generate, "text and continuation have")
    is_conditional = inspect(stream).profile == "conditional"
    model = source_of(options.model) if is_conditional and options.model is not None else None
    codec = Codec(calibration, device=options.device, model=model)
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
    import torch

    from ..codec.transformers_cache import to_transformers
    from ..huggingface.models import check_full_attention, geometry_of

    model = load_model(options.model, options.device)
    check_full_attention(model)
    whole = geometry_of(model)
    if whole.describe() != cache.describe():
        raise InvalidArgument(
            f"to generate, the stream must hold the whole cache: {whole.describe()}; it holds {cache.describe()}"
        )
    # The model needs the last token as input to predict the one after it; what the cache knows of it would count twice.
    past = to_transformers(cache.keys[None, :, :, :-1], cache.values[None, :, :, :-1], cache.resolved_layers())
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
