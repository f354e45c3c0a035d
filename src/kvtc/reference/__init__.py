"""The reference model that ships with kvtc: small, real, trained by this project; see its card
beside the weights.

Every figure of the documentation is measured on it, and the demo and the tests run on it without
downloading anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration import Calibration, load_calibration
from ..errors import MissingDependency

MODEL_NAME = "kvtc-6m"
MODEL_DIRECTORY = Path(__file__).parent / MODEL_NAME
CALIBRATION_FILE = Path(__file__).parent / f"{MODEL_NAME}.calibration.safetensors"
"""Beside the model's directory: engines take every safetensors file inside of it for weights."""


def load_model(directory: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """A model of transformers in a folder of this machine, in evaluation mode, and its tokenizer.

    Parameters:
        directory: the folder.
        dtype: dtype of the weights, as in `reference_model`.

    Returns:
        (a transformers causal LM, its tokenizer).

    Raises:
        MissingDependency: if transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependency('the reference model needs transformers; pip install "kvtc[hf]"') from error
    # The weights load in a blink: a progress bar would only be noise on the caller's terminal.
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def reference_model(dtype: str = "float32") -> tuple[Any, Any]:
    """The reference model, kvtc-6m, in evaluation mode, and its tokenizer. Nothing is downloaded.

    Parameters:
        dtype: dtype of the weights: "float32" (default) for exact comparisons, "bfloat16" for caches of 16 bits a
            number, as they are served.

    Returns:
        (a transformers causal LM, its tokenizer).

    Raises:
        MissingDependency: transformers is not installed.

    Example:
        >>> model, tokenizer = kvtc.reference_model("bfloat16")
        >>> model.config.num_hidden_layers, model.dtype
        (12, torch.bfloat16)
    """
    return load_model(MODEL_DIRECTORY, dtype)


def reference_calibration() -> Calibration:
    """The calibration of the reference model, made from its training text only.

    >>> kvtc.reference_calibration().profiles
    ('paper', 'joint', 'conditional')
    """
    return load_calibration(CALIBRATION_FILE)
