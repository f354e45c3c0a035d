"""The subcommands `calibrate` and `measure`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from .arguments import (
    MODEL_HELP,
    Outcome,
    add_output,
    add_subcommand,
    beginning,
    check_context,
    check_device,
    check_output,
    describe_basis,
    find_calibration,
    half_open_range,
    joint_fields,
    load_model,
    load_tokenizer,
    quality_fields,
    quality_of,
    read_lines,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration import Calibration


def add_subcommands(subcommands: Any, common: argparse.ArgumentParser) -> None:
    """Add `calibrate` and `measure`."""
    parser = add_subcommand(
        subcommands,
        common,
        "calibrate",
        calibrate,
        "learn the caches of a model from text, once per model",
        "A text file holds documents, separated by two blank lines. They are read one at a time, from each file in turn,\n"
        "and cut into sequences; each begins with the tokenizer's bos token, if it has one. Reading ends after --tokens.",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text to learn from")
    add_output(parser, "the calibration file to write")
    parser.add_argument("--tokens-per-sequence", type=int, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens read, then no more (default: --max-rows)")
    parser.add_argument("--max-rows", type=int, metavar="N", help="tokens kept, drawn from those (default: 160000)")
    parser.add_argument("--rank", type=int, metavar="R", help="most coefficients of a basis (default: 10000)")
    parser.add_argument(
        "--profiles",
        nargs="+",
        metavar="NAME",
        help="of paper, joint, conditional: what to calibrate for (default: all)",
    )
    parser.add_argument(
        "--joint-rank", type=int, metavar="R", help="the same for joint and conditional (default: 10000)"
    )
    parser.add_argument(
        "--embedding-rank", type=int, metavar="K", help="features of a token in prediction (default: 256)"
    )
    parser.add_argument(
        "--hidden-features", type=int, metavar="N", help="hidden features of prediction; 0: linear (default: 384)"
    )
    parser.add_argument("--layers", type=half_open_range, metavar="A:B", help="layers of one pipeline rank")
    parser.add_argument("--kv-heads", type=half_open_range, metavar="A:B", help="heads of one tensor-parallel rank")
    parser.add_argument("--sink-tokens", type=int, default=4, metavar="N", help="first tokens left out (default: 4)")
    parser.add_argument("--spool-directory", type=Path, metavar="DIR", help="for the rows (default: the system's)")
    parser.add_argument("--device", default="cpu", help="where the model runs and bases are found (default: cpu)")
    parser.add_argument("--fit-device", metavar="DEVICE", help="where bases are found, if elsewhere")

    parser = add_subcommand(
        subcommands,
        common,
        "measure",
        measure,
        "measure what steps do to a model's predictions and add it to a calibration, for encode --kl",
        "Texts are cut as by calibrate. Give others than those that were calibrated on; some ten sequences suffice.",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default with --model reference: its own")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text to measure on")
    add_output(parser, "the calibration file to write")
    parser.add_argument("--tokens-per-sequence", type=int, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")


def calibrate(options: argparse.Namespace) -> Outcome:
    """`kvtc calibrate`."""
    from ..huggingface import calibrate as huggingface

    check_output(options.output, options.force)
    check_device(options.device)
    if options.fit_device is not None:
        check_device(options.fit_device)
    for path in options.text:
        # A file that is missing shows now and not when the files before it are done.
        path.open("rb").close()
    check_context(options.model, options.tokens_per_sequence, "a sequence would have")
    started = time.perf_counter()
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, options.device)
    names = ("max_rows", "rank", "joint_rank", "embedding_rank", "hidden_features", "profiles")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.tokens is not None:
        given["max_tokens"] = options.tokens
    calibration = huggingface.calibrate(
        model,
        token_sequences(documents(options.text), tokenizer, options.tokens_per_sequence),
        sink_tokens=options.sink_tokens,
        layers=options.layers,
        kv_heads=options.kv_heads,
        spool_directory=options.spool_directory,
        device=options.fit_device,
        progress=not options.quiet,
        **given,
    )
    calibration.save(options.output)
    return _describe(calibration, options.output, time.perf_counter() - started)


def measure(options: argparse.Namespace) -> Outcome:
    """`kvtc measure`."""
    from ..huggingface.measure_quality import measure_quality
    from ..report.table import format_fields

    check_output(options.output, options.force)
    check_device(options.device)
    check_context(options.model, options.tokens_per_sequence, "a sequence would have")
    calibration = find_calibration(options)
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, options.device)
    sequences = token_sequences(documents(options.text), tokenizer, options.tokens_per_sequence)
    calibration = measure_quality(model, calibration, sequences)
    calibration.save(options.output)
    result = {
        "path": str(options.output),
        "fingerprint": calibration.fingerprint.hex(),
        "quality": quality_of(calibration),
    }
    return result, format_fields([("saved", options.output), *quality_fields(calibration)])


def documents(paths: Sequence[Path]) -> Iterator[str]:
    """The documents of text files, one of each in turn, read as they are needed: whoever stops early has seen every file."""
    readers = [_documents_of(path) for path in paths]
    while readers:
        going = []
        for reader in readers:
            document = next(reader, None)
            if document is not None:
                going.append(reader)
                yield document
        readers = going


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


def _document(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).strip("\n")
    if text.strip():
        yield text


def _describe(calibration: Calibration, path: Path, seconds: float) -> Outcome:
    from ..report.table import format_bytes, format_fields, format_seconds

    info = calibration.info
    result = {
        "path": str(path),
        "fingerprint": calibration.fingerprint.hex(),
        "geometry": calibration.geometry.describe(),
        "n_sequences": info["n_sequences"],
        "n_tokens_seen": info["n_tokens_seen"],
        "n_rows": info["n_rows"],
        "key_rank": calibration.key.basis.rank,
        "value_rank": calibration.value.basis.rank,
        "key_explained_variance": calibration.key.explained_variance,
        "value_explained_variance": calibration.value.explained_variance,
        "file_bytes": path.stat().st_size,
        "n_parameters": calibration.n_parameters,
        "model_parameters": info["model_parameters"],
        "seconds": seconds,
    }
    share = calibration.n_parameters / info["model_parameters"]
    text = format_fields(
        [
            ("saved", f"{path}, {format_bytes(result['file_bytes'])}"),
            ("covers", result["geometry"]),
            ("rows", f"{info['n_rows']:,} of {info['n_tokens_seen']:,} tokens in {info['n_sequences']:,} sequences"),
            ("key basis", describe_basis(calibration.key)),
            ("value basis", describe_basis(calibration.value)),
            *joint_fields(calibration),
            ("size", f"{calibration.n_parameters:,} numbers, {share:.1%} as many as the model has parameters"),
            ("time", format_seconds(seconds)),
        ]
    )
    return result, text
