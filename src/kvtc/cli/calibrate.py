"""The subcommand `calibrate`."""

from __future__ import annotations

import argparse
import shutil
import time

from .arguments import Outcome, Subcommands, add_model, add_output, check_output, check_readable, half_open_range
from .models import open_model
from .texts import add_training_text, documents, token_sequences


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `calibrate`."""
    parser = subcommands.add(calibrate)
    add_model(parser, "the model runs and bases are found", required=True)
    add_training_text(parser, "learn from")
    add_output(parser, "the calibration file to write")
    parser.add_argument(
        "--tokens", dest="max_tokens", type=int, metavar="N", help="tokens read, then no more (default: 160000)"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="most coefficients of a basis (default: 10000)")
    parser.add_argument(
        "--profiles",
        nargs="+",
        metavar="NAME",
        help="of paper, joint, conditional: what to calibrate for (default: all)",
    )
    parser.add_argument(
        "--joint-rank",
        type=int,
        metavar="R",
        help="the same for joint and conditional (default: at most 4096)",
    )
    parser.add_argument(
        "--recompute-layers", type=int, metavar="M", help="first layers that conditional recomputes (default: 1)"
    )
    parser.add_argument("--layers", type=half_open_range, metavar="A:B", help="layers of one pipeline rank")
    parser.add_argument("--kv-heads", type=half_open_range, metavar="A:B", help="heads of one tensor-parallel rank")
    parser.add_argument("--sink-tokens", type=int, default=4, metavar="N", help="first tokens left out (default: 4)")
    parser.add_argument("--fit-device", metavar="DEVICE", help="where bases are found, if elsewhere")


def calibrate(options: argparse.Namespace) -> Outcome:
    """Learn the caches of a model from text, once per model.

    A text file holds documents, separated by two blank lines. They are read one at a time, from each
    file in turn, and cut into sequences; each begins with the tokenizer's bos token, if it has one.
    Reading ends after --tokens.

    What is done is kept in OUTPUT.partial, beside the output, until the file is written: the same
    command goes on where an interrupted one was.
    """
    from ..coding.device import usable_device
    from ..huggingface import calibrate as huggingface
    from ..report.table import format_fields, format_seconds
    from .calibration_fields import describe_calibration

    check_output(options.output, options.force)
    check_readable(options.text)
    usable_device(options.fit_device or options.device)
    started = time.perf_counter()
    model, tokenizer = open_model(options, options.tokens_per_sequence, "a sequence would have")
    names = (
        "max_tokens", "rank", "joint_rank", "recompute_layers", "profiles", "layers", "kv_heads", "sink_tokens",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    sequences = token_sequences(documents(options.text), tokenizer, options.tokens_per_sequence)
    kept = options.output.with_name(options.output.name + ".partial")
    calibration = huggingface.calibrate(
        model,
        sequences,
        device=options.fit_device,
        checkpoint_directory=kept,
        progress=not options.quiet,
        **given,
    )
    calibration.save(options.output)
    shutil.rmtree(kept, ignore_errors=True)
    result, fields = describe_calibration(calibration, options.output)
    result["seconds"] = time.perf_counter() - started
    share = calibration.n_parameters / calibration.info["model_parameters"]
    fields += [
        ("share", f"{share:.1%} as many numbers as the model has parameters"),
        ("time", format_seconds(result["seconds"])),
    ]
    return result, format_fields(fields)
