"""Which groups the cache of a model has, and what kvtc does with each: told from a config, with no weights.

A model of the architecture is made without memory for its numbers, and reads a few tokens. Its cache then has the layers, shapes
and dtypes of a real one, and is taken apart as the codec takes caches apart: what is said here is what the codec does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as torch_config
from torch.overrides import TorchFunctionMode

from ..cache import CacheGeometry
from ..codec.transformers_cache import TransformersCache
from ..coding.rope import Rope
from ..container.groups import SIDE_BUFFER, WINDOW, Group
from ..errors import KvtcError, UnsupportedModel
from ..process.torch_state import model_torch_state, torch_functions
from .continuation import CACHES
from .models import geometry_of, layer_types
from .rope_discovery import require_transformers, rotation_of, skeleton_of, text_config

_TOKENS = 6


@dataclass(frozen=True)
class GroupSupport:
    """One group of layers of a model's cache.

    Parameters:
        kind: the kind of layer, in words.
        part: what of each layer the group holds, in words.
        layers: numbers of its layers in the model.
        shape: heads, features of a key and of a value; of a state its axes, 0 where it has fewer.
        token_bytes: bytes for each token that is read, all its layers together.
        constant_bytes: bytes that it takes at most, however many tokens are read: of windows and states.
        is_coded: whether a calibrated codec codes it; otherwise it is kept bit for bit, or rounded (recurrent states).

    Example:
        >>> (group,) = kvtc.supported(model).groups
        >>> group.kind, group.shape, group.token_bytes, group.is_coded
        ('full attention', (3, 32, 32), 4608.0, True)
    """

    kind: str
    part: str
    layers: tuple[int, ...]
    shape: tuple[int, int, int]
    token_bytes: float
    constant_bytes: int
    is_coded: bool


@dataclass(frozen=True)
class Support:
    """What kvtc does with the cache of a model.

    Parameters:
        model_type: of the config of the text decoder.
        groups: of its cache; none where something stops it.
        stopped_by: the layer or the reason why its cache cannot be coded at all; None: it can be, bit for bit at
            least.
        not_coded: why no group is coded at a rate below lossless; None: one is.
        not_turned: why it is not known how keys are rotated, so that they are coded as they are cached, which costs bytes; None:
            it is known, or no group is coded.

    Example:
        >>> support = kvtc.supported(model.config)
        >>> support.is_supported, support.token_bytes, support.constant_bytes
        (True, 4608.0, 0)
    """

    model_type: str
    groups: tuple[GroupSupport, ...]
    stopped_by: str | None
    not_coded: str | None
    not_turned: str | None = None

    @property
    def is_supported(self) -> bool:
        """Whether kvtc takes the cache of this model."""
        return self.stopped_by is None

    @property
    def token_bytes(self) -> float:
        """Bytes of each token, all groups together."""
        return sum(group.token_bytes for group in self.groups)

    @property
    def constant_bytes(self) -> int:
        """Bytes of windows and states, all groups together."""
        return sum(group.constant_bytes for group in self.groups)


def supported(model_or_config: Any) -> Support:
    """What kvtc does with the cache of a model. The weights are not needed.

    Parameters:
        model_or_config: a transformers config, or a model.

    Returns:
        Its groups, or what stops it. Bytes are those of a cache in bfloat16, but for parts that the model keeps in
        another dtype.

    Raises:
        InvalidArgument: this is no config or model.
        MissingDependency: transformers is not installed.

    Example:
        >>> from transformers import GPT2Config
        >>> found = kvtc.supported(GPT2Config())
        >>> found.is_supported, found.groups[0].layers == tuple(range(12))
        (True, True)
    """
    require_transformers()
    config = text_config(model_or_config)
    try:
        groups = TransformersCache(cache_without_weights(model_or_config)).groups
    except KvtcError as error:
        return Support(config.model_type, (), " ".join(str(error).split()), None)
    config_of = getattr(model_or_config, "config", model_or_config)
    coded, reason = _coded(config_of)
    if coded is not None and not any(_is_coded(group, coded) for group in groups):
        reason = f"its layers are of several shapes; expected {coded.describe()}"
        coded = None
    rope, unknown = rotation_of(config_of)
    # Beside full attention that cannot be coded nothing is.
    is_covered = coded is not None or not any(group.is_codable for group in groups)
    windows = {geometry.layers for geometry in _windows_of(groups, rope)} if is_covered else set()
    needs = tuple(
        _group_support(
            group,
            coded is not None and _is_coded(group, coded)
            if group.is_codable
            else group.kind == WINDOW and group.layers in windows,
        )
        for group in groups
    )
    if windows:
        reason = None
    not_turned = unknown if any(need.is_coded for need in needs) else None
    return Support(config.model_type, needs, None, reason, not_turned)


def covered_geometries(model: Any) -> list[CacheGeometry]:
    """The groups that a calibration of a whole model covers: full attention, and sliding windows.

    Parameters:
        model: a transformers model or config.

    Returns:
        Those of full attention first, if there are any.

    Raises:
        UnsupportedModel: neither can be coded.
    """
    types = layer_types(model)
    if all(its == "full_attention" for its in types):
        return [geometry_of(model)]
    groups = TransformersCache(cache_without_weights(model)).groups
    windows = _windows_of(groups, rotation_of(model)[0])
    has_full = any(group.is_codable for group in groups)
    return [geometry_of(model), *windows] if has_full or not windows else windows


def _windows_of(groups: Sequence[Group], rope: Rope) -> list[CacheGeometry]:
    """The windows among some groups that can be coded: those whose rotation is the same at any length."""
    found = []
    for group in groups:
        if group.can_be_further and group.extent > 1:
            its_rope = rope.of_layers(group.layers)
            if not its_rope.depends_on_length:
                found.append(CacheGeometry(group.layers, 0, *group.shape, its_rope, is_window=True))
    return found


def cache_without_weights(model_or_config: Any) -> Any:
    """The cache of a model after a few tokens, all on the device meta.

    Raises `UnsupportedModel` where transformers cannot build the model, or it does not run so, or keeps no cache.
    """
    config = text_config(model_or_config)
    try:
        model = skeleton_of(getattr(model_or_config, "config", model_or_config))
        if config.is_encoder_decoder:
            raise UnsupportedModel(f"{config.model_type} has an encoder; expected a decoder alone")
        model = model if type(model.config) is type(config) else model.get_decoder()
        with model_torch_state(), torch_functions(), torch.device("meta"), _without_experts(model), _numbers_as_ones():
            output = model(torch.zeros(1, _TOKENS, dtype=torch.int64), use_cache=True)
    except KvtcError:
        raise
    except Exception as error:  # whatever foreign code raises
        reason = str(error).split("\n", 1)[0][:160]
        raise UnsupportedModel(
            f"{config.model_type} cannot be tried without weights: {type(error).__name__}: {reason}"
        ) from error
    found = [getattr(output, name, None) for name in CACHES]
    cache = next((cache for cache in found if cache is not None), None)
    if not hasattr(cache, "layers"):
        raise UnsupportedModel(
            f"{config.model_type} keeps its cache as {type(cache).__name__}; expected a cache with layers"
        )
    return cache


@contextmanager
def _numbers_as_ones() -> Iterator[None]:
    with torch_config.patch(meta_nonzero_assume_all_nonzero=True), _Ones():  # type: ignore[attr-defined]
        yield


class _Ones(TorchFunctionMode):
    """Where code looks at numbers that are not there, it finds ones, and conditions hold: a shape or a loop may depend on them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta and getattr(function, "__name__", "") in _LOOKS:
            args = (torch.ones(first.shape, dtype=first.dtype, device="cpu"), *args[1:])
        return function(*args, **(kwargs or {}))


