"""What `gpu.py` saved, as tables beside its targets, and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvtc.evaluate.plots import INK, SERIES
from kvtc.evaluate.table import format_table
from serving import figure, save_plot

Pieces = dict[str, dict[str, Any]]

# Of 8 x 8192 tokens of Mistral NeMo 12B.
OVER_PRODUCT, ENCODE_MS, TIMES_FASTER, RANS_RATE = 1.4, 200.0, 15.0, 20.0
DECODE_MS = {"nemo-paper-6000": 130.0, "nemo-conditional-3000": 100.0}


def print_report(found: Pieces) -> None:
    cases = list(_cases(found))
    if cases:
        print("\nA batch: milliseconds, bytes and ratios")
        head = ["piece", "batch", "coded", "encode", "decode", "product", "ratio to it", "body", "total", "per GiB"]
        print(format_table(head, [_case_row(name, case) for name, case in cases]))
        print("\nStages of decoding: milliseconds, and the share of what the device can do")
        print(format_table(["piece", "batch", "stage", "ms", "share"], list(_stage_rows(cases, found.get("ceilings")))))
    for name, piece in found.items():
        for row in piece.get("rows", ()):
            if "codecs" in row:
                _print_first_token(name, row)
            else:
                print(f"{name}: {', '.join(f'{key} {value}' for key, value in row.items())}")
    rows = list(_targets(found))
    if rows:
        print("\nTargets")
        print(format_table(["target", "wanted", "found", ""], rows))


def _cases(found: Pieces) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, piece in found.items():
        for case in piece.get("cases", ()):
            yield name, case


def _shape(case: dict[str, Any]) -> str:
    return f"{case['batch']} x {case['tokens']}"


def _case_row(name: str, case: dict[str, Any]) -> list[str]:
    held = case["conversations_per_gib"]
    return [name, _shape(case), "+".join(map(str, case["coded"])), f"{case['encode_ms']:.1f}", f"{case['decode_ms']:.1f}",
            f"{case['product_ms']:.1f}", f"{case['decode_over_product']:.2f}", f"{case['body_ratio']:.1f}",
            f"{case['total_ratio']:.1f}", f"{held['raw']:.2f} -> {held['coded']:.1f}"]  # fmt: skip


def _stage_rows(cases: list[tuple[str, dict[str, Any]]], best: dict[str, Any] | None) -> Iterator[list[str]]:
    for name, case in cases:
        for stage, ms in case["decode_stages_ms"].items():
            yield [name, _shape(case), stage, f"{ms:.2f}", _share(stage, ms, case, best)]


def _share(stage: str, ms: float, case: dict[str, Any], best: dict[str, Any] | None) -> str:
    """Of the ceiling of a stage that it reaches."""
    if best is None or not ms:
        return ""
    if stage == "inverse product":
        rate = case["product_flops"] / ms * 1e-9
        return f"{100 * rate / max(best['product_tflops'].values()):.0f} % of the matrix rate"
    if stage == "rotate and scatter":
        return f"{100 * case['moved_bytes'] / ms * 1e-6 / best['copy_gb_per_second']:.0f} % of the bandwidth"
    if stage.startswith("entropy") and "symbols" in case:
        return f"{case['symbols'] / ms * 1e-6:.2f} G symbols/s"
    return ""


def _print_first_token(name: str, row: dict[str, Any]) -> None:
    print(f"\n{name}, {_shape(row)}: prefill {row['prefill_ms']:.1f} ms")
    for codec in row["codecs"]:
        figures = ", ".join(f"{key} {value}" for key, value in codec.items() if key not in ("profile", "rank"))
        print(f"  {codec['profile']} of rank {codec['rank']}: {figures}")


def _targets(found: Pieces) -> Iterator[list[str]]:
    for name, case in _cases(found):
        if not name.startswith("nemo") or (case["batch"], case["tokens"]) != (8, 8192):
            continue
        yield _target(f"{name}: decode over product", OVER_PRODUCT, case["decode_over_product"])
        yield _target(f"{name}: encode, ms", ENCODE_MS, case["encode_ms"])
        if name in DECODE_MS:
            yield _target(f"{name}: decode, ms", DECODE_MS[name], case["decode_ms"])
    for row in found.get("nemo-first-token", {}).get("rows", ()):
        for codec in row["codecs"]:
            what = f"first token, {codec['profile']} of rank {codec['rank']}, {_shape(row)}: times faster"
            yield _target(what, TIMES_FASTER, codec["times_faster"], at_least=True)
    rates = [row["device_g_symbols_per_second"] for row in found.get("rans", {}).get("rows", ())]
    if rates:
        yield _target("rANS decoding, G symbols/s", RANS_RATE, max(rates), at_least=True)


def _target(what: str, wanted: float, value: float, at_least: bool = False) -> list[str]:
    is_met = value >= wanted if at_least else value <= wanted
    return [what, f"{'>=' if at_least else '<='} {wanted:g}", f"{value:g}", "met" if is_met else "missed"]


def plot(found: Pieces, name: str) -> None:
    """Where the time of decoding goes, by piece, beside the product alone; and rANS by the number of chunks."""
    firsts = [(piece, found[piece]["cases"][0]) for piece in found if found[piece].get("cases")]
    if not firsts:
        raise SystemExit("nothing to draw yet: no codec has been measured")
    with figure(2, (11, 1.6 + 0.4 * len(firsts))) as (drawn, (spent, rans)):
        names = [piece for piece, _ in firsts]
        stages = list(
            dict.fromkeys(stage for _, case in firsts for stage in case["decode_stages_ms"] if stage != "all")
        )
        left = [0.0] * len(firsts)
        for index, stage in enumerate(stages):
            widths = [case["decode_stages_ms"].get(stage, 0.0) for _, case in firsts]
            spent.barh(names, widths, left=left, height=0.6, color=(*SERIES, INK)[index % 6], label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        spent.plot(
            [case["product_ms"] for _, case in firsts], names, "|", color=INK, markersize=16, label="product alone"
        )
        spent.invert_yaxis()
        spent.set_xlabel(f"Milliseconds to decode {_shape(firsts[0][1])} tokens")
        spent.legend(frameon=False, fontsize=7)
        rows = found.get("rans", {}).get("rows", [])
        for where in ("host", "device"):
            rates = [row[f"{where}_g_symbols_per_second"] for row in rows]
            rans.plot([row["chunks"] for row in rows], rates, "o-", markersize=4, label=f"bytes on the {where}")
        rans.set(xlabel="Chunks decoded at once", ylabel="G symbols a second", xscale="log", ylim=(0, None))
        rans.legend(frameon=False)
        save_plot(drawn, name)
