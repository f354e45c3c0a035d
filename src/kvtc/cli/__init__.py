"""The command `kvtc`: subcommands, and how they end.

Results go to stdout, as text or with --json as one JSON object; progress and logs go to stderr.
Exit codes: 0 done, 1 failed (the last line on stderr says why) or done and a fault was found, 2 wrong
usage, 130 interrupted.
Importing this package costs nothing: what a subcommand needs is imported when it runs, inside of
its functions.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..display import shown, shown_lines, without_credentials
from ..errors import KvtcError
from ..process import progress
from ..strict_json import dumps
from . import calibrate, decode, demo, doctor, encode, evaluate, inspect, measure, plan, report, store
from .arguments import Subcommands

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        options = _parser().parse_args(argv)
        return _run(options)
    except SystemExit as leaving:  # argparse has said what it has to say
        return leaving.code if isinstance(leaving.code, int) else FAILED


def _run(options: argparse.Namespace) -> int:
    try:
        with progress.reporting(not options.quiet):
            result, text = options.run(options)
        output = dumps(result) if options.json else shown_lines(text)
        if output:
            print(output)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left, as `head` does. Python flushes stdout at exit and must not find the broken pipe there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("kvtc: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (KvtcError, OSError, MemoryError) as error:
        if options.debug:
            print(shown_lines(traceback.format_exc()), file=sys.stderr, end="")
        print(f"kvtc: error: {_one_line(error)}", file=sys.stderr)
        return FAILED
    return int(options.exit_code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return shown(f"{error.strerror}: {error.filename}")
    return without_credentials(shown(" ".join(str(error).split()))) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """A parser that shows what it was given as text."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvtc", description="LLM key-value caches as small streams of bytes, and back.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"kvtc {__version__}")
    subcommands = Subcommands(parser)
    for module in (demo, calibrate, measure, encode, decode, inspect, doctor, evaluate, report, plan, store):
        module.add_subcommands(subcommands)
    return parser
