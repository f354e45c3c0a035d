"""What kvtc does to the cache of Gemma 3 270M: 3 layers of full attention and 15 with windows of 512 tokens.

    python -m benchmarks.quality.gemma3 --calibration FILE --paper-windows FILE --calibration-text FILE... --text FILE...

Calibrations that are not there yet are made from --calibration-text: one as `kvtc calibrate` makes it, and one of the windows for
`paper`, which kvtc does not have: there a window is a cache of its own, of the tokens that resume points need. Bytes are those of
real streams; the KL is that of predictions from the end of the cache. No token is exact but the sinks of kvtc. The model is
`gemma3-270m`, which `make bench-models` installs.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtc
from benchmarks.shared.text_quality import add_text_arguments, print_qualities, stretches
from kvtc.calibration.fit import RANK_CAP, FitOptions, fit
from kvtc.calibration.rows import CalibrationRows
from kvtc.cli.texts import documents, token_sequences
from kvtc.evaluate.baselines import Fp8, Int4
from kvtc.evaluate.baselines.stream import BodyMethod, Header
from kvtc.evaluate.derived import FewerBytes, fewer_bytes
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.quality import Quality, perplexity, summarize
from kvtc.evaluate.schema import ABLATIONS
from kvtc.huggingface.calibrate import accumulate
from kvtc.huggingface.continuation import mean_divergence, predict
from kvtc.huggingface.support import covered_geometries
from kvtc.installed_models import GEMMA3, installed_model
from kvtc.process.progress import reporting
from kvtc.report.table import format_table

RESUME_POINTS = (1, 4, 16)
RATIOS = (8, 16, 32)
FULL_RATIOS = (4, 8, 16, 32, 64)
PAPER_RATIOS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Part:
    """Some layers of a cache: keys and values [L, H, T, D] and where their tokens stand, [T]."""

    layers: tuple[int, ...]
    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def original_bytes(self) -> int:
        return 2 * (self.keys.numel() + self.values.numel())

    def neutral(self) -> kvtc.KVCache:
        """As codecs take it."""
        return kvtc.KVCache(self.keys, self.values, positions=self.positions, layers=self.layers)

    def tokens(self, chosen: Tensor) -> "Part":
        """Those of some positions."""
        keys, values = self.keys[:, :, chosen], self.values[:, :, chosen]
        return replace(self, keys=keys, values=values, positions=self.positions[chosen])


@dataclass(frozen=True)
class Coded:
    """Bytes of the tokens that are coded with losses, how many of them there are, all bytes, and what comes back."""

    body_bytes: int
    body_original_bytes: float
    body_tokens: int
    total_bytes: int
    keys: Tensor
    values: Tensor


Coder = Callable[[Part], Coded]


def exact(part: Part) -> Coded:
    """16 bits a value."""
    size = part.original_bytes
    return Coded(size, size, len(part.positions), size, part.keys, part.values)


def with_baseline(method: BodyMethod) -> Coder:
    def coded(part: Part) -> Coded:
        data = method.encode_body(part.keys, part.values)
        keys, values = method.decode_body(data, Header.of(part.keys, part.values, 0))
        size, original, n_tokens = len(data), part.original_bytes, len(part.positions)
        return Coded(size, original, n_tokens, size, keys.bfloat16(), values.bfloat16())

    return coded


def with_codec(codec: kvtc.Codec) -> Coder:
    def coded(part: Part) -> Coded:
        stream = codec.encode(part.neutral())
        info, back = kvtc.inspect(stream), codec.decode_neutral(stream)
        original = part.original_bytes / info.n_tokens * info.body_tokens
        return Coded(info.body_bytes, original, info.body_tokens, info.total_bytes, back.keys, back.values)

    return coded


@dataclass(frozen=True)
class Text:
    """A text that was read: its cache, all that its windows ever held, its resume points, and what the model predicts from it."""

    ids: Tensor
    cache: Any
    full: Part
    windows: Part
    points: kvtc.ResumePoints
    fed: Tensor
    target: Tensor
    expected: Tensor

    def at(self, n_points: int) -> kvtc.ResumePoints:
        """So many of its resume points, evenly spaced, the end among them."""
        every = len(self.ids) // n_points
        chosen = kvtc.ResumePoints(every)
        chosen.taken = {stop: its for stop, its in self.points.taken.items() if stop % every == 0}
        return chosen


def chunk_of(n_tokens: int) -> int:
    """Tokens from one of the most resume points to the next, and of a chunk."""
    return n_tokens // RESUME_POINTS[-1]


def read(model: Any, ids: Tensor, n_continuation: int) -> Text:
    """Read all but the last tokens in pieces shorter than a window, so that every token is seen in the windows."""
    sliding = [index for index, its in enumerate(model.config.layer_types) if its == "sliding_attention"]
    cached, fed, target = ids[: -n_continuation - 1], ids[-n_continuation - 1 : -1], ids[-n_continuation:]
    points, cache, pieces = kvtc.ResumePoints(chunk_of(len(cached))), None, []
    with torch.no_grad():
        for start in range(0, len(cached), points.every):
            piece = cached[start : start + points.every]
            cache = model(piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            pieces.append(_sides(cache, sliding, len(piece)))
            points.take(cache)
    full = tuple(index for index in range(len(model.config.layer_types)) if index not in sliding)
    positions = torch.arange(len(cached))
    keys, values = _sides(cache, full, len(cached))
    seen = [torch.cat(sides, dim=2) for sides in zip(*pieces, strict=True)]
    return Text(
        cached, cache, Part(full, keys, values, positions), Part(tuple(sliding), *seen, positions), points, fed, target,
        predict(model, cache, fed),
    )  # fmt: skip


def _sides(cache: Any, layers: Any, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, T, D] of the last tokens."""
    layers = [cache.layers[index] for index in layers]
    return (
        torch.stack([layer.keys[0, :, -n_tokens:] for layer in layers]),
        torch.stack([layer.values[0, :, -n_tokens:] for layer in layers]),
    )


