"""The subcommand `plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import Outcome, add_subcommand, check_output

EXAMPLES_HELP = (
    "Two worked examples ship with the package in plan/examples; docs/plan.md explains the fields and the model."
)


def add_subcommands(subcommands: Any, common: argparse.ArgumentParser) -> None:
    """Add `plan`."""
    parser = add_subcommand(
        subcommands,
        common,
        "plan",
        plan,
        "work out what recomputing, holding, offloading and encoding caches cost on machines that a file describes",
        EXAMPLES_HELP,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="PLAN.json", help="the plan")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the sweep of the plan")
    parser.add_argument("--force", action="store_true", help="replace the plot if it exists")


def plan(options: argparse.Namespace) -> Outcome:
    """`kvtc plan`."""
    from ..plan import load_plan, run_plan
    from ..plan.report import format_plan, plot_plan

    if options.plot is not None:
        check_output(options.plot, options.force, ".svg")
    loaded = load_plan(options.config)
    result = run_plan(loaded)
    if options.plot is not None:
        plot_plan(result, loaded.published, options.plot)
    return result, format_plan(result)
