"""Other coders for GPUs, where they are installed, for `gpu.py`: what they take and how fast they are on what kvtc codes.

nvCOMP's lossless coders compress the symbols that kvtc's own coder would (a byte each, at 4 bits a coefficient on average). What is
not installed is left out by name.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch

import gpu_clock as clock

SYMBOL_BYTES = 2**28
NVCOMP_CODERS = ("ANS", "Deflate", "LZ4", "Zstd")
OTHERS = {
    "lmcache": "CacheGen's kernels in LMCache",
    "kivi_gemv": "KIVI's kernels",
    "flashinfer": "FlashInfer's fp8 caches",
}


def measure_rivals(device: torch.device, small: bool, repeats: int) -> dict[str, Any]:
    """By name: figures, or why there are none."""
    found: dict[str, Any] = {"nvCOMP": _nvcomp(device, small, repeats)}
    for module, name in OTHERS.items():
        is_there = importlib.util.find_spec(module) is not None
        found[name] = {"skipped": "installed, but not driven by this benchmark" if is_there else "not installed"}
    for name, row in found.items():
        print(f"  {name}: {row}", flush=True)
    return found


def _nvcomp(device: torch.device, small: bool, repeats: int) -> dict[str, Any]:
    if device.type != "cuda":
        return {"skipped": "runs on CUDA devices alone"}
    try:
        from nvidia import nvcomp
    except ImportError:
        return {"skipped": "not installed (pip install nvidia-nvcomp-cu12)"}
    n = SYMBOL_BYTES // 1024 if small else SYMBOL_BYTES
    generator = torch.Generator(device).manual_seed(0)
    symbols = torch.randn(n, generator=generator, device=device).mul_(4).round_().add_(31).clamp_(0, 63).to(torch.uint8)
    rows: dict[str, Any] = {}
    for name in NVCOMP_CODERS:
        coder = nvcomp.Codec(algorithm=name)
        array = nvcomp.as_array(symbols)
        coded = coder.encode(array)
        restored = torch.from_dlpack(coder.decode(coded)).view(torch.uint8)
        if not torch.equal(restored, symbols):
            rows[name] = {"skipped": "does not give back what it was given"}
            continue
        rows[name] = {
            "ratio": round(n / coded.buffer_size, 3),
            "encode_gb_per_second": round(1e-9 * n / clock.median(partial(coder.encode, array), device, repeats), 3),
            "decode_gb_per_second": round(1e-9 * n / clock.median(partial(coder.decode, coded), device, repeats), 3),
        }
    return {"version": nvcomp.__version__, "symbol_bytes": n, "coders": rows}