def kept_tokens(text: Text, n_points: int, n_held: int) -> Tensor:
    """The positions of window tokens that so many resume points need."""
    n_tokens = len(text.ids)
    kept = torch.zeros(n_tokens, dtype=torch.bool)
    for point in range(1, n_points + 1):
        stop = n_tokens * point // n_points
        kept[max(0, stop - n_held) : stop] = True
    return kept.nonzero()[:, 0]


def by_parts(model: Any, text: Text, name: str, full: Coder, windows: Coder | None, n_points: int) -> Quality:
    """A text whose full layers go through one coder and whose windows through another; None: windows stay, and do not count."""
    n_held = int(model.config.sliding_window) - 1
    cache, started = copy.deepcopy(text.cache), time.perf_counter()
    parts = [(text.full, full)]
    if windows is not None:
        parts.append((text.windows.tokens(kept_tokens(text, n_points, n_held)), windows))
    found = [coder(part) for part, coder in parts]
    for (part, _), coded in zip(parts, found, strict=True):
        for row, layer in enumerate(part.layers):
            sides = coded.keys[row][None], coded.values[row][None]
            if part.layers == text.windows.layers:
                sides = tuple(side[:, :, -n_held:] for side in sides)
            cache.layers[layer].keys, cache.layers[layer].values = sides
    seconds = time.perf_counter() - started
    original = sum(part.original_bytes for part, _ in parts)
    body, total = (sum(getattr(one, of) for one in found) for of in ("body_bytes", "total_bytes"))
    ratio = sum(one.body_original_bytes for one in found) / body
    n_body = sum(one.body_tokens for one in found)
    return _quality(model, text, name, cache, (original, body, total), ratio, n_body, seconds)


