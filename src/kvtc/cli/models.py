"""Models, tokenizers and calibrations that the command line names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, KvtcError
from ..process.progress import note
from .arguments import REFERENCE

if TYPE_CHECKING:
    from ..calibration import Calibration


def open_model(options: argparse.Namespace, n_tokens: int, what: str) -> tuple[Any, Any]:
    """Model and tokenizer that options name, once the model is known to read n_tokens tokens."""
    check_context(options.model, n_tokens, what)
    tokenizer = load_tokenizer(options.model)
    return load_model(options.model, options.device, getattr(options, "dtype", "auto")), tokenizer


def load_model(name: str, device: str, dtype: str = "auto") -> Any:
    """A causal language model on a device, in evaluation mode. dtype: "auto" is the precision of
    its weights.
    """
    from ..coding.device import usable_device

    usable_device(device)
    classes = quiet_transformers()
    note(f"loading {name}")  # transformers draws a bar of its own
    return _load(classes.AutoModelForCausalLM, name, dtype=dtype).to(device).eval()


def context_of(name: str) -> int | None:
    """Tokens that a model reads at most, from its config alone; None where that does not say."""
    from ..huggingface.rope_discovery import context_length

    return context_length(_load(quiet_transformers().AutoConfig, name))


def check_context(name: str, n_tokens: int, what: str) -> None:
    """Raise `InvalidArgument` before any work is done for more tokens than a model reads."""
    context = context_of(name)
    if context is not None and n_tokens > context:
        raise InvalidArgument(f"{what} {n_tokens:,} tokens; the context of {name} is {context:,}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model."""
    return _load(quiet_transformers().AutoTokenizer, name)


def find_calibration(options: argparse.Namespace) -> Calibration:
    """The calibration that `known_calibration` finds; without one, the usage is shown."""
    if (found := known_calibration(options)) is not None:
        return found
    return options.usage_error("--calibration is required (only the reference model has one that ships with kvtc)")  # type: ignore[no-any-return]


def known_calibration(options: argparse.Namespace) -> Calibration | None:
    """The calibration that --calibration names; with a model that has one of its own, this one."""
    from ..calibration import load_calibration
    from ..installed_models import INSTALLED_MODELS, places_of
    from ..reference import reference_calibration

    if options.calibration is not None:
        return load_calibration(options.calibration)
    if options.model in INSTALLED_MODELS and (path := places_of(options.model).calibration).is_file():
        return load_calibration(path)
    return reference_calibration() if options.model == REFERENCE else None


def _load(loader: Any, name: str, **settings: Any) -> Any:
    source = source_of(name)
    try:
        return loader.from_pretrained(source, **settings)
    except KvtcError:
        raise
    except Exception as error:  # foreign code reads foreign files: whatever it raises, they do not load
        raise InvalidArgument(f"cannot load {name}: {_first_line(error)}") from error


def source_of(name: str) -> str | Path:
    """What transformers loads a model from."""
    from ..installed_models import INSTALLED_MODELS, installed_model
    from ..reference import MODEL_DIRECTORY

    if name == REFERENCE:
        return MODEL_DIRECTORY
    return installed_model(name).directory if name in INSTALLED_MODELS else name


def quiet_transformers() -> Any:
    """The package transformers, which then logs no advice and draws progress bars only on a terminal."""
    from ..huggingface.rope_discovery import require_transformers

    transformers = require_transformers()
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
