"""The identity of a model: a digest of its files, or of its parameters where they are in no file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..key_digest import Part, digest
from ..process.torch_state import neutral_torch_state, plain
from .model_files import UnknownModel, files_identity, find_model, loaded_files, without_effect

logger = logging.getLogger(__name__)

_HARMLESS_HOOKS = ("transformers.utils.output_capturing",)
"""Modules whose forward hooks only read; transformers leaves those on a model that was once asked for its hidden states."""
_CHANGING = frozenset({"training", "max_seq_len_cached", "gradient_checkpointing"})
"""Attributes of modules that change while a model is used, without effect on the caches of one in evaluation mode."""
_MODEL_CODE = "transformers_modules."
"""Where transformers imports a model's own code: the rest of the name is of a folder."""
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter")
"""Where the layers of PEFT keep which adapter computes."""


def model_identity(model: Any) -> str:
    """The identity of a model: a digest of its files, or of its parameters if they are in no file.

    Parameters:
        model: a folder, a GGUF file, a name of the Hugging Face hub (`name@revision`) whose files are on this
            machine, or a live transformers model. A live one has the identity of its files if every byte of its
            parameters, its configuration and its modules are as loaded from them; otherwise that of its parameters,
            buffers, configuration and modules.

    Returns:
        "files:" or "parameters:" and 32 hexadecimal digits. An identity of files cannot be compared with one of
        parameters.

    Raises:
        InvalidArgument: there are no files, no parameters in memory, or there is a forward hook, which may change
            what is computed.

    Example:
        >>> kvtc.model_identity(model) == kvtc.model_identity(model.name_or_path)
        True
    """
    if not isinstance(model, nn.Module):
        return files_identity(find_model(str(model)))
    return _files_of(model, is_cast=False) or _parameters_identity(model)


def calibrated_identity(model: nn.Module) -> str:
    """As `model_identity`, for calibrations: parameters that were only cast, such as to float32, are still those of the files."""
    return _files_of(model, is_cast=True) or _parameters_identity(model)


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
