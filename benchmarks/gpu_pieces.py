"""What `gpu.py` measures, piece by piece; each takes `Options` and gives a JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import gpu_clock as clock
import kvtc
import kvtc.codec
from gpu_cases import LLAMA_8B, LLAMA_70B_RANK, NEMO, TINY, Geometry, MadeUp, coded_widths, stretched_model
from gpu_model import Decoder
from kvtc.backends import CodedIntegers, make_backend
from kvtc.coding.uniform import column_classes
from kvtc.profiles.coefficients import Coefficients

PAPER_RATIO = 16.0
BITS = 3.5
"""That a coefficient of `joint` and `conditional` may take on average; the ratio follows from it and the rank."""
SHAPES = ((8, 8192), (2, 16384))
GIB = 2**30
RANS_RANK = 3000
"""Coefficients, where rANS is measured alone."""
RANS_CHUNK = 256


@dataclass(frozen=True)
class Options:
    device: torch.device
    small: bool
    backend: str
    repeats: int

    @property
    def of_codec(self) -> dict[str, Any]:
        return {"device": self.device, "backend": self.backend}


Piece = Callable[[Options], dict[str, Any]]


def pieces(small: bool) -> dict[str, Piece]:
    """By name, in the order in which they are measured."""
    ranks = [32] if small else [3000, 6000, 10000]
    found: dict[str, Piece] = {"ceilings": partial(_ceilings, ranks), "rans": _rans}
    geometries = {"tiny": TINY} if small else {"nemo": NEMO, "llama-8b": LLAMA_8B, "llama-70b-rank": LLAMA_70B_RANK}
    for short, geometry in geometries.items():
        some = [3000] if geometry is LLAMA_70B_RANK else [3000, 6000]
        wanted = {"paper": ranks[-2:], "conditional": ranks, "joint": ranks} if short in ("tiny", "nemo") else {
            "paper": some[-1:], "conditional": some}  # fmt: skip
        for profile, its in wanted.items():
            found |= {f"{short}-{profile}-{rank}": partial(_codec, geometry, profile, rank) for rank in its}
        chosen = [("paper", ranks[-2] if len(ranks) > 1 else ranks[0]), ("conditional", ranks[0])]
        if geometry is not LLAMA_70B_RANK:
            found[f"{short}-first-token"] = partial(_first_token, geometry, chosen)
    found["rivals"] = _rivals
    return found


def ratio_of(made: MadeUp) -> float:
    if made.profile == "paper":
        return PAPER_RATIO
    return round(16 * 2 * made.geometry.features / (BITS * made.rank), 2)


def made_codec(made: MadeUp, options: Options) -> kvtc.Codec:
    """No window, and no lossless coder on the host: all tokens past the sinks are coded, on the device."""
    kept = {"window_tokens": 0, "lossless": "none"}
    return kvtc.Codec(made.calibration, made.profile, ratio=ratio_of(made), **kept, **options.of_codec)


def _shapes(options: Options) -> tuple[tuple[int, int], ...]:
    return ((2, 300),) if options.small else SHAPES


def _ceilings(ranks: list[int], options: Options) -> dict[str, Any]:
    return clock.ceilings(options.device, options.small, ranks, options.repeats)


def _rans(options: Options) -> dict[str, Any]:
    """Entropy decoding alone, over the number of chunks that are decoded at once: bytes on the host, and on the device."""
    joint = kvtc.reference_calibration().joint
    if joint is None:
        raise RuntimeError("the reference calibration has no part for joint")
    backend = make_backend(options.device, options.backend)
    model = stretched_model(joint.coefficients, 32 if options.small else RANS_RANK)
    step = model.step_for(BITS * len(model.deviations))
    classes = column_classes(model.deviations, step)
    drawn = torch.randn(RANS_CHUNK, len(model.deviations), generator=torch.Generator().manual_seed(0))
    values = (drawn * torch.from_numpy(model.deviations)).to(options.device)
    rounded = Coefficients(values, model, is_predicted=False).rounded(step, backend)
    (parts,) = rounded.write([slice(0, RANS_CHUNK)], backend)
    host = CodedIntegers(RANS_CHUNK, parts.activities, parts.symbols, parts.escapes, classes, model.tables, step)
    there = clock.on_device(host, options.device)
    rows = []
    for n_chunks in (1, 4) if options.small else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        n_symbols = n_chunks * RANS_CHUNK * len(classes)
        row = {"chunks": n_chunks, "symbols": n_symbols}
        for name, chunk in (("host", host), ("device", there)):
            run = partial(backend.read_integers, [chunk] * n_chunks, len(classes))
            spent = clock.median(run, options.device, options.repeats)
            row[f"{name}_g_symbols_per_second"] = round(1e-9 * n_symbols / spent, 4)
        rows.append(row)
    n_bytes = {"symbol_bytes": len(parts.symbols), "escape_bytes": len(parts.escapes)}
    return {"coded": len(classes), "chunk_tokens": RANS_CHUNK, **n_bytes, "rows": rows}


def _codec(geometry: Geometry, profile: str, rank: int, options: Options) -> dict[str, Any]:
    made = MadeUp(geometry, profile, rank, options.device)
    codec = made_codec(made, options)
    cases = [_case(made, codec, batch, tokens, options) for batch, tokens in _shapes(options)]
    named = {"model": geometry.name, "profile": profile, "rank": rank, "ratio": ratio_of(made)}
    return {**named, "backend": codec.backend.name, "cases": cases}


def _case(made: MadeUp, codec: kvtc.Codec, batch: int, tokens: int, options: Options) -> dict[str, Any]:
    """Encode and decode of a batch."""
    device, profile, geometry = options.device, made.profile, made.geometry
    _reset_peak(device)
    cache, ids = made.draw(tokens, 0)
    codec.encode(cache, ids)
    times, streams, all_ids = [], [], []
    for seed in range(batch):
        cache, ids = made.draw(tokens, seed)
        times.append(clock.seconds(lambda c=cache, i=ids: streams.append(codec.encode(c, i)), device))
        all_ids.append(ids)
    encode_peak = _peak(device)
    encode = clock.timed_stages(clock.encode_stages(codec), partial(codec.encode, cache, ids), device, 1)
    plan = kvtc.codec.open_stream(streams[-1], made.calibration, codec._coder_of, ids, None).plan
    fixed = codec if profile == "paper" else codec.with_step(plan.step)
    at_step = clock.median(partial(fixed.encode, cache, ids), device, options.repeats)
    del cache
    _reset_peak(device)
    decode = partial(codec.decode_batch, streams, all_ids)
    with _recorded(codec.backend, "unpack_groups" if profile == "paper" else "read_integers") as calls:
        whole = clock.median(decode, device, options.repeats)
    stages = clock.timed_stages(clock.decode_stages(codec), decode, device, options.repeats)
    decode_peak = _peak(device)
    coded = list(coded_widths(plan, made.calibration, profile))
    # With tokens every coefficient has a prediction, so the product is of all.
    widths = [made.rank] * 2 if profile == "conditional" else (coded * 2)[:2]
    infos = [kvtc.inspect(stream) for stream in streams]
    n_body = sum(calls[0][1]) if profile == "paper" else sum(chunk.n_tokens for chunk in calls[0][0])
    size = geometry.n_kv_heads * geometry.head_dim
    product = clock.product_seconds(device, n_body, widths, size, geometry.n_layers, options.repeats)
    raw, stored = (sum(getattr(info, name) for info in infos) / batch for name in ("original_bytes", "total_bytes"))
    result = {
        "batch": batch, "tokens": tokens, "coded": coded, "product_widths": widths,
        "body_ratio": round(statistics.mean(info.body_ratio or 0 for info in infos), 2),
        "total_ratio": round(raw / stored, 2), "raw_bytes": int(raw), "stream_bytes": int(stored),
        "conversations_per_gib": {"raw": round(GIB / raw, 3), "coded": round(GIB / stored, 3)},
        "encode_ms": clock.milliseconds(sum(times)), "encode_at_step_ms": clock.milliseconds(batch * at_step),
        "encode_stages_of_one_ms": encode,
        "decode_ms": clock.milliseconds(whole), "decode_stages_ms": stages,
        "product_ms": clock.milliseconds(product), "decode_over_product": round(whole / product, 3),
        "product_flops": 2 * n_body * size * geometry.n_layers * sum(widths),
        "moved_bytes": 2 * batch * int(raw), "peak_bytes": {"encode": encode_peak, "decode": decode_peak},
    }  # fmt: skip
    if profile != "paper":
        chunks = calls[0][0]
        result["symbols"] = sum(chunk.n_tokens * len(chunk.classes) for chunk in chunks)
        result["symbol_bytes"] = sum(len(chunk.symbols) for chunk in chunks)
        result["escape_bytes"] = sum(len(chunk.escapes) for chunk in chunks)
    print(f"  {batch} x {tokens}: encode {result['encode_ms']} ms, decode {result['decode_ms']} ms", flush=True)
    return result


def _first_token(geometry: Geometry, chosen: list[tuple[str, int]], options: Options) -> dict[str, Any]:
    """Prefill against decode and one step, in a batch; and of one conversation, layer after layer beside the model."""
    device = options.device
    model = Decoder(geometry, device)
    rows: list[dict[str, Any]] = []
    for batch, tokens in (*_shapes(options), (1, _shapes(options)[0][1])):
        ids = torch.from_numpy(np.random.default_rng(0).integers(geometry.vocabulary, size=(batch, tokens))).to(device)
        prefill = clock.median(partial(model.prefill, ids), device, options.repeats)
        rows.append({"batch": batch, "tokens": tokens, "prefill_ms": clock.milliseconds(prefill), "codecs": []})
    for profile, rank in chosen:
        made = MadeUp(geometry, profile, rank, device)
        codec = made_codec(made, options)
        for row in rows:
            row["codecs"].append({"profile": profile, "rank": rank, **_loaded(model, made, codec, row, options)})
    return {"model": geometry.name, "rows": rows}


def _loaded(model: Decoder, made: MadeUp, codec: kvtc.Codec, row: dict[str, Any], options: Options) -> dict[str, float]:
    """Milliseconds until the first token where a cache is decoded, and how many times as long prefill takes."""
    streams, all_ids = [], []
    for seed in range(row["batch"]):
        cache, ids = made.draw(row["tokens"], seed)
        streams.append(codec.encode(cache, ids))
        all_ids.append(ids)
        del cache
    last = torch.tensor([int(ids[-1]) for ids in all_ids], device=options.device)

    def whole() -> object:
        cache, _ = codec.decode_batch(streams, all_ids)
        return model.step(last, [(layer.keys, layer.values) for layer in cache.layers])

    spent = {"decode_and_step": clock.median(whole, options.device, options.repeats)}
    if row["batch"] == 1:
        for name, beside in (("layers_in_turn", False), ("layers_beside_the_model", True)):
            run = partial(_streamed, model, codec, streams[0], all_ids[0], last, beside)
            spent[name] = clock.median(run, options.device, options.repeats)
    found = {f"{name}_ms": clock.milliseconds(value) for name, value in spent.items()}
    return found | {"times_faster": round(row["prefill_ms"] / (1e3 * min(spent.values())), 2)}


def _streamed(
    model: Decoder, codec: kvtc.Codec, stream: bytes, ids: np.ndarray, last: torch.Tensor, is_beside: bool
) -> object:
    """One step, each layer run when it is restored. is_beside: layers are restored on a stream of their own."""
    hidden = model.embed(last)
    if not (is_beside and codec.device.type == "cuda"):
        for _, keys, values in codec.decode_layers(stream, ids):
            hidden = model.layer_step(hidden, keys[None], values[None])
        return hidden
    ours, theirs = torch.cuda.current_stream(), torch.cuda.Stream()
    theirs.wait_stream(ours)
    with torch.cuda.stream(theirs):
        layers = codec.decode_layers(stream, ids)
    while True:
        with torch.cuda.stream(theirs):
            restored = next(layers, None)
            ready = theirs.record_event()
        if restored is None:
            return hidden
        ours.wait_event(ready)
        for side in restored[1:]:
            side.record_stream(ours)
        hidden = model.layer_step(hidden, restored[1][None], restored[2][None])


def _rivals(options: Options) -> dict[str, Any]:
    from gpu_rivals import measure_rivals

    return measure_rivals(options.device, options.small, options.repeats)


@contextmanager
def _recorded(owner: Any, name: str) -> Iterator[list[tuple]]:
    """The arguments of calls of a method, the first call alone."""
    calls: list[tuple] = []
    function = getattr(owner, name)

    def recording(*args: Any) -> Any:
        if not calls:
            calls.append(args)
        return function(*args)

    with patch.object(owner, name, recording):
        yield calls


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
