"""Models that are measured but do not ship with kvtc: where `make bench-models` puts them, and
whether they are there.

    <models directory>/smollm2-135m/                         the model, as transformers reads it
    <models directory>/smollm2-135m.calibration.safetensors  its calibration, once there is one

The models directory is `~/.cache/kvtc/models` (`XDG_CACHE_HOME` is heeded). The environment variable
`KVTC_MODELS` names another one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidArgument

VARIABLE = "KVTC_MODELS"
SMOLLM2 = "smollm2-135m"
GEMMA3 = "gemma3-270m"
INSTALLED_MODELS = (SMOLLM2, GEMMA3)
HOW = "`make bench-models` in a checkout of kvtc installs it"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class InstalledModel:
    """Paths of a model that is installed; `calibration` may not exist yet.

    Parameters:
        name: one of `INSTALLED_MODELS`.
        directory: a folder that transformers loads.
        calibration: the calibration file of the model, beside its folder.
    """

    name: str
    directory: Path
    calibration: Path


def models_directory() -> Path:
    """The directory that models are installed in; it may not exist yet."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvtc" / "models"


def places_of(name: str) -> InstalledModel:
    """Where a model is, or will be once it is installed."""
    directory = models_directory() / name
    return InstalledModel(name, directory, directory.with_name(f"{name}.calibration.safetensors"))


def installed_model(name: str) -> InstalledModel:
    """A model that is installed.

    Parameters:
        name: one of `INSTALLED_MODELS`.

    Raises:
        InvalidArgument: if it is not installed; the message says how to install it.
    """
    model = places_of(name)
    missing = [file for file in _FILES if not (model.directory / file).is_file()]
    if missing:
        raise InvalidArgument(f"{name} is not installed: expected {missing[0]} in {model.directory}; {HOW}")
    return model
