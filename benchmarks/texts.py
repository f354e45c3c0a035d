"""Calibration text for the studies: documents of a file, sorted into domains by simple rules, as sequences of tokens."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from kvtc.cli.calibrating import documents, token_sequences

DOMAINS = ("enwiki", "novels", "docs", "code")
SEQUENCE_TOKENS = 1024
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
