"""How near the real body_ratio comes to the one asked for, on text of the demo and, if given, on
others.

    python -m benchmarks.quality.reached_ratios [--text FILE...] [--ratios 8 16 32 64 128] [--windows 0 16 128] [--bodies 256]
"""

import argparse
from pathlib import Path

import torch

import kvtc
from kvtc.demo.run import CONVERSATION
from kvtc.evaluate.provenance import save_result
from kvtc.huggingface.models import capture
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_table

SINK_TOKENS = 4


def deviations(codec: kvtc.Codec, caches: list[tuple[kvtc.KVCache, torch.Tensor]]) -> list[float]:
    """Relative deviation of the body_ratio from the ratio asked for, by cache."""
    found = []
    for cache, ids in caches:
        body_ratio = kvtc.inspect(codec.encode(cache, ids)).body_ratio or 0.0
        found.append(body_ratio / codec.rate.ratio - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="beside the conversation of the demo")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 16, 128])
    parser.add_argument("--bodies", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--profiles", nargs="+", default=["joint", "conditional"])
    options = parser.parse_args()
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    calibration = kvtc.reference_calibration()
    longest = SINK_TOKENS + max(options.bodies) + max(options.windows)
    wholes = []
    for path in [CONVERSATION, *options.text]:
        text = path.read_text(encoding="utf-8")[: 12 * longest]
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][:longest])
        wholes.append((capture(model, ids, calibration.geometry), ids))
    rows = []
    for profile in options.profiles:
        for body in options.bodies:
            for window in options.windows:
                n = SINK_TOKENS + body + window
                caches = [
                    (kvtc.KVCache(c.keys[:, :, :n], c.values[:, :, :n]), ids[:n]) for c, ids in wholes if len(ids) >= n
                ]
                for ratio in options.ratios if caches else []:
                    codec = kvtc.Codec(
                        calibration,
                        profile,
                        ratio=ratio,
                        window_tokens=window,
                        sink_tokens=SINK_TOKENS,
                        model=MODEL_DIRECTORY,
                    )
                    off = deviations(codec, caches)
                    rows.append(
                        {"profile": profile, "body_tokens": body, "window_tokens": window, "ratio": ratio,
                         "n_texts": len(off), "lowest": min(off), "highest": max(off)}
                    )  # fmt: skip
    header = ["profile", "body tokens", "window", "ratio", "texts", "lowest", "highest"]
    shown = [[*list(row.values())[:5], f"{row['lowest']:+.2%}", f"{row['highest']:+.2%}"] for row in rows]
    print(format_table(header, shown))
    worst = max(max(abs(row["lowest"]), abs(row["highest"])) for row in rows)
    print(f"\nworst: {worst:.2%}")
    save_result("reached_ratios", {"rows": rows, "worst": worst})


if __name__ == "__main__":
    main()
