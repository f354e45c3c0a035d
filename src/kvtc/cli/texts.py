"""Texts that the command line names: documents, lines, token ids."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from ..process.progress import note, task
from .arguments import add_many
from .models import context_of

if TYPE_CHECKING:
    from torch import Tensor

SEQUENCE_TOKENS = 1024
"""Of a sequence that is learnt from, unless another number is given."""


def documents(paths: Sequence[Path]) -> Iterator[str]:
    """The documents of text files, one of each in turn, read as they are needed: whoever stops
    early has seen every file.
    """
    readers = [_documents_of(path) for path in paths]
    while readers:
        going = []
        for reader in readers:
            document = next(reader, None)
            if document is not None:
                going.append(reader)
                yield document
        readers = going


def token_sequences(texts: Iterator[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Each text as sequences [T] int64 of at most `length` tokens, bos included."""
    import torch

    first = beginning(tokenizer)
    if length <= len(first):
        raise InvalidArgument(f"--tokens-per-sequence must be at least {len(first) + 1}; got {length}")
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for start in range(0, len(ids), length - len(first)):
            yield torch.tensor(first + ids[start : start + length - len(first)])


def add_training_text(parser: Any, use: str) -> None:
    """--text, files of documents, and --tokens-per-sequence. use: what the text is there to do."""
    add_many(parser, "--text", Path, "FILE", f"UTF-8 text to {use}", required=True)
    parser.add_argument("--tokens-per-sequence", type=int, default=SEQUENCE_TOKENS, metavar="N", help="default: 1024")


def add_truncate(parser: Any) -> None:
    """--truncate."""
    parser.add_argument(
        "--truncate", action="store_true", help="of a text longer than the model's context, the beginning"
    )


def text_ids(options: argparse.Namespace, path: Path, tokenizer: Any) -> Tensor:
    """The ids of a text's tokens: all of them or, with --truncate, as many as the model reads."""
    token_ids: Tensor = token_ids_of(path, tokenizer)
    context = context_of(options.model)
    if context is None or len(token_ids) <= context:
        return token_ids
    if not options.truncate:
        raise InvalidArgument(
            f"{path} has {len(token_ids):,} tokens, more than the context of {options.model}, {context:,}; "
            f"--truncate takes the first {context:,} of them"
        )
    note(f"{path}: the first {context:,} of {len(token_ids):,} tokens")
    return token_ids[:context]


def token_ids_of(path: Path, tokenizer: Any) -> Any:
    """A text file as one sequence: ids [T] int64, the tokenizer's first token (bos) included if it
    has one.
    """
    import torch

    text = read_text(path)
    with task(f"reading {path}: {len(text):,} characters"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise InvalidArgument(f"{path} holds no text")
    return torch.tensor([*beginning(tokenizer), *ids])


def beginning(tokenizer: Any) -> list[int]:
    """What every sequence begins with: the bos token, or nothing."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def read_text(path: Path) -> str:
    """A whole text file."""
    return "".join(read_lines(path))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, as they are needed; `InvalidArgument` where it is not UTF-8."""
    with path.open(encoding="utf-8") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _documents_of(path: Path) -> Iterator[str]:
    """Two blank lines, or the end of the file, end a document."""
    lines: list[str] = []
    n_blank = 0
    for line in read_lines(path):
        n_blank = 0 if line.strip() else n_blank + 1
        lines.append(line)
        if n_blank == 2:
            yield from _document(lines)
            lines = []
    yield from _document(lines)


def _document(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).strip("\n")
    if text.strip():
        yield text