def by_codec(
    model: Any, text: Text, name: str, codec: kvtc.Codec, n_points: int
) -> tuple[Quality, dict[str, tuple[int, int]]]:
    """The whole cache through one codec: one stream, one step; and original and stored bytes by group."""
    started = time.perf_counter()
    stream = codec.encode(text.cache, text.ids, points=text.at(n_points))
    restored = codec.decode(stream, text.ids)
    seconds, info = time.perf_counter() - started, kvtc.inspect(stream)
    groups = {group.kind: (group.original_bytes, group.stored_bytes) for group in info.groups}
    sizes = info.original_bytes, info.body_bytes, info.total_bytes
    quality = _quality(model, text, name, restored, sizes, info.body_ratio or 1.0, info.body_tokens, seconds)
    return quality, groups


def _quality(
    model: Any,
    text: Text,
    name: str,
    cache: Any,
    sizes: tuple[int, int, int],
    body_ratio: float,
    body_tokens: int,
    seconds: float,
) -> Quality:
    """sizes: original, of the body and in all."""
    predicted = predict(model, cache, text.fed)
    kl, (original, body, total) = mean_divergence(text.expected, predicted), sizes
    return Quality(
        name=name, n_documents=1, n_tokens=len(text.ids), body_tokens=body_tokens, original_bytes=original, body_bytes=body,
        total_bytes=total, body_ratio=body_ratio, total_ratio=original / total, n_continuation=len(text.target), kl=kl,
        top1_agreement=float((text.expected.argmax(dim=-1) == predicted.argmax(dim=-1)).float().mean()),
        perplexity_exact=perplexity(text.expected, text.target), perplexity=perplexity(predicted, text.target),
        prefill_seconds=0.0, encode_seconds=seconds, decode_seconds=0.0, kl_by_text=[kl], body_bytes_by_text=[body],
    )  # fmt: skip


def of_the_model(model: Any, tokenizer: Any, options: argparse.Namespace) -> kvtc.Calibration:
    """The calibration of both groups; made and saved if it is not there."""
    if not options.calibration.exists():
        texts = token_sequences(documents(options.calibration_text), tokenizer, options.sequence_tokens)
        made = kvtc.calibrate(model, texts, max_tokens=options.calibration_tokens, profiles=("paper", "joint"))
        made.save(options.calibration)
    return kvtc.load_calibration(options.calibration)


def paper_windows(model: Any, tokenizer: Any, options: argparse.Namespace) -> kvtc.Calibration:
    """The paper's, of the windows alone; made and saved if it is not there."""
    if not options.paper_windows.exists():
        texts = token_sequences(documents(options.calibration_text), tokenizer, options.sequence_tokens)
        windows = next(its for its in covered_geometries(model) if its.is_window)
        rows = CalibrationRows(windows, max_tokens=options.calibration_tokens, rank=options.window_rank)
        with reporting():
            accumulate(model, texts, [rows])
            made = fit(rows, FitOptions(options.window_rank))
        # As a cache of its own it has no windows.
        replace(made, geometry=replace(windows, is_window=False)).save(options.paper_windows)
    return kvtc.load_calibration(options.paper_windows)


def measured(
    model: Any, text: Text, calibration: kvtc.Calibration, windows: kvtc.Calibration
) -> tuple[dict[str, list[Quality]], dict[str, dict[str, tuple[int, int]]]]:
    """Every study of one text; and of those through one codec the bytes by group."""
    options = {"window_tokens": 0, "chunk_tokens": chunk_of(len(text.ids))}

    def coder(calibration: kvtc.Calibration, profile: str, ratio: float, **more: int) -> Coder:
        return with_codec(kvtc.Codec(calibration, profile, ratio=ratio, **(options | more)))

    fp8, int4, alone = with_baseline(Fp8()), with_baseline(Int4()), replace(calibration, further=())
    full = {"FP8": fp8, "INT4": int4}
    full |= {f"paper {ratio}x": coder(calibration, "paper", ratio) for ratio in FULL_RATIOS}
    full |= {f"joint {ratio}x": coder(alone, "joint", ratio) for ratio in FULL_RATIOS}
    studies = {"Full layers; windows exact": [by_parts(model, text, *one, None, 1) for one in full.items()]}
    both = {"FP8": (fp8, fp8), "INT4": (int4, int4)}
    both |= {
        f"paper {ratio}x": (coder(calibration, "paper", ratio), coder(windows, "paper", ratio))
        for ratio in PAPER_RATIOS
    }
    groups = {}
    for n_points in RESUME_POINTS:
        found = [by_parts(model, text, name, *coders, n_points) for name, coders in both.items()]
        for ratio in RATIOS:
            name = f"joint {ratio}x"
            one, groups[f"{name}, {n_points} points"] = by_codec(
                model, text, name, kvtc.Codec(calibration, ratio=ratio, **options), n_points
            )
            found.append(one)
        studies[f"Full layers and windows; resume points: {n_points}"] = found
    return studies, groups


