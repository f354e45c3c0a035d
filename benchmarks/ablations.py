"""The paper's ablations on the reference model: what each part of the codec is worth, on held-out text.

    python benchmarks/ablations.py --calibration-text FILE... --text FILE... [--max-rows 60000]

All calibrations, that of the whole codec too, are made from the same rows of --calibration-text.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import kvtc
from kvtc.evaluate.provenance import save_result
from quality import add_text_arguments, measure, print_qualities

SEQUENCE_TOKENS = 2048


def sequences(files: list[Path], n_tokens: int) -> Iterator[torch.Tensor]:
    """About `n_tokens` tokens of the files' documents, in sequences of at most SEQUENCE_TOKENS."""
    _, tokenizer = kvtc.reference_model()
    for document in (document for file in files for document in file.read_text(encoding="utf-8").split("\n\n\n")):
        ids = tokenizer(document, add_special_tokens=False).input_ids
        for start in range(0, len(ids), SEQUENCE_TOKENS - 1):
            part = torch.tensor([tokenizer.bos_token_id, *ids[start : start + SEQUENCE_TOKENS - 1]])
            yield part
            n_tokens -= part.numel()
            if n_tokens <= 0:
                return


def codecs(calibrations: dict[int, kvtc.Calibration]) -> dict[str, kvtc.Codec]:
    """Every case by name; `calibrations` by layers per basis, the last over all layers."""
    *groups, n_layers = calibrations
    across = calibrations[n_layers]
    cases: dict[str, kvtc.Codec] = {}
    for ratio in (8, 16, 32, 64):
        cases[f"dynamic program {ratio}x"] = kvtc.Codec(across, ratio=ratio)
        cases[f"truncation {ratio}x"] = kvtc.Codec(across, ratio=ratio, allocation="truncate")
    for ratio in (8, 16, 32):
        for group in groups:
            part = calibrations[group]
            cases[f"{group} layer(s) a basis, {ratio}x"] = kvtc.Codec(part, ratio=ratio)
            cases[f"{group} layer(s) a basis, truncation {ratio}x"] = kvtc.Codec(
                part, ratio=ratio, allocation="truncate"
            )
    for ratio in (16, 64):
        cases[f"sinks compressed {ratio}x"] = kvtc.Codec(across, ratio=ratio, sink_tokens=0)
        cases[f"sinks in fp8 {ratio}x"] = kvtc.Codec(across, ratio=ratio, sink_format="fp8")
        for window in (0, 16, 64):
            cases[f"window {window}, {ratio}x"] = kvtc.Codec(across, ratio=ratio, window_tokens=window)
    for coder in ("none", "deflate", "zstd", "lz4"):
        cases[f"lossless {coder} 16x"] = kvtc.Codec(across, ratio=16, lossless=coder)
    cases["keys 8x, values 32x"] = kvtc.Codec(across, key_ratio=8, value_ratio=32)
    cases["keys 32x, values 8x"] = kvtc.Codec(across, key_ratio=32, value_ratio=8)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--calibration-text", type=Path, nargs="+", required=True)
    parser.add_argument("--max-rows", type=int, default=60_000)
    options = parser.parse_args()
    model, _ = kvtc.reference_model()
    n_layers = model.config.num_hidden_layers
    calibrations = {
        group: kvtc.calibrate(
            model,
            sequences(options.calibration_text, options.max_rows),
            max_rows=options.max_rows,
            layers_per_basis=group,
        )
        for group in range(1, n_layers + 1)
        if n_layers % group == 0
    }
    qualities = measure(*kvtc.reference_model(dtype="bfloat16"), codecs(calibrations), options)
    print_qualities(qualities)
    rows = calibrations[n_layers].info["n_rows"]
    save_result("ablations", {"calibration_rows": rows, "qualities": [asdict(quality) for quality in qualities]})


if __name__ == "__main__":
    main()
