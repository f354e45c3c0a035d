"""The subcommand `demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..display import shown_lines
from ..installed_models import INSTALLED_MODELS, SMOLLM2
from .arguments import REFERENCE, Outcome, add_subcommand, check_directory, check_output
from .models import quiet_transformers


def add_subcommands(subcommands: Any, common: argparse.ArgumentParser) -> None:
    """Add `demo`."""
    parser = add_subcommand(
        subcommands,
        common,
        "demo",
        run_demo,
        "show the codec at work on smollm2-135m, or on the small model that ships with it",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="for two pictures (default: demo_output)",
    )
    parser.add_argument(
        "--ratio", type=float, default=16, help="original size over stored size of the cache (default: 16)"
    )
    parser.add_argument(
        "--model",
        choices=[*INSTALLED_MODELS, REFERENCE],
        help=f"default: {SMOLLM2} where it is installed and calibrated, otherwise the model that ships with kvtc",
    )
    parser.add_argument("--force", action="store_true", help="replace the pictures if they exist")


def run_demo(options: argparse.Namespace) -> Outcome:
    """`kvtc demo`: the text is printed as it comes; with --json it goes to stderr."""
    from ..demo.run import PICTURES, choose_model
    from ..demo.run import run_demo as demonstrate
    from ..errors import MissingDependency

    check_directory(options.output)
    for name in PICTURES:
        if (options.output / name).exists():
            check_output(options.output / name, options.force)
    try:
        quiet_transformers()
    except ImportError as error:
        raise MissingDependency('the demo needs transformers; pip install "kvtc[hf]"') from error

    def say(block: str) -> None:
        print(shown_lines(block), file=sys.stderr if options.json else sys.stdout, flush=True)

    source, why = choose_model(options.model)
    if why:
        say(why)
    return demonstrate(options.output, options.ratio, source=source, say=say), ""