def show(
    studies: dict[str, list[Quality]],
    compared: dict[str, list[FewerBytes]],
    groups: dict[str, dict[str, tuple[int, int]]],
) -> None:
    """All of it as tables."""
    for title, qualities in studies.items():
        print(f"\n{title}")
        print_qualities(qualities)
        lines = [[one.at, f"{one.kl:.5f}", _times(one)] for one in compared[title]]
        print(format_table(["times fewer body bytes of joint at the KL of", "KL", "times"], lines))
    kinds = list(next(iter(groups.values())))
    rows = [
        [name, *(f"{stored:,} of {original:,} ({original / stored:.1f}x)" for original, stored in its.values())]
        for name, its in groups.items()
    ]
    print(format_table(["bytes by group, all texts", *kinds], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.set_defaults(tokens=4096 + 129, continuation=128, texts_per_file=1)
    parser.add_argument("--model", type=Path, help="its folder; the installed one by default")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--paper-windows", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, nargs="+", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=40_000)
    parser.add_argument("--sequence-tokens", type=int, default=1024)
    parser.add_argument("--window-rank", type=int, default=RANK_CAP)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    place = options.model or installed_model(GEMMA3).directory
    model = AutoModelForCausalLM.from_pretrained(place, dtype="bfloat16").eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    calibration, windows = of_the_model(model, tokenizer, options), paper_windows(model, tokenizer, options)
    print(f"calibrated: {time.perf_counter() - started:.0f} s", flush=True)
    per_study: dict[str, list[list[Quality]]] = {}
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for ids in stretches(tokenizer, options):
        studies, its_groups = measured(model, read(model, ids, options.continuation), calibration, windows)
        for title, qualities in studies.items():
            per_study.setdefault(title, []).append(qualities)
        for name, kinds in its_groups.items():
            before = groups.get(name, dict.fromkeys(kinds, (0, 0)))
            groups[name] = {kind: (before[kind][0] + a, before[kind][1] + b) for kind, (a, b) in kinds.items()}
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    summed = {title: [summarize(same) for same in zip(*texts, strict=True)] for title, texts in per_study.items()}
    compared = {title: fewer_bytes({0: qualities}, ["joint"]) for title, qualities in summed.items()}
    show(summed, compared, groups)
    save_result(
        "gemma3",
        {
            "kind": ABLATIONS,
            "seconds": round(time.perf_counter() - started, 1),
            "studies": [
                {"title": title, "note": "Gemma 3 270M, base. Of kvtc sinks are exact; no other token is.",
                 "qualities": [asdict(quality) for quality in qualities]}
                for title, qualities in summed.items()
            ],
            "fewer_bytes": {title: [asdict(one) for one in figures] for title, figures in compared.items()},
            "bytes_by_group_of_all_texts": groups,
            "calibration": calibration.info,
        },
    )  # fmt: skip


def _times(figure: FewerBytes) -> str:
    if figure.body_factor is None:
        return "not reached"
    interval = "" if figure.body_low is None else f" ({figure.body_low:.1f} to {figure.body_high:.1f})"
    return f"{'>= ' * figure.is_bound}{figure.body_factor:.1f}x{interval}"


if __name__ == "__main__":
    main()
