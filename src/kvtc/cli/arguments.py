"""What several subcommands share: options, their types, and checks of paths before any work is
done.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument

Outcome = tuple[dict[str, Any], str]
REFERENCE = "reference"
MODEL_HELP = (
    "directory or hub name of a transformers model; 'reference' is the one that ships with kvtc, "
    "'smollm2-135m' the one that `make bench-models` installs"
)


class Subcommands:
    """Makes the parsers of subcommands; all of them take --json, --quiet and --debug."""

    def __init__(self, parser: Any) -> None:
        self._parsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--json", action="store_true", help="print the result as one JSON object")
        self._common.add_argument("--quiet", action="store_true", help="show no progress")
        self._common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def group(self, name: str, description: str) -> Subcommands:
        """The subcommands of a subcommand."""
        summary = f"{description[:1].lower()}{description[1:]}".removesuffix(".")
        return Subcommands(self._parsers.add_parser(name, help=summary, description=description, allow_abbrev=False))

    def add(self, run: Callable[[argparse.Namespace], Outcome]) -> Any:
        """The parser of a subcommand.

        Parameters:
            run: Gets the parsed options. Its name is the subcommand's, and its docstring the help. It
                sets `options.exit_code` where it has done what it should and found a fault.
        """
        description = getdoc(run) or ""
        summary = description.partition("\n\n")[0].replace("\n", " ").removesuffix(".")
        parser = self._parsers.add_parser(
            run.__name__.removesuffix("_"),
            parents=[self._common],
            help=f"{summary[:1].lower()}{summary[1:]}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(run=run, usage_error=parser.error, exit_code=0)
        return parser


def add_output(parser: Any, what: str, required: bool = True) -> None:
    """-o and --force."""
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


def add_model(parser: Any, runs: str = "model and codec run", **model: Any) -> None:
    """--model and --device. runs: what runs on the device. model: how --model may be given."""
    parser.add_argument("--model", help=MODEL_HELP, **model)
    parser.add_argument("--device", default="cpu", help=f"where {runs} (default: cpu)")


def add_calibration(parser: Any) -> None:
    """--calibration."""
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default with --model reference: its own")


def add_many(
    parser: Any, name: str, kind: Any, metavar: str, text: str, default: Sequence[Any] = (), **more: Any
) -> None:
    """An option of one value or several."""
    parser.add_argument(name, type=kind, nargs="+", default=list(default), metavar=metavar, help=text, **more)


def half_open_range(text: str) -> tuple[int, int]:
    """Option type: 4:8 becomes (4, 8)."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range A:B of whole numbers, A included and B not")
    return int(start), int(stop)


def positive(text: str) -> int:
    """Option type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def check_output(path: Path | None, force: bool, suffix: str = "") -> None:
    """Raise `InvalidArgument` before any work is done if the output, where one is asked for, cannot
    be written there, or has another suffix.
    """
    if path is None:
        return
    if not path.name.endswith(suffix):
        raise InvalidArgument(f"{path} must end in {suffix}")
    if path.is_dir():
        raise InvalidArgument(f"{path} is a directory; give a file name")
    if not path.parent.is_dir():
        raise InvalidArgument(f"the directory {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise InvalidArgument(f"{path} is no file that could be replaced")
    if path.exists() and not force:
        raise InvalidArgument(f"{path} exists; give --force to replace it")


def check_readable(paths: Iterable[Path]) -> None:
    """Raise OSError now for a file that is missing, and not when those before it are done."""
    for path in paths:
        path.open("rb").close()


def check_directory(path: Path) -> None:
    """Raise `InvalidArgument` before any work is done if a directory cannot be used or made there.
    None is made yet.
    """
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidArgument(f"{nearest} is no directory that could be written to")


def read_stream(path: Path) -> bytes:
    """The bytes of a stream; only the first of a file that begins otherwise: enough to say what is
    wrong.
    """
    from ..container.tables import MAGIC

    with path.open("rb") as file:
        start = file.read(4096)
        return start + file.read() if start.startswith(MAGIC) else start
