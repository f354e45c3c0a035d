"""The subcommand `measure`."""

from __future__ import annotations

import argparse

from .arguments import (
    Outcome,
    Subcommands,
    add_calibration,
    add_model,
    add_output,
    check_output,
    check_readable,
)
from .models import find_calibration, open_model
from .texts import add_training_text, documents, token_sequences


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `measure`."""
    parser = subcommands.add(measure)
    add_model(parser, "the model runs", required=True)
    add_calibration(parser)
    add_training_text(parser, "measure on")
    add_output(parser, "the calibration file to write")


def measure(options: argparse.Namespace) -> Outcome:
    """Measure what steps do to a model's predictions and add it to a calibration, for encode --kl.

    Texts are cut as by calibrate. Give others than those that were calibrated on; some ten sequences
    suffice.
    """
    from ..huggingface.measure_quality import measure_quality
    from ..report.table import format_fields
    from .calibration_fields import describe_calibration

    check_output(options.output, options.force)
    check_readable(options.text)
    calibration = find_calibration(options)
    model, tokenizer = open_model(options, options.tokens_per_sequence, "a sequence would have")
    sequences = token_sequences(documents(options.text), tokenizer, options.tokens_per_sequence)
    calibration = measure_quality(model, calibration, sequences)
    calibration.save(options.output)
    result, fields = describe_calibration(calibration, options.output)
    return result, format_fields(fields)
