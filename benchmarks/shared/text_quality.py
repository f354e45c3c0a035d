"""What the studies share: texts from options, every case on every text, a table. `kvtc evaluate`
measures everything else.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kvtc
from kvtc.evaluate import sweep
from kvtc.evaluate.methods import Method
from kvtc.evaluate.quality import Quality, evaluate_continuation, summarize
from kvtc.report.table import format_table
from kvtc.report.text_sections import quality_table


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text files")
    parser.add_argument("--tokens", type=int, default=1792, help="tokens of a text, its continuation included")
    parser.add_argument("--continuation", type=int, default=256, help="predictions compared")
    parser.add_argument("--texts-per-file", type=int, default=4)


def stretches(tokenizer: Any, options: argparse.Namespace) -> Iterable[torch.Tensor]:
    """Evenly spaced stretches of each file, [tokens] ids each."""
    texts = sweep.Texts(n_tokens=options.tokens, per_file=options.texts_per_file)
    return sweep.stretches(tokenizer, texts, options.text)


def measure(
    model: Any, tokenizer: Any, methods: Mapping[str, Method | kvtc.Codec], options: argparse.Namespace
) -> list[Quality]:
    """Every method on every text, summed up per method."""
    texts = [evaluate_continuation(model, ids, methods, options.continuation) for ids in stretches(tokenizer, options)]
    return [summarize(of_one_method) for of_one_method in zip(*texts, strict=True)]


def print_qualities(qualities: Iterable[Quality]) -> None:
    table = quality_table([asdict(quality) for quality in qualities])
    print(format_table(table.header, table.rows))