_LOOKS = frozenset({"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__index__"})


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """Experts give zeros: which of them are asked depends on numbers, and there are none."""
    experts = [module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == "experts"]
    for module in experts:
        module.forward = _zeros
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _zeros(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden)


def _is_coded(group: Group, geometry: CacheGeometry) -> bool:
    return group.is_codable and (group.layers, group.shape) == (geometry.layers, (geometry.n_kv_heads, *geometry.dims))


def _coded(config: Any) -> tuple[CacheGeometry | None, str | None]:
    """What a calibration would cover; or None, and why it covers nothing."""
    try:
        return geometry_of(config), None
    except KvtcError as error:
        return None, " ".join(str(error).split())


def _group_support(group: Group, is_coded: bool) -> GroupSupport:
    per_token, constant = float(group.row_bytes), 0
    if group.kind == WINDOW:
        per_token, constant = 0.0, group.row_bytes * (group.extent - 1)
    elif group.part.is_snapshot:
        rows = int(group.rows_between(0, max(1, group.extent - 1)))
        per_token, constant = 0.0, group.row_bytes * rows
    elif group.kind == SIDE_BUFFER:
        per_token /= group.extent
    part = group.part.name.lower().replace("_", " ")
    return GroupSupport(group.kind, part, group.layers, group.shape, per_token, constant, is_coded)
