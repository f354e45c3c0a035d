"""Which model an engine's caches are of: what the keys of entries say of it, and whether a calibration was made for it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..coding.rope import NO_ROTATION, DynamicScaling, LongScaling, Rope, RopeTable
from ..errors import CalibrationMismatch
from ..key_digest import Part, digest, entry_scope
from ..torch_state import neutral_torch_state, plain
from .engine_settings import PREFIX, EngineSettings
from .model_files import UnknownModel, config_of, files_identity, find_model, loaded_files, without_effect

logger = logging.getLogger(__name__)

_SAME_FREQUENCY = 1e-4
"""Relative. Both sides compute the same formula in float32; another rotation differs by far more."""
_HARMLESS_HOOKS = ("transformers.utils.output_capturing",)
"""Modules whose forward hooks only read; transformers leaves those on a model that was once asked for its hidden states."""
_CHANGING = frozenset({"training", "max_seq_len_cached", "gradient_checkpointing"})
"""Attributes of modules that change while a model is used, without effect on the caches of one in evaluation mode."""
_MODEL_CODE = "transformers_modules."
"""Where transformers imports a model's own code: the rest of the name is of a folder."""
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter")
"""Where the layers of PEFT keep which adapter computes."""


def model_identity(model: Any) -> str:
    """The identity of a model: of its files, or of its parameters where they are in no file.

    model: a folder, a GGUF file, a name of the Hugging Face hub (`name@revision`) whose files are on this machine, or a live
    transformers model. A live one has the identity of its files if every byte of its parameters, its configuration and its modules
    are as loaded from them; otherwise the identity of its parameters, buffers, configuration and modules.
    Returns "files:" or "parameters:" and 32 hexadecimal digits; one of each kind cannot be compared.

    Raises `kvtc.errors.InvalidArgument` where there are no files, no parameters in memory, or a forward hook, which may change
    what is computed.
    """
    if not isinstance(model, nn.Module):
        return files_identity(find_model(str(model)))
    return _files_of(model, is_cast=False) or _parameters_identity(model)


def calibrated_identity(model: nn.Module) -> str:
    """As `model_identity`, for calibrations: parameters that were only cast, such as to float32, are still those of the files."""
    return _files_of(model, is_cast=True) or _parameters_identity(model)


