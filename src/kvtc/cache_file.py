"""A cache in a file: safetensors with keys, values and, if they are known, positions and token ids.

Any program can write one: only the tensors `keys` and `values` [L, H, T, D] are required. Without metadata its
layers are 0 .. L-1, and its heads begin at head 0.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import strict_json
from .cache import MAX_EXTENT, KVCache
from .errors import InvalidCache
from .files import write_atomically
from .process.torch_state import neutral_torch_state, plain

KNOWN_TENSORS = {"keys", "values", "positions", "token_ids"}
KNOWN_NUMBERS = {"first_kv_head": MAX_EXTENT, "rope_length": (1 << 31) - 1}
"""Of the metadata, and the largest that each may be."""


@neutral_torch_state
def save_cache(path: str | Path, cache: KVCache, token_ids: Tensor | None = None) -> None:
    """Write a cache to a file. A reader never sees half of the file.

    Parameters:
        path: the file; one that exists is replaced.
        cache: keys and values, with positions and the numbers of layers and heads.
        token_ids: [T] int32 or int64, the ids of its tokens. None (default): they are not stored.

    Raises:
        InvalidCache: `load_cache` would refuse the cache.
        OSError: the file cannot be written.

    Example:
        >>> from kvtc.cache_file import load_cache, save_cache
        >>> save_cache("cache.safetensors", codec.decode_neutral(stream), token_ids)
        >>> loaded, ids = load_cache("cache.safetensors")
        >>> loaded.n_tokens, torch.equal(ids, token_ids)
        (600, True)
    """
    _check(cache, token_ids, "the cache to save")
    tensors = {"keys": cache.keys, "values": cache.values}
    if cache.positions is not None:
        tensors["positions"] = cache.positions.to(torch.int64)
    if token_ids is not None:
        tensors["token_ids"] = token_ids.to(torch.int64)
    metadata = {
        "format": "kvtc cache",
        "layers": json.dumps(cache.resolved_layers()),
        "first_kv_head": str(cache.first_kv_head),
    }
    if cache.rope_length is not None:
        metadata["rope_length"] = str(cache.rope_length)
    # Tensors may share memory, which the format does not know: every one is written as its own copy.
    own = {
        name: plain(tensor, name).cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, safetensors.torch.save(own, metadata))


@neutral_torch_state
def load_cache(path: str | Path) -> tuple[KVCache, Tensor | None]:
    """Read a cache from a file.

    Parameters:
        path: the file, of `save_cache` or of any program that writes the tensors `keys` and `values` [L, H, T, D].

    Returns:
        (the cache, the ids [T] int64 of its tokens; None: the file has none).

    Raises:
        FileNotFoundError: there is no such file.
        InvalidCache: the file is damaged or holds no cache.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"keys": torch.zeros(12, 3, 9, 32), "values": torch.zeros(12, 3, 9, 32)}, "zeros.safetensors")
        >>> from kvtc.cache_file import load_cache
        >>> load_cache("zeros.safetensors")[0].n_tokens
        9
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no cache file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in KNOWN_TENSORS}  # noqa: SIM118
            found = sorted(file.keys())
        numbers = {
            name: strict_json.whole(strict_json.loads(metadata[name]), name, 0, most)
            for name, most in KNOWN_NUMBERS.items()
            if name in metadata
        }
        layers = _layers_of(strict_json.loads(metadata["layers"])) if "layers" in metadata else None
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InvalidCache(f"{path} is not a readable cache file: {type(error).__name__}: {error}") from error
    if not {"keys", "values"} <= tensors.keys():
        raise InvalidCache(f"{path} holds the tensors {', '.join(found[:8]) or 'none'}; expected keys and values")
    cache = KVCache(
        tensors["keys"],
        tensors["values"],
        tensors.get("positions"),
        layers,
        numbers.get("first_kv_head", 0),
        numbers.get("rope_length"),
    )
    token_ids = tensors.get("token_ids")
    _check(cache, token_ids, str(path))
    return cache, token_ids


def _layers_of(found: Any) -> tuple[int, ...]:
    """The layers that a file names; ValueError for what are none."""
    return tuple(strict_json.whole(layer, "layers", 0, MAX_EXTENT) for layer in strict_json.items(found, "layers"))


def _check(cache: KVCache, token_ids: Tensor | None, where: str) -> None:
    """Raise `InvalidCache` unless tensors fit each other and integers are integers."""
    layers = cache.resolved_layers()
    if cache.first_kv_head < 0 or any(after <= before for before, after in pairwise([-1, *layers])):
        raise InvalidCache(
            f"{where}: layers {layers} must ascend, and neither they nor head {cache.first_kv_head} may be negative"
        )
    try:
        cache.validate(is_finite=False)
    except InvalidCache as error:
        raise InvalidCache(f"{where}: {error}") from error
    if token_ids is not None and (
        token_ids.shape != (cache.n_tokens,) or token_ids.dtype not in (torch.int32, torch.int64)
    ):
        raise InvalidCache(
            f"{where}: token ids are {token_ids.dtype} {tuple(token_ids.shape)}; expected int64 ({cache.n_tokens},)"
        )
