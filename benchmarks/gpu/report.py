"""What `benchmarks.gpu` saved, beside its targets and the ceilings of the device, as text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvtc.report.table import format_table

Pieces = dict[str, Any]
"""By name, as they are saved."""


@dataclass(frozen=True)
class Target:
    """What a figure ought to be; met: whether one does."""

    wanted: str
    met: Callable[[float], bool]


PRODUCT = Target("<= 1.4", lambda ratio: ratio <= 1.4)
DECODE = {
    "nemo-paper-6000": Target("<= 130 ms", lambda seconds: seconds <= 0.130),
    "nemo-joint-3000": Target("<= 100 ms", lambda seconds: seconds <= 0.100),
}
ENCODE = Target("<= 200 ms", lambda seconds: seconds <= 0.200)
FIRST_TOKEN = Target(">= 15x", lambda ratio: ratio >= 15)
RANS = Target(">= 20 G/s", lambda symbols: symbols >= 20e9)


def print_report(pieces: Pieces) -> None:
    """Every saved piece; targets are those of 8 x 8192 tokens on a GPU of data centres."""
    machines = sorted({f"{piece['provenance']['machine']}, device {piece['device']}" for piece in pieces.values()})
    print("\n".join(machines))
    blocks = [
        _coding(pieces),
        _stages(pieces),
        _first_token(pieces),
        _rans(pieces),
        _ceilings(pieces),
        _lossless(pieces),
    ]
    print("\n\n".join(block for block in blocks if block))


def _of_cases(pieces: Pieces) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, result and batch of every measured case."""
    for name, piece in pieces.items():
        if "case" in piece["result"] and not name.startswith("first-token"):
            for batch in piece["result"]["batches"]:
                yield name, piece["result"], batch


def _judged(value: float, shown: str, target: Target | None, batch: dict[str, Any]) -> str:
    """A figure, and its target where it has one and the batch is the one it is for."""
    if target is None or (batch["sequences"], batch["tokens"]) != (8, 8192):
        return shown
    return f"{shown} ({target.wanted}: {'met' if target.met(value) else 'missed'})"


def _coding(pieces: Pieces) -> str:
    rows = []
    for name, _, batch in _of_cases(pieces):
        is_nemo = name.startswith("nemo")
        encode, decode, over = batch["encode_seconds"], batch["decode_seconds"], batch["decode_over_product"]
        per_gib, searching, coded = batch["conversations_per_gib"], batch["encode_to_ratio_seconds"], batch["coded"]
        rows.append(
            [
                name,
                f"{batch['sequences']} x {batch['tokens']}",
                " + ".join(map(str, coded)) if isinstance(coded, list) else str(coded),
                f"{batch['body_ratio']:.1f}x",
                _judged(encode, _ms(encode), ENCODE if is_nemo else None, batch),
                "-" if searching is None else _ms(searching),
                _judged(decode, _ms(decode), DECODE.get(name), batch),
                _ms(batch["product_alone_seconds"]),
                _judged(over, f"{over:.2f}", PRODUCT if is_nemo else None, batch),
                f"{per_gib['raw']:.1f} -> {per_gib['coded']:.0f}",
            ]
        )
    heads = ["case", "tokens", "coded", "body_ratio", "encode", "to a ratio", "decode"]
    heads += ["product alone", "decode / product", "per GiB"]
    return format_table(heads, rows) if rows else ""


def _stages(pieces: Pieces) -> str:
    rows = []
    bounds = pieces["ceilings"]["result"] if "ceilings" in pieces else None
    for name, result, batch in _of_cases(pieces):
        for direction, stages in batch["stages"].items():
            for stage, seconds in stages.items():
                ideal = ideal_seconds(stage, result, batch, bounds)
                share = "-" if ideal is None or not seconds else f"{ideal / seconds:.0%}"
                rows.append([name, f"{batch['sequences']} x {batch['tokens']}", direction, stage, _ms(seconds), share])
    return format_table(["case", "tokens", "", "stage", "time", "of its ceiling"], rows) if rows else ""


