"""The subcommand `demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..display import shown_lines
from ..installed_models import SMOLLM2
from .arguments import REFERENCE, Outcome, Subcommands, check_directory, check_output
from .models import quiet_transformers


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `demo`."""
    parser = subcommands.add(demo)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="for a picture (default: demo_output)",
    )
    parser.add_argument(
        "--ratio", type=float, default=16, help="original size over stored size of the cache (default: 16)"
    )
    parser.add_argument(
        "--model",
        choices=[SMOLLM2, REFERENCE],
        help=f"default: {SMOLLM2} where it is installed and calibrated, otherwise the model that ships with kvtc",
    )
    parser.add_argument("--force", action="store_true", help="replace the picture if it exists")


def demo(options: argparse.Namespace) -> Outcome:
    """Show the codec at work on smollm2-135m, or on the small model that ships with it.

    The text is printed as it comes; with --json it goes to stderr.
    """
    from ..demo.run import PICTURE, choose_model, run_demo

    check_directory(options.output)
    if (options.output / PICTURE).exists():
        check_output(options.output / PICTURE, options.force)
    quiet_transformers()

    def say(block: str) -> None:
        print(shown_lines(block), file=sys.stderr if options.json else sys.stdout, flush=True)

    source, why = choose_model(options.model)
    if why:
        say(why)
    return run_demo(options.output, options.ratio, source=source, say=say), ""
