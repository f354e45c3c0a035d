"""The subcommand `plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Outcome, Subcommands, check_output


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `plan`."""
    parser = subcommands.add(plan)
    parser.add_argument("--config", type=Path, required=True, metavar="PLAN.json", help="the plan")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the sweep of the plan")
    parser.add_argument("--force", action="store_true", help="replace the plot if it exists")


def plan(options: argparse.Namespace) -> Outcome:
    """Work out what recomputing, holding, offloading and encoding caches cost.

    A file describes the machines, the model and the requests. Two worked examples ship with the
    package in plan/examples; docs/plan.md explains the fields and the model.
    """
    from ..plan import load_plan, run_plan
    from ..plan.report import format_plan, plot_plan

    check_output(options.plot, options.force, ".svg")
    loaded = load_plan(options.config)
    result = run_plan(loaded)
    if options.plot is not None:
        plot_plan(result, loaded.published, options.plot)
    return result, format_plan(result)
