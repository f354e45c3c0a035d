"""Clocks that wait for the device, stages timed by wrapping their methods, and what the device can do at best, for `gpu.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

import kvtc
import kvtc.codec
from kvtc.backends import Bytes, CodedIntegers

Stages = dict[str, tuple[Any, str]]
"""Owner and name of the method that does a stage."""
TILE_TOKENS = 8192


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, between two moments at which the device has nothing to do."""
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    elapsed = time.perf_counter() - started
    # What it made is freed only now: freeing is not part of the run.
    del result
    return elapsed


def median(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `repeats` runs after one that does not count."""
    return statistics.median([seconds(run, device) for _ in range(repeats + 1)][1:])


def milliseconds(value: float) -> float:
    return round(1e3 * value, 3)


def timed_stages(stages: Stages, run: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each stage, of the rest and of all; each stage waits for the device, so all is more than it takes
    without clocks."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        spent = dict.fromkeys(stages, 0.0)
        with ExitStack() as stack:
            for name, (owner, attribute) in stages.items():
                stack.enter_context(patch.object(owner, attribute, _timer(owner, attribute, name, spent, device)))
            spent["all"] = seconds(run, device)
        spent["rest"] = spent["all"] - sum(spent[name] for name in stages)
        runs.append(spent)
    return {n: milliseconds(statistics.median(spent[n] for spent in runs[1:])) for n in [*stages, "rest", "all"]}


def _timer(owner: Any, attribute: str, name: str, spent: dict[str, float], device: torch.device) -> Callable:
    function = getattr(owner, attribute)

    @wraps(function)
    def timed(*args, **kwargs):
        synchronize(device)
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            synchronize(device)
            spent[name] += time.perf_counter() - started

    return timed


def encode_stages(codec: kvtc.Codec) -> Stages:
    from kvtc.profiles import paper
    from kvtc.sealed_stream import StreamDraft

    stages: Stages = {
        "validate": (kvtc.KVCache, "validate"),
        "un-rotate, gather": (codec.backend, "gather"),
        "exact tokens": (kvtc.codec, "draft_stream"),
        "container": (StreamDraft, "seal"),
    }
    if codec.settings.profile == "paper":
        return stages | {"transform": (paper, "project_from"), "quantize and pack": (codec.backend, "pack_groups")}
    return stages | {
        "transform and prediction": (codec._coder._transform(), "choices"),
        "round by cost": (codec.backend, "round"),
        "entropy-code": (codec.backend, "write_integers"),
    }


def decode_stages(codec: kvtc.Codec) -> Stages:
    stages: Stages = {"host: open streams": (kvtc.codec, "open_stream")}
    if codec.settings.profile == "paper":
        stages["unpack and dequantize"] = (codec.backend, "unpack_groups")
    else:
        stages["entropy decoding and dequantizing"] = (codec.backend, "read_integers")
        stages["prediction, completion"] = (codec._coder._transform(), "completed")
    return stages | {"inverse product": (codec._coder, "restore"), "rotate and scatter": (codec.backend, "place")}


def product_seconds(
    device: torch.device, n_tokens: int, widths: list[int], features: int, n_layers: int, repeats: int
) -> float:
    """Seconds of the inverse products of all layers alone, in bfloat16: [T, n] x [n, q] for keys and values of each layer.

    widths: n of keys and of values; the same twice where they are joint. features: q, of one side of a layer.
    """
    operands = []
    for width in widths:
        coefficients = torch.randn(n_tokens, width, dtype=torch.bfloat16, device=device)
        operands.append((coefficients, torch.randn(n_layers, features, width, dtype=torch.bfloat16, device=device)))
    out = torch.empty(n_tokens, features, dtype=torch.bfloat16, device=device)

    def run() -> None:
        for layer in range(n_layers):
            for coefficients, synthesis in operands:
                torch.mm(coefficients, synthesis[layer].T, out=out)

    return median(run, device, repeats)


def ceilings(device: torch.device, small: bool, ranks: list[int], repeats: int) -> dict[str, Any]:
    """Copies on the device and to it in GB/s, both ends counted on the device; bfloat16 products in TFLOP/s by their width."""
    n_bytes = 2**22 if small else 2**32
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * n_bytes / median(lambda: target.copy_(source), device, repeats)
    host = torch.ones(n_bytes // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    moved = len(host) / median(lambda: target[: len(host)].copy_(host, non_blocking=True), device, repeats)
    tokens, features, layers = (256, 32, 3) if small else (8 * TILE_TOKENS, 1024, 10)
    rates = {}
    for rank in ranks:
        spent = product_seconds(device, tokens, [rank, rank], features, layers, repeats)
        rates[str(rank)] = round(4e-12 * tokens * features * layers * rank / spent, 2)
    return {
        "copy_gb_per_second": round(copied / 1e9, 2),
        "host_to_device_gb_per_second": round(moved / 1e9, 2),
        "product_tflops": rates,
        "product_shape": [tokens, features],
    }


def on_device(chunk: CodedIntegers, device: torch.device) -> CodedIntegers:
    """The same, its bytes on the device already."""
    from dataclasses import replace

    def moved(data: Bytes) -> Bytes:
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return host.to(device)

    parts = (moved(part) for part in (chunk.activities, chunk.symbols, chunk.escapes))
    return replace(chunk, **dict(zip(("activities", "symbols", "escapes"), parts, strict=True)))
