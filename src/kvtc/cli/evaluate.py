"""The subcommand `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    REFERENCE,
    Outcome,
    Subcommands,
    add_calibration,
    add_many,
    add_model,
    add_output,
    check_output,
    check_readable,
    positive,
)
from .models import find_calibration, open_model
from .texts import SEQUENCE_TOKENS, documents, token_sequences

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..evaluate.sweep import Sweep

RATIOS = (4, 8, 16, 32, 64, 128, 256, 512)
"""The whole range that the profiles are made for."""


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `evaluate`."""
    parser = subcommands.add(evaluate)
    parser.add_argument("named_model", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    add_many(parser, "--text", Path, "FILE", "held-out text, UTF-8", required=True)
    add_model(parser, default=REFERENCE)
    add_calibration(parser)
    training = "training text: if the file of --calibration does not exist yet, calibrate on it and write the file"
    add_many(parser, "--calibrate-on", Path, "FILE", training)
    parser.add_argument("--exact-only", action="store_true", help="the exact cache alone: needs no calibration")
    parser.add_argument("--dtype", default="auto", help="of the model and its cache (default: that of the weights)")
    _add_methods(parser.add_argument_group("what is measured"))
    _add_texts(parser.add_argument_group("on text"))
    _add_tasks(parser.add_argument_group("on tasks"))
    add_output(parser, "the result file to write (.json)", required=False)


def _add_methods(group: Any) -> None:
    group.add_argument("--profiles", nargs="+", metavar="NAME", help="default: all that the calibration serves")
    ratios = "default: 4 to 512; one that a profile cannot reach is left out of its curve and listed"
    add_many(group, "--ratios", float, "R", ratios, RATIOS)
    add_many(group, "--window", int, "N", "last tokens kept exactly; 0 is page mode", [128])
    group.add_argument(
        "--baselines",
        nargs="*",
        metavar="NAME",
        help="FP8, NVFP4, INT4, KIVI, GEAR, H2O, TOVA, xKV, CacheGen, TurboQuant, zstd; no name: all",
    )
    add_many(group, "--profile-text", Path, "FILE", "other text, that CacheGen is profiled on")
    add_many(group, "--evict", positive, "N", "also TOVA keeping 1/N, then the last profile")


def _add_texts(group: Any) -> None:
    group.add_argument("--tokens", type=positive, default=1792, metavar="N", help="of a stretch (default: 1792)")
    group.add_argument("--continuation", type=positive, default=256, metavar="N", help="predictions (default: 256)")
    group.add_argument("--texts-per-file", type=positive, default=4, metavar="N", help="stretches (default: 4)")
    use = "multi-turn use: N turns of T tokens, the cache coded after each; 16x16 is the paper's simulation"
    add_many(group, "--turns", _turns, "TxN", use)
    group.add_argument(
        "--bits-per-byte", type=int, default=0, metavar="N", help="of the model, on N windows a file (default: none)"
    )


def _add_tasks(group: Any) -> None:
    group.add_argument("--tasks", nargs="*", metavar="NAME", help="look-ups from the cache; no name: all of them")
    group.add_argument("--tasks-only", action="store_true", help="nothing on text: it is what tasks are made of")
    add_many(group, "--contexts", positive, "N", "tokens of a context", [1024])
    group.add_argument("--n-contexts", type=positive, default=6, metavar="N", help="a task (default: 6)")
    group.add_argument("--n-questions", type=positive, default=8, metavar="N", help="a context (default: 8)")
    add_many(group, "--key-value-retrieval", Path, "FILE", '"Lost in the Middle", jsonl.gz')


def evaluate(options: argparse.Namespace) -> Outcome:
    """Measure rate and quality of kvtc and its baselines against the exact cache.

    Give held-out text: none that the calibration was made from. What the result file holds, and how
    each figure is defined, is in docs/evaluation.md; `kvtc report` makes a page of it.
    """
    from ..evaluate.provenance import save_result, stamp
    from ..evaluate.schema import ResultFile
    from ..evaluate.sweep import run_sweep
    from ..report.sections import render_text, sections_of

    if options.named_model is not None:
        options.model = options.named_model
    check_output(options.output, options.force, ".json")
    check_readable([*options.text, *options.profile_text, *options.key_value_retrieval, *options.calibrate_on])
    lengths = [] if options.tasks_only else [options.tokens]
    lengths += [] if options.tasks is None else options.contexts
    calibrates = bool(options.calibrate_on) and options.calibration is not None and not options.calibration.exists()
    calibration = None if options.exact_only or calibrates else find_calibration(options)
    model, tokenizer = open_model(options, max(lengths, default=0), "a text or a context would have")
    if calibrates and not options.exact_only:
        calibration = _calibrated(options, model, tokenizer)
    name = options.model if options.model == REFERENCE else Path(options.model).name
    result = run_sweep(model, tokenizer, calibration, _sweep(options), name)
    stamped = stamp(result)
    if options.output is not None:
        save_result(options.output.stem, result, options.output.parent)
    return stamped, render_text(sections_of(ResultFile("evaluate", stamped["provenance"], result)))


def _calibrated(options: argparse.Namespace, model: Any, tokenizer: Any) -> Calibration:
    """The calibration that `kvtc calibrate` makes with its default options, written to its file."""
    from ..huggingface import calibrate as huggingface

    check_output(options.calibration, force=False)
    sequences = token_sequences(documents(options.calibrate_on), tokenizer, SEQUENCE_TOKENS)
    calibration = huggingface.calibrate(model, sequences, progress=not options.quiet)
    calibration.save(options.calibration)
    return calibration


def _sweep(options: argparse.Namespace) -> Sweep:
    from ..evaluate.sweep import Methods, Sweep, Tasks, Texts

    return Sweep(
        methods=Methods(
            profiles=options.profiles,
            ratios=options.ratios,
            windows=options.window,
            baselines=() if options.baselines is None else options.baselines or None,
            evicted=options.evict,
        ),
        texts=Texts(
            files=options.text,
            n_tokens=options.tokens,
            n_continuation=options.continuation,
            per_file=options.texts_per_file,
        ),
        tasks=Tasks(
            names=() if options.tasks is None else options.tasks or None,
            contexts=options.contexts,
            n_contexts=options.n_contexts,
            n_questions=options.n_questions,
            published=options.key_value_retrieval,
        ),
        turns=options.turns,
        n_bits_windows=options.bits_per_byte,
        profile_files=options.profile_text,
        on_texts=not options.tasks_only,
    )


def _turns(text: str) -> tuple[int, int]:
    """Option type: 16x8 becomes (16, 8)."""
    tokens, cross, turns = text.partition("x")
    if not (cross and tokens.isdecimal() and turns.isdecimal() and int(tokens) and int(turns)):
        raise argparse.ArgumentTypeError(f"{text!r} is not TxN, tokens of a turn and number of turns")
    return int(tokens), int(turns)
