"""What recurrent states cost in a stream, and what their rounding costs in predictions.

    python -m benchmarks.quality.states --model FOLDER --text FILE... [--calibration FILE]

FOLDER is any model of transformers with recurrent layers, and its tokenizer. Bytes are those of real streams, at resume points
every 256, 1024 and 4096 tokens. KL is that of the predictions after the last point, from a cache whose states alone were rounded,
against the exact cache; intervals are of 95 %, over texts (bootstrap). Rows named "without ..." or "with ..." are no options of the
codec: they show what each part of the rounding does. In the chat the states are rounded before every turn, and once only.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtc
from benchmarks.shared.text_quality import add_text_arguments, stretches
from kvtc.coding.exact.floats import FloatLayout, compress_floats
from kvtc.coding.states.rounding import ROUNDED_BITS, restore_rows, round_rows
from kvtc.evaluate.provenance import save_result
from kvtc.huggingface.continuation import mean_divergence, predict, read_on
from kvtc.report.table import format_table

CADENCES = (256, 1024, 4096)
TURNS, TURN_TOKENS = 15, 128
FORMATS = ("lossless", *ROUNDED_BITS)
Rounding = Callable[[Tensor], tuple[Tensor, int]]
"""A state float32 [heads, rows, features] -> what comes back, and its bytes."""


def rounding(bits: int, *, is_turned: bool = False, per_head: bool = False) -> Rounding:
    """One way to round: with a Hadamard transform of each row, with a scale for each head instead of each row."""

    def rounded(state: Tensor) -> tuple[Tensor, int]:
        signs = torch.where(torch.rand(state.shape[-1], generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
        rows = hadamard(state * signs) if is_turned else state
        scales, integers = round_rows(rows.reshape(1, len(state), -1) if per_head else rows, bits)
        back, integers = (one.reshape(state.shape) for one in (restore_rows(scales, integers), integers))
        patterns = (integers.abs() + 128 * (integers < 0)).to(torch.uint8)
        layout = FloatLayout(state.shape[1], state.shape[2], torch.float8_e4m3fn)
        n_bytes = len(compress_floats(patterns.numpy().tobytes(), layout)) + 2 * scales.numel()
        return (hadamard(back) * signs if is_turned else back), n_bytes

    return rounded


def hadamard(rows: Tensor) -> Tensor:
    """The orthonormal transform of the last axis, a power of two; its own inverse."""
    shape, half = rows.shape, 1
    while half < shape[-1]:
        first, second = rows.reshape(-1, shape[-1] // half // 2, 2, half).unbind(-2)
        rows, half = torch.stack([first + second, first - second], dim=-2).reshape(shape), 2 * half
    return rows / shape[-1] ** 0.5


WAYS = {f"int{bits}": rounding(bits) for bits in (8, 6, 4)}
WAYS |= {f"int{bits} with Hadamard transform": rounding(bits, is_turned=True) for bits in (8, 6, 4)}
WAYS |= {f"int{bits} with a scale a head": rounding(bits, per_head=True) for bits in (8, 6, 4)}


def states_of(cache: Any, attribute: str = "recurrent_states") -> list[tuple[dict[int, Tensor], int]]:
    """Where the states of a cache stand."""
    return [
        (states, number)
        for layer in cache.layers
        for states in [getattr(layer, attribute, {})]
        for number, state in states.items()
        if isinstance(state, Tensor)
    ]


def with_rounded(cache: Any, way: Rounding, attribute: str = "recurrent_states") -> tuple[Any, int]:
    """A copy of a cache with rounded states, and their bytes."""
    changed, n_bytes = copy.deepcopy(cache), 0
    for states, number in states_of(changed, attribute):
        state = states[number]
        back, size = way(state.float().reshape(-1, *state.shape[-2:]))
        states[number], n_bytes = back.to(state.dtype).reshape(state.shape), n_bytes + size
    return changed, n_bytes


def with_zeros(state: Tensor) -> tuple[Tensor, int]:
    """Says how much predictions depend on states at all."""
    return torch.zeros_like(state), 0


def group_bytes(codec: kvtc.Codec, cache: Any, ids: Tensor, points: kvtc.ResumePoints, every: int) -> dict[str, int]:
    """Bytes of a stream by group, with a resume point every so many tokens."""
    some = kvtc.ResumePoints(every)
    some.taken = {position: its for position, its in points.taken.items() if position % every == 0}
    found: dict[str, int] = {}
    for group in kvtc.inspect(codec.encode(cache, ids, points=some)).groups:
        found[group.part] = found.get(group.part, 0) + group.stored_bytes
    return found


def chat(model: Any, ids: Tensor, n_tokens: int, codec: kvtc.Codec) -> dict[str, list[float]]:
    """KL of every turn of a chat: states rounded before each turn so far, and before this turn alone."""
    exact = kvtc.prefill(model, ids[:n_tokens], kvtc.ResumePoints())
    often, found = copy.deepcopy(exact), {"each turn": [], "once": []}
    for turn in range(TURNS):
        start = n_tokens + turn * TURN_TOKENS
        before, fed = ids[:start], ids[start : start + TURN_TOKENS]
        once, often = (codec.decode(codec.encode(cache, before)) for cache in (exact, often))
        expected = read_on(model, exact, fed)
        for name, cache in (("each turn", often), ("once", once)):
            found[name].append(mean_divergence(expected, read_on(model, cache, fed)))
    return found


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % interval over texts."""
    each = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(each), (2000, len(each)), generator=torch.Generator().manual_seed(0))
    low, high = each[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(each.mean()), "low": low, "high": high, "by_text": values}


