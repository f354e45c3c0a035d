"""Calibrated on one domain, used on another: rate and quality of every pair of four domains, beside
mixed calibrations.

    python -m benchmarks.quality.domain_shift --calibration-text FILE... --text enwiki.txt novels.txt docs.txt code.txt

--calibration-text holds documents of all domains; `shared.calibrations.domain_of` says of which one is, and
sorts the held-out files as a check. Each domain, and a mixture of all, is calibrated from equally
many tokens; "as shipped" is the reference model's own calibration.
"""

import argparse
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import kvtc
from benchmarks.shared.calibrations import DOMAINS, Recipe, add_calibration_arguments, calibrate_all, domain_of
from benchmarks.shared.text_quality import add_text_arguments, measure
from kvtc.cli.texts import documents
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.quality import Quality
from kvtc.evaluate.schema import DOMAIN_SHIFT, ShiftCell
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_ratio, format_table

MIXED, SHIPPED = "mixed", "as shipped"
SORTED_CHARACTERS = 1_000_000


def calibrations(options: argparse.Namespace) -> dict[str, kvtc.Calibration]:
    """By what they are made from: each domain, a mixture, and the shipped one."""
    recipes = {domain or MIXED: Recipe(options.calibration_tokens, domain) for domain in (*DOMAINS, None)}
    made = calibrate_all(recipes, options.calibration_text, options.processes)
    return {**made, SHIPPED: kvtc.reference_calibration()}


def sorted_shares(file: Path) -> dict[str, float]:
    """Share of the characters of a file's beginning by the domain its documents are taken for."""
    found: Counter[str] = Counter()
    for document in documents([file]):
        found[domain_of(document) or "none"] += len(document)
        if found.total() >= SORTED_CHARACTERS:
            break
    return {name: round(count / found.total(), 4) for name, count in found.most_common()}


def cell(quality: Quality, text: str) -> ShiftCell:
    name, _, calibrated_on = quality.name.partition(" from ")
    return ShiftCell(
        name,
        calibrated_on,
        text,
        quality.kl,
        quality.top1_agreement,
        quality.perplexity,
        quality.perplexity_exact,
        quality.body_ratio,
        quality.total_ratio,
    )


def print_cells(cells: list[ShiftCell]) -> None:
    """A table a method: what it is calibrated on by what it is used on; KL in nats and body_ratio."""
    texts = list(dict.fromkeys(c.text for c in cells))
    found = {(c.name, c.calibrated_on, c.text): c for c in cells}
    for name in dict.fromkeys(c.name for c in cells):
        rows = []
        for calibrated_on in dict.fromkeys(c.calibrated_on for c in cells):
            here = [found[name, calibrated_on, text] for text in texts]
            rows.append([calibrated_on, *(f"{c.kl:.5f}" for c in here), *(format_ratio(c.body_ratio) for c in here)])
        header = ["calibrated on", *(f"KL on {text}" for text in texts), *(f"ratio on {text}" for text in texts)]
        print(f"\n{name}\n\n{format_table(header, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.set_defaults(texts_per_file=2)
    add_calibration_arguments(parser)
    parser.add_argument("--ratios", type=float, nargs="+", default=[16, 64])
    parser.add_argument("--profiles", nargs="+", default=["paper", "conditional"])
    options = parser.parse_args()
    started = time.perf_counter()
    shares = {file.stem: sorted_shares(file) for file in options.text}
    methods = {
        f"{profile} {ratio:g}x from {name}": kvtc.Codec(made, profile, ratio=ratio, model=MODEL_DIRECTORY)
        for name, made in calibrations(options).items()
        for profile in options.profiles
        for ratio in options.ratios
    }
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    cells = []
    for file in options.text:
        here = argparse.Namespace(**{**vars(options), "text": [file]})
        cells += [cell(quality, file.stem) for quality in measure(model, tokenizer, methods, here)]
    print_cells(cells)
    result = {
        "kind": DOMAIN_SHIFT,
        "calibration_tokens": options.calibration_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "held_out_files_sorted_as": shares,
        "cells": [asdict(found) for found in cells],
    }
    save_result("domain_shift", result)


if __name__ == "__main__":
    main()