@dataclass(frozen=True)
class ServedModel:
    """The model of an engine.

    weights: identity of its files, or the name that the user gave them. identity: of all that its caches depend on besides token
    ids and what a request brings. scope: for keys of entries. rope: its rotation, None where that is not known. is_checked:
    whether calibrations are held against it.
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
        """name, revision: as the engine tells them; None: it does not. is_told, cache_dir: as of `find_model`.

        config: the transformers configuration in use, None where it is that of the files with these overrides. effective: what
        the engine was told on top of the files, as far as caches depend on it.

        Raises `UnknownModel` where the files are not found and `kvtc.identity` is not given.
        """
        place = None
        if settings.identity is not None:
            weights = f"named:{settings.identity}"
        else:
            place = _place(settings.model or name, None if settings.model else revision, cache_dir, is_told)
            weights = files_identity(place)
        identity = digest("served model", weights=weights, overrides=overrides or {}, **(effective or {})).hex()
        rope = _rope(config, place, overrides or {}) if settings.check_model else None
        return cls(weights, identity, entry_scope(settings.namespace, identity), rope, settings.check_model)

    def checked(self, calibration: Calibration, name: str) -> Calibration:
        """The calibration, if it was made for this model, as far as both say; `CalibrationMismatch` otherwise."""
        if not self.is_checked:
            return calibration
        geometry, made_for = calibration.geometry, calibration.info.get("model_identity")
        override = (
            f"Calibrate the model that is served, or set {PREFIX}check_model to false if the calibration suits it"
        )
        if isinstance(made_for, str) and _kind(made_for) == _kind(self.weights) and made_for != self.weights:
            raise CalibrationMismatch(
                f"calibration {name} was made for the model {made_for}; the engine serves the model {self.weights}. {override}"
            )
        if self.rope is not None:
            rope = self.rope.slice_layers(geometry.first_layer, geometry.first_layer + geometry.n_layers)
            differing = _differing_layer(geometry.rope, rope)
            if differing is not None:
                raise CalibrationMismatch(
                    f"calibration {name} rotates layer {geometry.first_layer + differing} by "
                    f"{_described(geometry.rope, differing)}; the model that the engine serves rotates it by "
                    f"{_described(rope, differing)}. {override}"
                )
        return calibration


def _place(name: str | None, revision: str | None, cache_dir: str | None, is_told: bool) -> Path:
    if name is None:
        raise UnknownModel(
            f"the engine does not tell which model it serves: its configuration must give {PREFIX}model, the model's path or "
            f"name as the engine was given it, or {PREFIX}identity, a name for its weights"
        )
    try:
        place = find_model(name, revision, cache_dir=cache_dir, is_told=is_told)
        files_identity(place)
    except UnknownModel as error:
        raise UnknownModel(
            f"the weights of {name} are not found, and caches of other weights must not be taken for theirs: {error}. Give "
            f"{PREFIX}model, a path or name@revision on this machine, or {PREFIX}identity, a name for these weights"
        ) from error
    return place


def _kind(identity: str) -> str:
    return identity.partition(":")[0]


def _files_of(model: nn.Module, *, is_cast: bool) -> str | None:
    """The identity of the files that a live model computes as; None where it does not, or there are none.

    is_cast: whether parameters of another dtype may be those of the files.
    """
    _refuse_hooks(model)
    config = getattr(model, "config", None)
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not name:
        return None
    try:
        place = find_model(str(name), revision)
        if _is_built_as(model, place) and _holds(model, loaded_files(place), is_cast):
            return files_identity(place)
    except UnknownModel as error:
        logger.debug("the files of %s do not name the model, its parameters do: %s", name, error)
    return None


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if getattr(hook, "__module__", None) not in _HARMLESS_HOOKS:
                raise UnknownModel(
                    f"module {path or type(module).__name__} has a forward hook, {getattr(hook, '__qualname__', hook)}, which "
                    "may change the caches: expected a model without hooks; remove it, or give the identity a text of your own"
                )


def _is_built_as(model: nn.Module, place: Path) -> bool:
    """Whether configuration and modules of a live model are those that its class makes of the configuration in a folder."""
    if not (place / "config.json").is_file():
        return False
    try:
        config = type(model.config).from_pretrained(place, local_files_only=True)  # type: ignore[union-attr]
        if _config_parts(model.config, without_dtypes=True) != _config_parts(config, without_dtypes=True):
            return False
        with torch.device("meta"):
            return _structure(type(model)(config)) == _structure(model)
    except Exception as error:  # noqa: BLE001  models of transformers fail in many ways where they are built without files
        logger.debug("a %s cannot be built from its configuration: %s", type(model).__name__, error)
        return False


@neutral_torch_state
def _holds(model: nn.Module, files: list[Path], is_cast: bool) -> bool:
    """Whether the parameters are what stands in safetensors files: the same names, shapes and bytes.

    A parameter that is in no file must be tied to one that is.
    """
    if not all(path.suffix == ".safetensors" for path in files):
        return False
    state: dict[str, Any] = model.state_dict()
    named: set[str] = set()
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name not in state or not _is_same(state[name], name, file.get_tensor(name), is_cast):
                        return False
                    named.add(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UnknownModel(f"{path} cannot be read: {error}") from error
    places = {_storage(plain(state[name], name, UnknownModel)) for name in named}
    return all(_storage(plain(state[name], name, UnknownModel)) in places for name in state.keys() - named)


def _is_same(live: Any, name: str, stored: Tensor, is_cast: bool) -> bool:
    live = plain(live, f"parameter {name}", UnknownModel)
    if live.shape != stored.shape or not (is_cast or live.dtype == stored.dtype):
        return False
    return torch.equal(_bytes(live), _bytes(stored.to(live.dtype)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _parameters_identity(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    found = digest(
        "model parameters",
        config=None if config is None else _config_parts(config),
        modules=_structure(model),
        tensors=_tensor_parts(model),
    )
    return f"parameters:{found.hex()[:32]}"


@neutral_torch_state
def _tensor_parts(model: nn.Module) -> list[Part]:
    parts: list[Part] = []
    for name, tensor in sorted(model.state_dict().items()):
        data = _bytes(plain(tensor, f"parameter {name}", UnknownModel)).numpy()
        parts.append([name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data.data).digest()])
    return parts


def _config_parts(config: Any, *, without_dtypes: bool = False) -> Any:
    dtypes = ("dtype", "torch_dtype") if without_dtypes else ()
    return without_effect(json.loads(config.to_json_string(use_diff=False)), dtypes)


def _structure(model: nn.Module) -> list[Part]:
    """Of each module its path, class, the numbers it is set to, and its forward where it is not that of its class."""
    parts: list[Part] = []
    for path, module in model.named_modules():
        kind, forward = type(module), vars(module).get("forward")
        replaced = None if forward is None or hasattr(module, "_hf_hook") else getattr(forward, "__qualname__", "other")
        library = "" if kind.__module__.startswith(_MODEL_CODE) else kind.__module__
        parts.append([path, library, kind.__qualname__, replaced, dict(_set_to(module))])
    return parts


def _set_to(module: nn.Module) -> Iterator[tuple[str, Part]]:
    for name, value in vars(module).items():
        is_public = not name.startswith("_") and name not in _CHANGING
        if name in _ADAPTER_STATE or (is_public and _is_numeric(value)):
            yield name, repr(value)


def _is_numeric(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(map(_is_numeric, value.values()))
    return isinstance(value, bool | int | float)


def _rope(config: Any, place: Path | None, overrides: Mapping[str, Any]) -> Rope | None:
    """The rotation of a configuration, or of the files' with overrides; None, logged, where it cannot be found out."""
    if config is None and (place is None or not place.is_dir() or "model_type" not in config_of(place)):
        return None
    try:
        from transformers import AutoConfig

        from .rope_discovery import rope_from_config

        return rope_from_config(config or AutoConfig.from_pretrained(place, local_files_only=True, **overrides))
    except Exception as error:  # noqa: BLE001  models of transformers fail in many ways, and engines serve others too
        logger.warning("kvtc: the model's rotation is not known and not compared with the calibration's: %s", error)
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
