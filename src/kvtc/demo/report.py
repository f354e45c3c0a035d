"""The words and tables of the demo, one block a function, no wider than 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..calibration import Calibration
from ..codec.inspection import StreamInfo
from ..evaluate.provenance import Provenance
from ..evaluate.quality import Quality
from ..report.table import format_bytes, format_fields, format_ratio, format_seconds, format_table

WIDTH = 96
LONG_TEXT = 30_000
INDENT = "  "


def introduction(
    name: str,
    config: Any,
    n_parameters: int,
    calibration: Calibration,
    file_bytes: int,
    n_read: int,
    n_held_out: int,
) -> str:
    """What is going to happen, and with what."""
    share = calibration.n_parameters / n_parameters
    model = (
        f"{name}: {n_parameters / 1e6:.1f} million parameters, bfloat16;\n"
        f"{config.num_hidden_layers} layers with {config.num_key_value_heads} key-value heads of {config.head_dim}"
    )
    once = (
        f"made once per model, for all its texts: {format_bytes(file_bytes)}; {calibration.n_parameters:,} numbers,\n"
        f"{share:.1%} as many as the model has parameters"
    )
    fields = [
        ("model", model),
        ("calibration", once),
        ("text", f"a conversation: {n_read:,} tokens are read, the {n_held_out} that follow are held out"),
    ]
    what = (
        "While a language model reads, it keeps keys and values for every token: its KV cache. Here the cache "
        "becomes a small stream of bytes, is deleted, is restored from those bytes, and the model goes on."
    )
    return _part("kvtc demo: the cache of a conversation is stored and restored", _prose(what), _fields(fields))


def cost(info: StreamInfo, quality: Quality, setting: str, repeats: int) -> str:
    """Bytes before and after, both ratios, and time."""
    sizes = [
        [name, f"{n_bytes:,}", _kib(n_bytes, info.n_tokens)]
        for name, n_bytes in (("cache", info.original_bytes), ("stream", info.total_bytes))
    ]
    exact_tokens = info.sink_tokens + info.window_tokens
    exact_bytes = info.total_bytes - info.body_bytes
    token_bytes = info.original_bytes / info.n_tokens
    coded_bytes = info.body_bytes / max(1, info.body_tokens) * (LONG_TEXT - exact_tokens)
    at_length = LONG_TEXT * token_bytes / (coded_bytes + exact_bytes)
    ratios = [
        ("body_ratio", f"{_ratio(info.body_ratio)}  {info.body_tokens:,} coded tokens against all that they cost"),
        ("total_ratio", f"{_ratio(info.total_ratio)}  all {info.n_tokens:,} tokens against every byte of the stream"),
    ]
    why = (
        f"total_ratio is lower because the first {info.sink_tokens} and the last {info.window_tokens} tokens are kept "
        f"exactly, at full price: {exact_bytes / info.total_bytes:.0%} of this stream. With {LONG_TEXT:,} tokens of such text "
        f"it would be about {at_length:.0f}x."
    )
    times = [
        ("prefill", f"{_time(quality.prefill_seconds)}  what it takes the model to read the conversation"),
        ("encode", f"{_time(quality.encode_seconds)}  cache to stream"),
        ("decode", f"{_time(quality.decode_seconds)}  stream to cache, instead of prefill"),
    ]
    note = f"Medians of {repeats} runs." if repeats > 1 else "One run."
    table = format_table(["", "bytes", "KiB per token"], sizes, INDENT)
    return _part(f"1. Stored: {setting}", table, _fields(ratios), _prose(why), _fields(times), note)


def continuation(exact: str, restored: str, n_tokens: int) -> str:
    """What the model says next, from either cache."""
    said = _fields([("exact cache", _quote(exact)), ("restored cache", _quote(restored))])
    verdict = f"The same, all {n_tokens} tokens." if exact == restored else _difference(exact, restored)
    return _part(
        "2. Continued",
        _prose(f'The text stops at "Assistant: You should"; the model goes on, greedily, for {n_tokens} tokens:'),
        said,
        _prose(f"{verdict} (So small a model soon goes in circles. What counts is whether both go the same way.)"),
    )


def facts(told: Sequence[tuple[str, str]], exact: Sequence[str], restored: Sequence[str]) -> str:
    """Facts of the coded part of the text, asked again."""
    rows = [
        [f"The magic number for {name} is", number, *answers]
        for (name, number), *answers in zip(told, exact, restored, strict=True)
    ]
    right = [
        sum(answer == number for answer, (_, number) in zip(answers, told, strict=True))
        for answers in (exact, restored)
    ]
    verdict = (
        f"Right from the exact cache: {right[0]} of {len(told)}; from the restored one: {right[1]} of {len(told)}."
    )
    return _part(
        "3. Facts asked for",
        f"{len(told)} numbers told in the coded part of the conversation, asked for after its end:",
        format_table(["question", "told", "exact cache", "restored cache"], rows, INDENT),
        verdict,
    )


def predictions(quality: Quality) -> str:
    """The held-out text, predicted from either cache."""
    measures = [
        ["perplexity of the text", f"{quality.perplexity_exact:.2f}", f"{quality.perplexity:.2f}"],
        ["same most likely token", "100.0%", f"{quality.top1_agreement:.1%}"],
        ["KL(exact || restored), nats", "0", f"{quality.kl:.4f}"],
    ]
    return _part(
        "4. Compared token by token",
        f"How the conversation really went on: {quality.n_continuation} predictions from either cache.",
        format_table(["", "exact cache", "restored cache"], measures, INDENT),
    )


def table(qualities: Sequence[Quality], n_known: Mapping[str, int], n_facts: int) -> str:
    """One row a profile and ratio, after the exact cache."""
    first = qualities[0]

    def row(
        name: str, ratios: Sequence[float | None], n_bytes: int, kl: str, top1: float, perplexity: float
    ) -> list[str]:
        known = f"{n_known[name]}/{n_facts}"
        size = _kib(n_bytes, first.n_tokens)
        return [name, *map(format_ratio, ratios), size, kl, f"{top1:.1%}", f"{perplexity:.2f}", known]

    rows = [row("exact", (1.0, 1.0), first.original_bytes, "0", 1.0, first.perplexity_exact)]
    for one in qualities:
        ratios = one.body_ratio, one.total_ratio
        rows.append(row(one.name, ratios, one.total_bytes, f"{one.kl:.4f}", one.top1_agreement, one.perplexity))
    header = ["", "body_ratio", "total_ratio", "KiB/token", "KL, nats", "top-1", "perplexity", "facts"]
    note = "top-1: same most likely token as from the exact cache. facts: numbers of part 3 that are right."
    return _part("5. Every profile, at other ratios", format_table(header, rows, INDENT), _prose(note))


def picture(path: Path) -> str:
    """Where the picture is."""
    return f"\nsaved {path}  what quality costs"


def ending(provenance: Provenance) -> str:
    """Where the figures come from, and where to go on."""
    measured = _prose(f"Measured {provenance.describe()}.")
    return f"\n{measured}\n\nTo go on: examples/01_store_a_chat.py, or `kvtc calibrate --help` for a model of your own."


def _part(heading: str, *blocks: str) -> str:
    return "\n\n".join([f"\n{heading}\n{'-' * len(heading)}", *blocks])


def _prose(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _fields(fields: Sequence[tuple[str, str]], indent: str = INDENT) -> str:
    """Names and values, where a value may have several lines."""
    lines = [
        (name if index == 0 else "", line) for name, value in fields for index, line in enumerate(value.splitlines())
    ]
    return format_fields(lines, indent)


def _quote(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH - 18)


def _difference(exact: str, restored: str) -> str:
    words = list(zip(exact.split(), restored.split(), strict=False))
    same = next((index for index, (left, right) in enumerate(words) if left != right), len(words))
    return f"The same for {same} words, then different."


def _kib(n_bytes: int, n_tokens: int) -> str:
    return f"{n_bytes / 1024 / n_tokens:.2f}"


def _ratio(ratio: float | None) -> str:
    return format_ratio(ratio).rjust(6)


def _time(seconds: float) -> str:
    return format_seconds(seconds).rjust(7)
