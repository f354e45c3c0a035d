"""What kvtc does to the cache of Gemma 3 270M: 3 layers of full attention and 15 with windows of 512 tokens.

    python -m benchmarks.quality.gemma3 --calibration FILE [--window-calibration FILE] --calibration-text FILE... --text FILE...

A calibration that is not there yet is made from --calibration-text. That of the full layers is what `kvtc calibrate` makes. The
product keeps windows exactly. What --window-calibration asks for is a prototype: it shows what a coder of windows would bring.
Bytes are those of real streams. The model is `gemma3-270m`, which `make bench-models` installs.
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
from kvtc.cache import CacheGeometry
from kvtc.calibration.fit import FitOptions, fit
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
from kvtc.huggingface.models import geometry_of
from kvtc.huggingface.rope_discovery import rope_from_model
from kvtc.huggingface.sensitivity import Sensitivity
from kvtc.installed_models import GEMMA3, installed_model
from kvtc.process.progress import reporting
from kvtc.report.table import format_table

RESUME_POINTS = (1, 4, 16)


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
Cases = dict[str, dict[str, tuple[Coder, Coder]]]


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
    """A text that was read: its cache, all that its windows ever held, and what the model predicts from it."""

    ids: Tensor
    cache: Any
    full: Part
    windows: Part
    fed: Tensor
    target: Tensor
    expected: Tensor


def kept_tokens(model: Any) -> int:
    """Tokens of a sliding layer's cache."""
    return int(model.config.sliding_window) - 1


