"""The model that an engine serves: what the keys of entries say of it, and whether a calibration
was made for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration import Calibration
from ..coding.rope import NO_ROTATION, DynamicScaling, LongScaling, Rope, RopeTable
from ..errors import CalibrationMismatch
from ..huggingface.model_files import UnknownModel, config_of, files_identity, find_model
from ..key_digest import Part, digest, entry_scope
from ..process.log_limits import log_once
from .settings import PREFIX, EngineSettings

logger = logging.getLogger(__name__)

_SAME_FREQUENCY = 1e-4
"""Relative. Both sides compute the same formula in float32; another rotation differs by far
more."""


@dataclass(frozen=True)
class ServedModel:
    """The model of an engine.

    Parameters:
        weights: Identity of its files, or the name that the user gave the weights.
        identity: Of all that a cache depends on besides its tokens and what a request brings.
        scope: Of the entries of this model and namespace, for their keys.
        rope: Its rotation; None: not known.
        is_checked: Whether `checked` compares calibrations with it.
    """

    weights: str
    identity: str
    scope: bytes
    rope: Rope | None
    is_checked: bool

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        name: str | None,
        revision: str | None = None,
        *,
        is_told: bool = False,
        cache_dir: str | None = None,
        config: Any = None,
        overrides: Mapping[str, Any] | None = None,
        effective: Mapping[str, Part] | None = None,
    ) -> ServedModel:
        """The model of an engine with these settings.

        Parameters:
            settings: The options of kvtc, of which `model` and `identity` come before what the
                engine says.
            name: Of the model, as the engine was given it; None: the engine does not say.
            revision: Of the model on the hub; None: the engine does not say, or it is the default
                one.
            is_told: Whether the engine says its revision, as of `find_model`.
            cache_dir: Where the engine keeps models of the hub; None: in the hub's own folder.
            config: The transformers configuration in use; None: that of the files, with
                `overrides`.
            overrides: Fields of the configuration that the engine was given in place of the files'.
            effective: Other options of the engine on which caches depend, by name.

        Raises:
            UnknownModel: The files are not found, and the settings give no identity.
        """
        files = None
        if settings.identity is not None:
            weights = f"named:{settings.identity}"
        else:
            files = _files_of(settings.model or name, None if settings.model else revision, cache_dir, is_told)
            weights = files_identity(files)
        identity = digest("served model", weights=weights, overrides=overrides or {}, **(effective or {})).hex()
        rope = _rope(config, files, overrides or {}) if settings.check_model else None
        return cls(weights, identity, entry_scope(settings.namespace, identity), rope, settings.check_model)

    def checked(self, calibration: Calibration, name: str) -> Calibration:
        """The calibration, if it was made for this model as far as both say so.

        Parameters:
            calibration: Of any layers and heads of the model.
            name: Of the calibration, for messages.

        Raises:
            CalibrationMismatch: The calibration is of another model or another rotation.
        """
        if not self.is_checked:
            return calibration
        geometry, made_for = calibration.geometry, calibration.info.get("model_identity")
        override = (
            f"Calibrate the model that is served, or set {PREFIX}check_model to false if the calibration suits it"
        )
        if isinstance(made_for, str) and _scheme(made_for) == _scheme(self.weights) and made_for != self.weights:
            raise CalibrationMismatch(
                f"calibration {name} was made for the model {made_for}; the engine serves the model {self.weights}. {override}"
            )
        if self.rope is not None:
            rope = self.rope.of_layers(layer for layer in geometry.layers if layer < len(self.rope.layer_tables))
            differing = _differing_layer(geometry.rope, rope)
            if differing is not None:
                raise CalibrationMismatch(
                    f"calibration {name} rotates layer {geometry.layers[differing]} by "
                    f"{_described(geometry.rope, differing)}; the model that the engine serves rotates it by "
                    f"{_described(rope, differing)}. {override}"
                )
        return calibration


def refuse_dummy_weights(settings: EngineSettings, load_format: str) -> None:
    """Raise `UnknownModel` where an engine has made up its weights, and nobody has named them."""
    if settings.identity is None and load_format == "dummy":
        raise UnknownModel(
            f"load_format is dummy, so the weights are in no file: give {PREFIX}identity, a name for them"
        )


def _files_of(name: str | None, revision: str | None, cache_dir: str | None, is_told: bool) -> Path:
    if name is None:
        raise UnknownModel(
            f"the engine does not tell which model it serves: its configuration must give {PREFIX}model, the model's path or "
            f"name as the engine was given it, or {PREFIX}identity, a name for its weights"
        )
    try:
        files = find_model(name, revision, cache_dir=cache_dir, is_told=is_told)
        files_identity(files)
    except UnknownModel as error:
        raise UnknownModel(
            f"the weights of {name} are not found, and caches of other weights must not be taken for theirs: {error}. Give "
            f"{PREFIX}model, a path or name@revision on this machine, or {PREFIX}identity, a name for these weights"
        ) from error
    return files


def _scheme(identity: str) -> str:
    return identity.partition(":")[0]


def _rope(config: Any, files: Path | None, overrides: Mapping[str, Any]) -> Rope | None:
    """The rotation of a configuration, or of the files' with overrides; None, logged, where it
    cannot be found out."""
    if config is None and (files is None or not files.is_dir() or "model_type" not in config_of(files)):
        return None
    try:
        from transformers import AutoConfig

        from ..huggingface.rope_discovery import rope_from_config

        return rope_from_config(config or AutoConfig.from_pretrained(files, local_files_only=True, **overrides))
    except Exception as error:  # noqa: BLE001  models of transformers fail in many ways, and engines serve others too
        log_once(
            logger, "rotation", "the model's rotation is not known and not compared with the calibration's: %s", error
        )
        return None


def _differing_layer(first: Rope, second: Rope) -> int | None:
    """The first layer that is rotated otherwise."""
    for layer in range(max(len(first.layer_tables), len(second.layer_tables))):
        tables = [_table(rope, layer) for rope in (first, second)]
        if not _same_table(*tables):
            return layer
    return None


def _table(rope: Rope, layer: int) -> RopeTable | None:
    index = rope.layer_tables[layer] if layer < len(rope.layer_tables) else NO_ROTATION
    return None if index == NO_ROTATION else rope.tables[index]


def _same_table(first: RopeTable | None, second: RopeTable | None) -> bool:
    if first is None or second is None:
        return first is second
    if first.interleaved != second.interleaved or type(first.scaling) is not type(second.scaling):
        return False
    return _close(_numbers(first), _numbers(second))


def _numbers(table: RopeTable) -> list[float]:
    numbers = [*table.inverse_frequencies, table.attention_scaling]
    if isinstance(table.scaling, DynamicScaling):
        return [*numbers, table.scaling.base, table.scaling.factor, table.scaling.max_length]
    if isinstance(table.scaling, LongScaling):
        return [*numbers, *table.scaling.inverse_frequencies, table.scaling.original_length]
    return numbers


def _close(first: list[float], second: list[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=_SAME_FREQUENCY) for a, b in zip(first, second, strict=True)
    )


def _described(rope: Rope, layer: int) -> str:
    table = _table(rope, layer)
    if table is None:
        return "nothing"
    lowest = min(table.inverse_frequencies)
    return (
        f"{table.rotated_dim} features with frequencies down to {lowest:.4g}, scaled by {table.attention_scaling:.4g}"
    )
