"""The subcommand `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..process.progress import track
from .arguments import Outcome, Subcommands, add_output, check_output


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `report`."""
    parser = subcommands.add(report)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--title", default="kvtc: rate and quality", help="of the page")
    add_output(parser, "the page to write (.html)", required=False)


def report(options: argparse.Namespace) -> Outcome:
    """Show result files: as tables, or with -o as one HTML page with plots.

    Result files are what `kvtc evaluate` and the programs in benchmarks/ save. The page needs no
    network and no script.
    """
    from ..evaluate.schema import read_result
    from ..files import SHARED, write_atomically
    from ..report.page import render_page
    from ..report.parts import Chart
    from ..report.sections import render_text, sections_of

    check_output(options.output, options.force)
    files = [read_result(path) for path in track(options.results, "reading results", "files")]
    result: dict[str, Any] = {"results": [{"name": file.name, "kind": file.kind} for file in files]}
    if options.output is None:
        result["tables"] = [
            {"section": section.title, "caption": part.caption, "header": part.header, "rows": part.rows}
            for file in files
            for section in sections_of(file)
            for part in section.parts
            if not isinstance(part, Chart)
        ]
        return result, "\n\n".join(render_text(sections_of(file)) for file in files)
    write_atomically(options.output, render_page(options.title, files).encode(), SHARED)
    return {**result, "path": str(options.output)}, f"saved {options.output}"