def measure(model: Any, texts: list[Tensor], codecs: dict[str, kvtc.Codec], n_continuation: int) -> dict[str, Any]:
    """Everything, over all texts."""
    kls: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    by_cadence: dict[str, list[dict[str, int]]] = {}
    drift: dict[str, list[dict[str, list[float]]]] = {name: [] for name in ROUNDED_BITS}
    for ids in texts:
        cached, fed = ids[: -n_continuation - 1], ids[-n_continuation - 1 : -1]
        points = kvtc.ResumePoints(CADENCES[0])
        cache = kvtc.prefill(model, cached, points)
        expected = predict(model, cache, fed)
        for name, codec in codecs.items():
            for every in CADENCES:
                found = group_bytes(codec, cache, cached, points, every)
                by_cadence.setdefault(f"{name}, every {every}", []).append(found)
        for name in FORMATS:
            codec = kvtc.Codec(lossless=True, states=name)
            restored = codec.decode(codec.encode(cache, cached))
            kls.setdefault(f"stream, {name}", []).append(mean_divergence(expected, predict(model, restored, fed)))
        for name, way in (WAYS | {"zeros": with_zeros}).items():
            changed, size = with_rounded(cache, way)
            kls.setdefault(name, []).append(mean_divergence(expected, predict(model, changed, fed)))
            sizes.setdefault(name, []).append(size)
        for name in ("int8", "int6"):
            changed, size = with_rounded(cache, WAYS[name], "conv_states")
            kls.setdefault(f"convolutions, {name}", []).append(mean_divergence(expected, predict(model, changed, fed)))
            sizes.setdefault(f"convolutions, {name}", []).append(size)
        for name, its in drift.items():
            start = len(ids) - TURNS * TURN_TOKENS
            its.append(chat(model, ids, start, kvtc.Codec(lossless=True, states=name)))
        print(f"{len(kls['zeros'])} of {len(texts)} texts", flush=True)
    return {
        "kl": {name: interval(values) for name, values in kls.items()},
        "state_bytes": {name: sum(values) / len(values) for name, values in sizes.items()},
        "numbers": sum(states[number].numel() for states, number in states_of(cache)),
        "bytes_by_part": {
            name: {part: sum(one[part] for one in found) / len(found) for part in found[0]}
            for name, found in by_cadence.items()
        },
        "chat": {
            name: {how: [interval([one[how][turn] for one in its]) for turn in range(TURNS)] for how in its[0]}
            for name, its in drift.items()
        },
    }


def show(found: dict[str, Any]) -> None:
    """All of it as tables."""
    parts = list(next(iter(found["bytes_by_part"].values())))
    rows = [[name, *(f"{its[part]:,.0f}" for part in parts)] for name, its in found["bytes_by_part"].items()]
    print(format_table(["bytes of a text, resume points", *parts], rows))
    rows = []
    for name, kl in found["kl"].items():
        size = found["state_bytes"].get(name)
        rows.append(
            [name, f"{size:,.0f}" if size else "-", f"{kl['mean']:.2e}", f"{kl['low']:.1e} .. {kl['high']:.1e}"]
        )
    print(format_table(["states", "bytes of a snapshot", "KL, nats", "95 %"], rows))
    rows = [
        [f"{name}, {how}", *(f"{turns[turn]['mean']:.1e}" for turn in (0, 4, 9, 14))]
        for name, its in found["chat"].items()
        for how, turns in its.items()
    ]
    print(format_table(["KL in turn", "1", "5", "10", "15"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.set_defaults(tokens=4096 + 129, continuation=128, texts_per_file=2)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with recurrent layers")
    parser.add_argument("--calibration", type=Path, help="of the model: keys and values are coded, too")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    codecs = {f"lossless, states {name}": kvtc.Codec(lossless=True, states=name) for name in FORMATS}
    if options.calibration is not None:
        calibration = kvtc.load_calibration(options.calibration)
        codecs |= {f"16x, states {name}": kvtc.Codec(calibration, ratio=16, states=name) for name in FORMATS}
    found = measure(model, list(stretches(tokenizer, options)), codecs, options.continuation)
    show(found)
    seconds = round(time.perf_counter() - started, 1)
    save_result("states", {"model": options.model.name, "seconds": seconds, **found})


if __name__ == "__main__":
    main()
