"""Throughput of the codec by stage, in MB of 16-bit cache a second, and encode + decode against the
model's own prefill.

    python -m benchmarks.speed.codec --text FILE [--tokens 2048] [--ratio 16] [--repeats 7]

Two caches are timed: the reference model's on real text, and a random one with 8192 features a side
(16 layers of 8 heads of 64) and 2048 components, where the transform weighs as it does in large
models. Every stage is timed inside a whole encode or decode.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch

import kvtc
import kvtc.codec.codec
from kvtc.calibration import SideCalibration
from kvtc.codec.pipeline import Decoding
from kvtc.codec.sealed_stream import StreamDraft
from kvtc.coding.paper.distortion import measure_distortion
from kvtc.coding.rope import Rope, RopeTable
from kvtc.coding.transform import Basis
from kvtc.evaluate.provenance import save_result
from kvtc.huggingface.models import capture
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_table


def encode_stages(codec: kvtc.Codec) -> dict[str, tuple[object, str]]:
    """Stages by the methods that do them; what is in none of them stands under `rest`."""
    return {
        "validate": (kvtc.KVCache, "validate"), "exact tokens": (kvtc.codec.codec, "draft_stream"),
        "un-rotate": (codec.backend, "gather"), "predict": (codec._encoder, "predict"), "project": (codec._encoder, "project"),
        "search": (codec._encoder, "search"), "quantize": (codec._encoder, "quantize"),
        "entropy-code": (codec._encoder, "entropy_code"), "seal": (StreamDraft, "seal"),
    }  # fmt: skip


def decode_stages(decoder: object) -> dict[str, tuple[object, str]]:
    """Those of decoding; decoder: that of the codec's profile."""
    return {
        "open": (kvtc.codec.codec, "open_stream"), "entropy-decode": (type(decoder), "entropy_decode"),
        "add prediction": (type(decoder), "add_prediction"), "reconstruct, rotate": (Decoding, "write_layers"),
    }  # fmt: skip


def timed_stages(stages: dict, run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of each stage, of the rest, and of all, over `repeats` runs after one warm-up."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        spent = dict.fromkeys(stages, 0.0)
        with ExitStack() as stack:
            for name, (owner, attribute) in stages.items():
                stack.enter_context(patch.object(owner, attribute, _timer(getattr(owner, attribute), name, spent)))
            started = time.perf_counter()
            run()
            spent["all"] = time.perf_counter() - started
        spent["rest"] = spent["all"] - sum(spent[name] for name in stages)
        runs.append(spent)
    return {name: statistics.median(spent[name] for spent in runs[1:]) for name in [*stages, "rest", "all"]}


def _timer(function: Callable, name: str, spent: dict[str, float]) -> Callable:
    @wraps(function)
    def timed(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    return timed


def large_case(tokens: int) -> tuple[kvtc.Calibration, kvtc.KVCache]:
    """A random calibration of 8192 features and 2048 components a side, and a cache drawn from it."""
    layers, heads, dim, rank = 16, 8, 64, 2048
    features = layers * heads * dim
    generator = torch.Generator().manual_seed(0)
    rope = Rope((RopeTable(tuple(10_000.0 ** (-i / 32) for i in range(32))),), (0,) * layers)
    deviations = 8 * (1 + torch.arange(rank)) ** -0.75
    kinds, sides = [], []
    for _ in range(2):
        vectors = torch.linalg.qr(torch.randn(features, rank, generator=generator)).Q.to(torch.float16)
        basis = Basis(torch.zeros(features), vectors, deviations.square())
        sample = torch.randn(256, rank, generator=generator) * deviations
        kinds.append(SideCalibration(basis, measure_distortion(sample.numpy()), float(deviations.square().sum())))
        rows = (torch.randn(tokens, rank, generator=generator) * deviations) @ vectors.float().T
        sides.append(rows.reshape(tokens, layers, heads, dim).permute(1, 2, 0, 3).to(torch.bfloat16))
    geometry = kvtc.CacheGeometry(tuple(range(layers)), 0, heads, dim, dim, rope)
    keys = rope.rotate(sides[0], torch.arange(tokens), tokens).to(torch.bfloat16)
    return kvtc.Calibration(geometry, *kinds), kvtc.KVCache(keys, sides[1].contiguous())


def measure(
    name: str, calibration: kvtc.Calibration, cache: kvtc.KVCache, profile: str, ratio: float, repeats: int, ids=None
) -> dict:
    codec = kvtc.Codec(calibration, profile, ratio=ratio, model=MODEL_DIRECTORY)
    stream = codec.encode(cache, ids)
    info = kvtc.inspect(stream)
    megabytes = info.original_bytes / 1e6
    decoder = codec._profiles[profile].decoder()
    result = {"case": name, "profile": profile, "tokens": info.n_tokens, "cache_mb": round(megabytes, 2), "ratio": ratio,
              "body_ratio": round(info.body_ratio or 0, 2), "total_ratio": round(info.total_ratio or 0, 2)}  # fmt: skip
    table = []
    for direction, stages, run in (
        ("encode", encode_stages(codec), lambda: codec.encode(cache, ids)),
        ("decode", decode_stages(decoder), lambda: codec.decode(stream, ids)),
    ):
        spent = timed_stages(stages, run, repeats)
        result[direction] = {stage: round(1e3 * seconds, 3) for stage, seconds in spent.items()}
        result[f"{direction}_mb_per_second"] = round(megabytes / spent["all"], 1)
        table += [
            [
                direction,
                stage,
                f"{1e3 * seconds:.2f}",
                f"{100 * seconds / spent['all']:.1f}",
                f"{megabytes / seconds:.0f}",
            ]
            for stage, seconds in spent.items()
        ]
    print(f"\n{name}, {profile}: {info.n_tokens} tokens, {megabytes:.1f} MB of 16-bit cache, ratio {ratio}")
    print(format_table(["", "stage", "ms", "%", "MB/s"], table))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text of at least --tokens tokens")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    model, tokenizer = kvtc.reference_model()
    text = options.text.read_text(encoding="utf-8")[: 12 * options.tokens]
    ids = torch.tensor(tokenizer(text).input_ids[: options.tokens])
    prefills = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        cache = capture(model, ids)
        prefills.append(time.perf_counter() - started)
    prefill = statistics.median(prefills[1:])
    calibration = kvtc.reference_calibration()
    cache = kvtc.KVCache(cache.keys.to(torch.bfloat16), cache.values.to(torch.bfloat16))
    references = []
    for profile in ("paper", "joint", "conditional"):
        reference = measure("reference model", calibration, cache, profile, options.ratio, options.repeats, ids)
        both = (reference["encode"]["all"] + reference["decode"]["all"]) / 1e3
        reference["prefill_ms"] = round(1e3 * prefill, 1)
        reference["encode_and_decode_over_prefill"] = round(both / prefill, 3)
        print(f"\nprefill {1e3 * prefill:.0f} ms; encode + decode take {both / prefill:.2f} of it")
        references.append(reference)
    large = measure("8192 features", *large_case(options.tokens), "paper", options.ratio, options.repeats)
    save_result("codec", {"cases": [*references, large]})


if __name__ == "__main__":
    main()
