"""Calibrations for the studies, each from some documents of the same files: of one domain, or one of several disjoint draws."""

import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kvtc
from kvtc.calibration.fit import FitOptions, fit
from kvtc.calibration.rows import CalibrationRows
from kvtc.cli.texts import documents, token_sequences
from kvtc.huggingface.calibrate import accumulate
from kvtc.huggingface.models import geometry_of

DOMAINS = ("enwiki", "novels", "docs", "code")
SEQUENCE_TOKENS = 1024
RANKS = {"rank": 512, "joint_rank": 640}
"""Of the calibration that ships with the reference model."""
_CODE = re.compile(
    r"\s*(def |class |import |from \S+ import|return\b|if .*:$|for .*:$|assert |raise |@\w|self\.|>>> |# file: )"
)
_MARKUP = re.compile(r"([=\-~'^*#\"])\1{3,}$|#{1,6} \S|```|\.\. \S|.*``|.*::$|:\w+: |- \[|\[\d+\]_?:? ")
_PRONOUN = re.compile(r"\b(I|me|my|you|your|he|him|she|her|we|us)\b")


def domain_of(document: str) -> str | None:
    """One of DOMAINS, or None for what the rules do not settle.

    code: the first line, or one line in six or more, begins as Python does (def, import, return, self., ...).
    docs: one line in forty or more is marked up as reStructuredText or Markdown is (underlined or # headings, ``literals``).
    enwiki: a short first line, set off by a blank one, whose first long word comes again in the paragraph after it.
    novels: at least 1 500 characters, no mark-up at all, and three words in a hundred or more are personal pronouns.
    """
    lines = [line for line in document.split("\n") if line.strip()]
    if not lines:
        return None
    if _CODE.match(lines[0]) or sum(bool(_CODE.match(line)) for line in lines) * 6 >= len(lines):
        return "code"
    n_marked = sum(bool(_MARKUP.match(line)) for line in lines)
    if n_marked * 40 >= len(lines):
        return "docs"
    title, _, body = document.lstrip("\n").partition("\n\n")
    words = sorted(re.findall(r"\w{3,}", title), key=len)
    if len(title) <= 100 and "\n" not in title and words and words[-1].lower()[:5] in body[:600].lower():
        return "enwiki"
    n_pronouns = len(_PRONOUN.findall(document))
    is_told = len(document) >= 1500 and not n_marked and n_pronouns * 100 >= 3 * len(document.split())
    return "novels" if is_told else None


def sequences(
    files: Iterable[Path], tokenizer: Any, domain: str | None = None, draw: int = 0, n_draws: int = 1
) -> Iterator[torch.Tensor]:
    """Token sequences [T] of the files' documents. domain: of its documents alone. draw: of n_draws disjoint sets of documents."""
    found = (document for document in documents(list(files)) if domain is None or domain_of(document) == domain)
    chosen = (document for index, document in enumerate(found) if index % n_draws == draw)
    return token_sequences(chosen, tokenizer, SEQUENCE_TOKENS)


@dataclass(frozen=True)
class Recipe:
    """What to calibrate the reference model on: so many tokens of one of n_draws disjoint sets of documents, of a domain or of all.

    layers_per_basis: a calibration for `paper` alone, with bases of groups of so many layers; None: one for all profiles.
    """

    tokens: int
    domain: str | None = None
    draw: int = 0
    n_draws: int = 1
    layers_per_basis: int | None = None


def calibrate(recipe: Recipe, files: Iterable[Path]) -> kvtc.Calibration:
    """Follow one recipe."""
    started, cpu = time.perf_counter(), time.process_time()
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    texts = sequences(files, tokenizer, recipe.domain, recipe.draw, recipe.n_draws)
    if recipe.layers_per_basis is None:
        made = kvtc.calibrate(model, texts, max_tokens=recipe.tokens, seed=recipe.draw, progress=False, **RANKS)
    else:
        rows = CalibrationRows(geometry_of(model), max_tokens=recipe.tokens, seed=recipe.draw)
        accumulate(model, texts, [rows])
        made = fit(rows, FitOptions(**RANKS, seed=recipe.draw, layers_per_basis=recipe.layers_per_basis))
    if made.info["n_rows"] < recipe.tokens:
        raise SystemExit(f"the calibration text holds {made.info['n_rows']} tokens for {recipe}")
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"{recipe}: {seconds:.0f} s, {cpu:.0f} s of a core", file=sys.stderr, flush=True)
    return made


def calibrate_all(recipes: Mapping[str, Recipe], files: Iterable[Path], processes: int) -> dict[str, kvtc.Calibration]:
    """By the names of the recipes, so many at a time."""
    paths = list(files)
    if processes == 1:
        return {name: calibrate(recipe, paths) for name, recipe in recipes.items()}
    # Not forked: libraries that have started threads do not survive that.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(calibrate, recipes.values(), [paths] * len(recipes))
        return dict(zip(recipes, found, strict=True))


def add_calibration_arguments(parser: Any) -> None:
    """--calibration-text, --calibration-tokens, --processes."""
    parser.add_argument("--calibration-text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=40_000)
    parser.add_argument("--processes", type=int, default=1, help="calibrations made at a time")