def ideal_seconds(
    stage: str, result: dict[str, Any], batch: dict[str, Any], bounds: dict[str, Any] | None
) -> float | None:
    """What a stage takes at the ceiling that bounds it: the product alone, or the bytes it must
    read and write at copy speed.
    """
    if stage == "inverse product":
        return float(batch["product_alone_seconds"])
    n_tokens = batch["sequences"] * batch["tokens"]
    values = 2 * n_tokens * result["n_layers"] * result["n_kv_heads"] * result["head_dim"]
    coefficients = n_tokens * sum(batch["coefficients"]) / (1 if result["case"]["profile"] == "paper" else 2)
    moved = {
        "rotate, scatter": 4 * values,  # bfloat16 in, bfloat16 out
        "un-rotate": 6 * values,  # bfloat16 in, float32 out
        "entropy-decode, dequantize": batch["coded_bytes"] + 4 * coefficients,
        "quantize": 4 * coefficients,
    }
    if bounds is None or stage not in moved:
        return None
    return float(moved[stage] / bounds["device_copy_bytes_a_second"])


def _first_token(pieces: Pieces) -> str:
    rows = []
    for name, piece in pieces.items():
        for batch in piece["result"]["batches"] if name.startswith("first-token") else ():
            whole, streamed = batch["prefill_over_decode"], batch["prefill_over_streamed"]
            rows.append(
                [
                    name,
                    f"{batch['sequences']} x {batch['tokens']}",
                    _ms(batch["prefill_seconds"]),
                    _ms(batch["decode_and_step_seconds"]),
                    _judged(whole, f"{whole:.1f}x", FIRST_TOKEN, batch),
                    _ms(batch["streamed_by_layer_seconds"]),
                    _judged(streamed, f"{streamed:.1f}x", FIRST_TOKEN, batch),
                ]
            )
    heads = ["first token", "tokens", "prefill", "decode + step", "faster", "by layer", "faster"]
    return format_table(heads, rows) if rows else ""


def _rans(pieces: Pieces) -> str:
    if "rans" not in pieces:
        return ""
    found = pieces["rans"]["result"]
    rows = [
        [row["chunks"]]
        + [f"{_ms(row[f'{of}seconds'])}, {row[f'{of}symbols_a_second'] / 1e9:.2f} G/s" for of in ("", "device_")]
        for row in found["rows"]
    ]
    title = f"rANS of {found['coded']} coefficients, {found['bits_a_symbol']:.2f} bits each; wanted {RANS.wanted}"
    return f"{title}\n" + format_table(["chunks of 256 tokens", "bytes on the host", "on the device"], rows)


def _ceilings(pieces: Pieces) -> str:
    if "ceilings" not in pieces:
        return ""
    found = pieces["ceilings"]["result"]
    rows = [
        [name.removesuffix("_bytes_a_second"), f"{value / 1e9:,.0f} GB/s"]
        for name, value in found.items()
        if name.endswith("second")
    ]
    rows += [
        [f"product {p['tokens']} x {p['rank']} x {p['features']}", f"{p['operations_a_second'] / 1e12:,.1f} T/s"]
        for p in found["bfloat16_products"]
    ]
    return format_table(["ceiling", "measured"], rows)


def _lossless(pieces: Pieces) -> str:
    if "lossless" not in pieces:
        return ""
    found = pieces["lossless"]["result"]
    coders = {"zlib, one core": found["zlib"]} | {f"nvCOMP {name}": one for name, one in found["nvcomp"].items()}
    rows = [
        [
            name,
            f"{one['ratio']:.3f}",
            *(f"{one[f'{way}_bytes_a_second'] / 1e9:.2f} GB/s" for way in ("encode", "decode")),
        ]
        for name, one in coders.items()
    ]
    skipped = "".join(f"\nskipped: {name}: {reason}" for name, reason in found["skipped"].items())
    return format_table(["lossless coder", "ratio", "encode", "decode"], rows) + skipped


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e3 * seconds:.3f} ms"