def read(model: Any, ids: Tensor, n_continuation: int) -> Text:
    """Read all but the last tokens, half a window at a time, so that every token is seen in the windows."""
    piece_tokens = kept_tokens(model) // 2
    sliding = [index for index, its in enumerate(model.config.layer_types) if its == "sliding_attention"]
    cached, fed, target = ids[: -n_continuation - 1], ids[-n_continuation - 1 : -1], ids[-n_continuation:]
    cache, pieces = None, []
    with torch.no_grad():
        for start in range(0, len(cached), piece_tokens):
            piece = cached[start : start + piece_tokens]
            cache = model(piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            pieces.append(_sides(cache, sliding, len(piece)))
    full = tuple(index for index in range(len(model.config.layer_types)) if index not in sliding)
    positions = torch.arange(len(cached))
    keys, values = _sides(cache, full, len(cached))
    seen = [torch.cat(sides, dim=2) for sides in zip(*pieces, strict=True)]
    return Text(
        cached, cache, Part(full, keys, values, positions), Part(tuple(sliding), *seen, positions), fed, target,
        predict(model, cache, fed),
    )  # fmt: skip


def _sides(cache: Any, layers: Any, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, T, D] of the last tokens."""
    layers = [cache.layers[index] for index in layers]
    return (
        torch.stack([layer.keys[0, :, -n_tokens:] for layer in layers]),
        torch.stack([layer.values[0, :, -n_tokens:] for layer in layers]),
    )


def measured(model: Any, text: Text, name: str, full: Coder, windows: Coder) -> Quality:
    """One text, its full layers through one coder and its windows through another; only what is coded counts."""
    cache, coded, original = copy.deepcopy(text.cache), [], 0
    n_cached = len(text.ids)
    last = text.windows.tokens(torch.arange(max(0, n_cached - kept_tokens(model)), n_cached))
    started = time.perf_counter()
    for part, coder in ((text.full, full), (last, windows)):
        found = coder(part)
        for row, layer in enumerate(part.layers):
            cache.layers[layer].keys, cache.layers[layer].values = found.keys[row][None], found.values[row][None]
        if coder is not exact:
            coded.append(found)
            original += part.original_bytes
    seconds = time.perf_counter() - started
    predicted = predict(model, cache, text.fed)
    body, total = (sum(getattr(one, of) for one in coded) for of in ("body_bytes", "total_bytes"))
    kl = mean_divergence(text.expected, predicted)
    body_tokens = sum(one.body_tokens for one in coded)
    n_tokens = sum(len(part.positions) for part, coder in ((text.full, full), (last, windows)) if coder is not exact)
    return Quality(
        name=name, n_documents=1, n_tokens=n_tokens, body_tokens=body_tokens, original_bytes=original, body_bytes=body,
        total_bytes=total, body_ratio=sum(one.body_original_bytes for one in coded) / body, total_ratio=original / total,
        n_continuation=len(text.target), kl=kl,
        top1_agreement=float((text.expected.argmax(dim=-1) == predicted.argmax(dim=-1)).float().mean()),
        perplexity_exact=perplexity(text.expected, text.target), perplexity=perplexity(predicted, text.target),
        prefill_seconds=0.0, encode_seconds=seconds, decode_seconds=0.0, kl_by_text=[kl], body_bytes_by_text=[body],
    )  # fmt: skip


def as_it_is(model: Any, text: Text, codec: kvtc.Codec) -> dict[str, Any]:
    """What the product makes of the whole cache: bytes by group, KL, and whether its windows came back bit for bit."""
    stream = codec.encode(text.cache, text.ids)
    restored = codec.decode(stream, text.ids)
    info = kvtc.inspect(stream)
    are_equal = all(
        torch.equal(getattr(restored.layers[layer], side), getattr(text.cache.layers[layer], side))
        for layer in text.windows.layers
        for side in ("keys", "values")
    )
    return {
        "bytes": {group.kind: group.stored_bytes for group in info.groups},
        "original": {group.kind: group.original_bytes for group in info.groups},
        "total_bytes": info.total_bytes,
        "kl": mean_divergence(text.expected, predict(model, restored, text.fed)),
        "windows_are_equal": are_equal,
    }


def window_bytes(text: Text, codec: kvtc.Codec, n_points: int, n_kept: int) -> int:
    """Bytes of the windows before so many evenly spaced resume points, each chunk once."""
    n_tokens = len(text.ids)
    kept = torch.zeros(n_tokens, dtype=torch.bool)
    for point in range(1, n_points + 1):
        stop = n_tokens * point // n_points
        kept[max(0, stop - n_kept) : stop] = True
    return len(codec.encode(text.windows.tokens(kept.nonzero()[:, 0]).neutral()))


def of_full_layers(model: Any, tokenizer: Any, options: argparse.Namespace) -> kvtc.Calibration:
    """The calibration that the product uses; made and saved if it is not there."""
    if not options.calibration.exists():
        texts = token_sequences(documents(options.calibration_text), tokenizer, 1024)
        made = kvtc.calibrate(
            model, texts, max_tokens=options.calibration_tokens, profiles=("paper", "joint")
        )  # fmt: skip
        made.save(options.calibration)
    return kvtc.load_calibration(options.calibration)


def of_sliding_layers(model: Any, tokenizer: Any, options: argparse.Namespace) -> kvtc.Calibration | None:
    """The prototype's, if one is asked for; made and saved if it is not there."""
    if options.window_calibration is None:
        return None
    if not options.window_calibration.exists():
        # Texts that fit into a window: then a sliding layer's cache is that of a full one.
        texts = token_sequences(documents(options.calibration_text), tokenizer, kept_tokens(model))
        layers = tuple(index for index, its in enumerate(model.config.layer_types) if its == "sliding_attention")
        of_full, rope = geometry_of(model), rope_from_model(model)
        geometry = CacheGeometry(layers, 0, of_full.n_kv_heads, *of_full.dims, rope.of_layers(layers))
        rows = CalibrationRows(geometry, max_tokens=options.calibration_tokens, rank=options.window_rank)
        sensitivity = Sensitivity(model, geometry, rows.sink_tokens)
        with reporting():
            accumulate(model, texts, rows, sensitivity)
            made = fit(rows, FitOptions(options.window_rank, options.window_rank), sample=sensitivity.sample())
        made.save(options.window_calibration)
    return kvtc.load_calibration(options.window_calibration)


def cases_of(of_full: kvtc.Calibration, of_windows: kvtc.Calibration | None) -> Cases:
    """What codes the full layers, and what the windows, by study and name."""

    def codec(calibration: kvtc.Calibration, profile: str, ratio: float) -> Coder:
        return with_codec(kvtc.Codec(calibration, profile, ratio=ratio, window_tokens=0))

    fp8, int4 = with_baseline(Fp8()), with_baseline(Int4())
    full: dict[str, tuple[Coder, Coder]] = {"FP8": (fp8, exact), "INT4": (int4, exact)}
    full |= {f"paper {ratio}x": (codec(of_full, "paper", ratio), exact) for ratio in (4, 8, 16, 32)}
    full |= {f"joint {ratio}x": (codec(of_full, "joint", ratio), exact) for ratio in (4, 8, 16, 32, 64)}
    windows: dict[str, tuple[Coder, Coder]] = {"FP8": (exact, fp8), "INT4": (exact, int4)}
    both: dict[str, tuple[Coder, Coder]] = {"FP8": (fp8, fp8), "INT4": (int4, int4)}
    if of_windows is not None:
        for profile in ("paper", "joint"):
            for ratio in (4, 8, 16, 32):
                coder = codec(of_windows, profile, ratio)
                windows[f"{profile} {ratio}x"] = exact, coder
                both[f"{profile} {ratio}x"] = codec(of_full, profile, ratio), coder
    return {"Full layers; windows exact": full, "Windows; full layers exact": windows, "Both": both}


def show(
    studies: dict[str, list[Quality]],
    compared: dict[str, list[FewerBytes]],
    groups: dict[str, list[dict[str, Any]]],
    points: dict[str, dict[int, int]],
) -> None:
    """All of it as tables."""
    for title, qualities in studies.items():
        print(f"\n{title}")
        print_qualities(qualities)
    for title, figures in compared.items():
        print(f"\n{title}: times fewer body bytes of joint at the KL of")
        print(format_table(["", "KL", "times"], [[one.at, f"{one.kl:.4f}", _times(one)] for one in figures]))
    lines = []
    for name, found in groups.items():
        sums = {
            kind: [sum(one[what][kind] for one in found) for what in ("original", "bytes")]
            for kind in found[0]["bytes"]
        }
        kl = sum(one["kl"] for one in found) / len(found)
        lines.append(
            [
                name,
                *(f"{a / b:.2f}x" for a, b in sums.values()),
                *(f"{b / len(found):,.0f}" for _, b in sums.values()),
                f"{kl:.5f}",
            ]
        )
    print(format_table(["product", "full", "windows", "bytes", "bytes", "KL"], lines))
    n = len(groups["lossless"])
    shown = [[name, *(f"{size / n:,.0f}" for size in of_points.values())] for name, of_points in points.items()]
    print(format_table(["bytes of windows at resume points", *map(str, RESUME_POINTS)], shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.set_defaults(tokens=4096 + 129, continuation=128, texts_per_file=1)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--window-calibration", type=Path)
    parser.add_argument("--calibration-text", type=Path, nargs="+", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=40_000)
    parser.add_argument("--window-rank", type=int, default=2048)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    place = installed_model(GEMMA3).directory
    model = AutoModelForCausalLM.from_pretrained(place, dtype="bfloat16").eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    of_full = of_full_layers(model, tokenizer, options)
    of_windows = of_sliding_layers(model, tokenizer, options)
    cases = cases_of(of_full, of_windows)
    product = {f"joint {ratio}x": kvtc.Codec(of_full, ratio=ratio, window_tokens=0) for ratio in (8, 16, 32)}
    product["lossless"] = kvtc.Codec(lossless=True)
    of_window = {"kept exactly": kvtc.Codec(lossless=True)}
    if of_windows is not None:
        of_window["joint 16x"] = kvtc.Codec(of_windows, ratio=16, window_tokens=0)
    per_case: dict[tuple[str, str], list[Quality]] = {}
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in product}
    points: dict[str, dict[int, int]] = {name: dict.fromkeys(RESUME_POINTS, 0) for name in of_window}
    for ids in stretches(tokenizer, options):
        text = read(model, ids, options.continuation)
        for name, whole in product.items():
            groups[name].append(as_it_is(model, text, whole))
        for name, one in of_window.items():
            for n_points in RESUME_POINTS:
                points[name][n_points] += window_bytes(text, one, n_points, kept_tokens(model))
        for title, of_title in cases.items():
            for name, (full, windows) in of_title.items():
                per_case.setdefault((title, name), []).append(measured(model, text, name, full, windows))
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    studies = {title: [summarize(per_case[title, name]) for name in of_title] for title, of_title in cases.items()}
    compared = {title: fewer_bytes({0: qualities}, ["joint"]) for title, qualities in studies.items()}
    show(studies, compared, groups, points)
    save_result(
        "gemma3",
        {
            "kind": ABLATIONS,
            "seconds": round(time.perf_counter() - started, 1),
            "studies": [
                {"title": title, "note": "Gemma 3 270M, base. Sinks of the full layers are exact; no token of a window is.",
                 "qualities": [asdict(quality) for quality in qualities]}
                for title, qualities in studies.items()
            ],
            "fewer_bytes": {title: [asdict(one) for one in figures] for title, figures in compared.items()},
            "product": groups,
            "window_bytes_of_all_texts": {name: {str(k): v for k, v in p.items()} for name, p in points.items()},
        },
    )  # fmt: skip


def _times(figure: FewerBytes) -> str:
    if figure.body_factor is None:
        return "not reached"
    interval = "" if figure.body_low is None else f" ({figure.body_low:.1f} to {figure.body_high:.1f})"
    return f"{'>= ' * figure.is_bound}{figure.body_factor:.1f}x{interval}"


if __name__ == "__main__":
    main()
