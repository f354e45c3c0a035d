"""What several subcommands share: option types, refusing to overwrite, and models and texts that are named on the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, KvtcError, MissingDependency
from ..process.progress import note, task

if TYPE_CHECKING:
    from ..calibration import Calibration, KindCalibration

Outcome = tuple[dict[str, Any], str]
REFERENCE = "reference"
MODEL_HELP = "directory or hub name of a transformers model; 'reference' is the one that ships with kvtc"


def add_subcommand(
    subcommands: Any, common: argparse.ArgumentParser, name: str, run: Any, summary: str, details: str = ""
) -> Any:
    """A subcommand with the options of all subcommands; `run` gets the parsed options and returns an `Outcome`."""
    parser = subcommands.add_parser(
        name,
        parents=[common],
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def add_output(parser: Any, what: str, required: bool = True) -> None:
    """-o and --force."""
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


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


def check_output(path: Path, force: bool, suffix: str = "") -> None:
    """Raise `InvalidArgument` before any work is done if the output cannot be written there, or has another suffix."""
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


def check_directory(path: Path) -> None:
    """Raise `InvalidArgument` before any work is done if a directory cannot be used or made there. None is made yet."""
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidArgument(f"{nearest} is no directory that could be written to")


def check_device(name: str) -> None:
    """Raise `InvalidArgument` unless tensors can be put on a device."""
    import torch

    try:
        torch.zeros(1, dtype=torch.float32, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InvalidArgument(f"the device {name} cannot be used: {_first_line(error)}") from error


def load_model(name: str, device: str, dtype: str = "auto") -> Any:
    """A causal language model on a device, in evaluation mode. dtype: "auto" is the precision of its weights."""
    check_device(device)
    classes = _transformers()
    note(f"loading {name}")  # transformers draws a bar of its own
    return _load(classes.AutoModelForCausalLM, name, dtype=dtype).to(device).eval()


def context_of(name: str) -> int | None:
    """Tokens that a model reads at most, from its config alone; None where that does not say."""
    from ..huggingface.rope_discovery import context_length

    return context_length(_load(_transformers().AutoConfig, name))


def check_context(name: str, n_tokens: int, what: str) -> None:
    """Raise `InvalidArgument` before any work is done for more tokens than a model reads."""
    context = context_of(name)
    if context is not None and n_tokens > context:
        raise InvalidArgument(f"{what} {n_tokens:,} tokens; the context of {name} is {context:,}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model."""
    return _load(_transformers().AutoTokenizer, name)


def token_ids_of(path: Path, tokenizer: Any) -> Any:
    """A text file as one sequence: ids [T] int64, the tokenizer's first token (bos) included if it has one."""
    import torch

    text = read_text(path)
    with task(f"reading {path}: {len(text):,} characters"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise InvalidArgument(f"{path} holds no text")
    return torch.tensor([*beginning(tokenizer), *ids])


def beginning(tokenizer: Any) -> list[int]:
    """What every sequence begins with: the bos token, or nothing."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def read_stream(path: Path) -> bytes:
    """The bytes of a stream; only the first of a file that begins otherwise: enough to say what is wrong."""
    from ..container import MAGIC

    with path.open("rb") as file:
        start = file.read(4096)
        return start + file.read() if start.startswith(MAGIC) else start


def read_text(path: Path) -> str:
    """A whole text file."""
    return "".join(read_lines(path))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, as they are needed; `InvalidArgument` where it is not UTF-8."""
    with path.open(encoding="utf-8") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def find_calibration(options: argparse.Namespace) -> Calibration:
    """The calibration that --calibration names; with the reference model, the one that ships with it."""
    from ..calibration import load_calibration
    from ..reference import reference_calibration

    if options.calibration is not None:
        return load_calibration(options.calibration)
    if options.model != REFERENCE:
        options.usage_error("--calibration is required (only the reference model has one that ships with kvtc)")
    return reference_calibration()


def describe_basis(kind: KindCalibration) -> str:
    """Size and worth of a basis."""
    return f"{kind.basis.rank:,} coefficients explain {kind.explained_variance:.2%} of the variance"


def joint_fields(calibration: Calibration) -> list[tuple[str, object]]:
    """What a calibration has for the profiles `joint` and `conditional`, in words."""
    from ..report.table import format_bytes

    joint = calibration.joint
    if joint is None:
        return [("joint basis", "none: this calibration serves the profile paper alone")]
    fields: list[tuple[str, object]] = [
        ("joint rank", f"{joint.basis.rank:,} coefficients of keys and values together")
    ]
    fields += [(f"joint {name}", f"{n:,} numbers, {format_bytes(size)}") for name, (n, size) in joint.parts.items()]
    if joint.tokens is not None:
        for name, shares in zip(("keys", "values"), joint.tokens.explained.T.tolist(), strict=True):
            by_layer = " ".join(f"{share:.2f}" for share in shares)
            fields.append((f"predicted {name}", f"share of variance by layer: {by_layer}"))
    return fields


def quality_of(calibration: Calibration) -> dict[str, list[dict[str, float]]]:
    """The measured quality of each profile: step and KL, for JSON."""
    return {
        profile: [{"step": step, "kl": kl} for step, kl in zip(curve.steps.tolist(), curve.kl.tolist(), strict=True)]
        for profile, curve in calibration.quality.items()
    }


def quality_fields(calibration: Calibration) -> list[tuple[str, object]]:
    """The same in words."""
    return [
        (
            f"KL of {profile}",
            f"{curve.kl[0]:.2g} to {curve.kl[-1]:.2g} nats at steps of {curve.steps[0]:.3g} to {curve.steps[-1]:.3g}",
        )
        for profile, curve in calibration.quality.items()
    ] or [("KL", "not measured: kvtc measure adds it")]


def _load(loader: Any, name: str, **settings: Any) -> Any:
    from ..reference import MODEL_DIRECTORY

    try:
        return loader.from_pretrained(MODEL_DIRECTORY if name == REFERENCE else name, **settings)
    except KvtcError:
        raise
    except Exception as error:  # foreign code reads foreign files: whatever it raises, they do not load
        raise InvalidArgument(f"cannot load {name}: {_first_line(error)}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency('models and tokenizers need transformers; pip install "kvtc[hf]"') from error
    quiet_transformers()
    return transformers


def quiet_transformers() -> None:
    """No advice in the log, and progress bars only on a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
