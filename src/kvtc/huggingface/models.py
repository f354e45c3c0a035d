"""transformers models: which are supported, their geometry, and their caches as neutral caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import CacheGeometry, KVCache, describe_widths, sides_of_layer
from ..cache import is_latent as looks_like_latent
from ..errors import GeometryMismatch, InvalidArgument, UnsupportedModel
from ..process.progress import task
from ..process.torch_state import evaluation_mode, model_torch_state, neutral_torch_state
from .rope_discovery import (
    halves,
    refuse_several_shapes,
    remembered_length,
    require_transformers,
    rotated_dim,
    rotation_of,
    text_config,
)
from .window_rows import WindowRows

# Modules whose output is the key before rotation, or a projection that contains it.
_KEY_NORMS = frozenset({"k_norm", "k_layernorm", "key_layernorm", "k_layer_norm", "k_rope_only_layernorm"})
_KEY_PROJECTIONS = frozenset(
    {"k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "kv_proj", "kv_a_proj_with_mqa"}
)


FULL_TYPES = frozenset({"full_attention", "hybrid", "indexed_attention", "minimax_m3_sparse"})
"""Types of layers, as transformers names them, that keep the keys and values of every token."""


def coded_layers(model_or_config: Any) -> tuple[int, ...]:
    """The layers of a model whose cache kvtc codes: those of full attention, which keep keys and values of every token.

    Raises:
        UnsupportedModel: for a model that has none, or whose keys and values there are not of one shape.
        InvalidArgument: for what is no config or model.
        MissingDependency: without transformers.
    """
    types = layer_types(model_or_config)
    config = text_config(model_or_config)
    found = tuple(layer for layer, its in enumerate(types) if its in FULL_TYPES)
    if not found:
        raise UnsupportedModel(
            f"no layer of {config.model_type} keeps keys and values of every token; layer 0 is a {types[0]} layer"
        )
    refuse_several_shapes(config, found)
    return found


def layer_types(model_or_config: Any) -> list[str]:
    """What kind of cache each layer of a model keeps, as transformers names it."""
    require_transformers()
    from transformers.cache_utils import get_layer_types_and_kwargs

    config = text_config(model_or_config)
    if getattr(config, "num_hidden_layers", None) is None:
        raise UnsupportedModel(f"{config.model_type} has no num_hidden_layers; expected one stack of decoder layers")
    return list(get_layer_types_and_kwargs(config)[0])


def keeps_every_token(model_or_config: Any) -> bool:
    """Whether every layer of a model is one of full attention, so that keys and values of the coded layers are its whole cache.

    Parameters:
        model_or_config: a transformers config or model. A sliding window is none even if it spans the whole context.

    Raises:
        UnsupportedModel, InvalidArgument, MissingDependency: as `coded_layers`.
    """
    return set(layer_types(model_or_config)) == {"full_attention"} and bool(coded_layers(model_or_config))


@neutral_torch_state
def geometry_of(
    model: Any, layers: tuple[int, int] | None = None, kv_heads: tuple[int, int] | None = None
) -> CacheGeometry:
    """The geometry of what kvtc codes of a transformers model's cache: its full-attention layers. Of a config alone,
    too.

    Where it is not known how the model rotates keys, its rotation is none, and its keys are coded as they are cached.

    Parameters:
        model: a transformers model or config.
        layers: half-open (start, stop) of the layers of one pipeline-parallel worker. None (default): all.
        kv_heads: half-open (start, stop) of the key-value heads of one tensor-parallel worker. None (default): all.

    Returns:
        The geometry.

    Raises:
        InvalidArgument: a range is outside of the model.
        UnsupportedModel: kvtc does not code the cache.

    Example:
        >>> from kvtc.huggingface.models import geometry_of
        >>> geometry_of(model, layers=(0, 6)).describe()
        'layers 0..5, kv heads 0..2, head_dim 32'
    """
    full = coded_layers(model)
    whole = _Extent.of(model)
    first_layer, n_layers = _range("layers", layers, whole.n_layers)
    first_head, n_heads = _range("kv_heads", kv_heads, whole.n_kv_heads)
    chosen = tuple(layer for layer in full if first_layer <= layer < first_layer + n_layers)
    if not chosen:
        raise UnsupportedModel(f"layers {first_layer}..{first_layer + n_layers - 1} hold no full attention")
    rope, _ = rotation_of(model)
    return CacheGeometry(chosen, first_head, n_heads, whole.key_dim, whole.value_dim, rope.of_layers(chosen))


def capture(
    model: Any,
    token_ids: Tensor | Sequence[int],
    geometry: CacheGeometry | None = None,
    piece_tokens: int | None = None,
) -> KVCache:
    """Prefill a transformers model on one sequence and return its cache.

    The model computes in evaluation mode; its training flags are as before on return.

    Parameters:
        model: a transformers causal LM.
        token_ids: [T] integers, T >= 1.
        geometry: the layers and heads wanted. None (default): all.
        piece_tokens: tokens that the model reads in one pass, after those before them. This takes less memory and
            shows progress, and values differ by rounding. None (default): all at once, which is also done if the
            rotation depends on the length of the text.

    Returns:
        Keys and values [L, H, T, D] in the model's dtype, contiguous, on the device of its embeddings.

    Raises:
        InvalidArgument: the ids are empty, not one sequence, or outside of the vocabulary.
        GeometryMismatch: the geometry is outside of the model.
        UnsupportedModel: the model keeps another kind of cache.

    Example:
        >>> from kvtc.huggingface.models import capture
        >>> captured = capture(model, token_ids[:50])
        >>> captured.n_tokens, captured.dtype
        (50, torch.bfloat16)
    """
    return capture_groups(model, token_ids, [geometry], piece_tokens)[0]


def capture_groups(
    model: Any,
    token_ids: Tensor | Sequence[int],
    geometries: Sequence[CacheGeometry | None],
    piece_tokens: int | None = None,
) -> list[KVCache]:
    """As `capture`, of several groups of layers in one prefill; of windows, too, all tokens."""
    for geometry in geometries:
        _extent_of(model, geometry)
    device = model.get_input_embeddings().weight.device
    ids = as_ids(token_ids)
    vocabulary = int(text_config(model).vocab_size)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        found = f"{int(ids.min())} .. {int(ids.max())}" if len(ids) else "none"
        raise InvalidArgument(f"expected one or more token ids in 0 .. {vocabulary - 1}, found {found}")
    arguments = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if piece_tokens is None or rotation_of(model)[0].depends_on_length:
        piece_tokens = len(ids)
    windows = window_rows(model, geometries)
    with model_torch_state(), evaluation_mode(model):
        cached = _read_in_pieces(model, ids.to(device), piece_tokens, arguments, windows and windows.cache)
    return [captured(model, cached, len(ids), geometry, windows) for geometry in geometries]


def window_rows(model: Any, geometries: Sequence[CacheGeometry | None]) -> WindowRows | None:
    """What records the windows among some geometries; None where there are none. Raises `UnsupportedModel`."""
    layers = [layer for its in geometries if its is not None and its.is_window for layer in its.layers]
    return WindowRows(model, layers) if layers else None


@neutral_torch_state
def captured(
    model: Any,
    cached: Any,
    n_tokens: int,
    geometry: CacheGeometry | None = None,
    windows: WindowRows | None = None,
) -> KVCache:
    """Those layers and heads of a cache of n_tokens tokens that a model has made; the parameters and errors of `capture`.

    windows: recorded them, where the geometry is one of windows.
    """
    whole, layers, heads = _extent_of(model, geometry)
    device, remembered = model.get_input_embeddings().weight.device, remembered_length(model)
    expected = tuple((1, whole.n_kv_heads, n_tokens, dim) for dim in (whole.key_dim, whole.value_dim))
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in layers:
        held = cached.layers[layer]
        is_window = windows is not None and geometry is not None and geometry.is_window
        sides = windows.sides(layer) if is_window and windows else sides_of_layer(held.keys, held.values)
        shapes = tuple(sides[0].shape), tuple(sides[1].shape)
        if shapes != expected:
            raise UnsupportedModel(
                f"layer {layer} caches keys {shapes[0]} and values {shapes[1]}; expected {expected[0]} and {expected[1]}"
            )
        for side, of_layers in zip(sides, (keys, values), strict=True):
            of_layers.append(side[0, heads.start : heads.stop].detach().to(device))
    return KVCache(
        torch.stack(keys),
        torch.stack(values),
        layers=layers,
        first_kv_head=heads.start,
        rope_length=remembered if remembered > n_tokens else None,
    )


def _extent_of(model: Any, geometry: CacheGeometry | None) -> tuple[_Extent, tuple[int, ...], range]:
    """The extent of a model's cache, and the layers and heads of a geometry. Raises `GeometryMismatch` for one outside."""
    whole = _Extent.of_windows(model, geometry) if geometry is not None and geometry.is_window else _Extent.of(model)
    if geometry is None:
        return whole, coded_layers(model), range(whole.n_kv_heads)
    heads = range(geometry.first_kv_head, geometry.first_kv_head + geometry.n_kv_heads)
    widths = geometry.dims == (whole.key_dim, whole.value_dim)
    if geometry.layers[-1] >= whole.n_layers or heads.stop > whole.n_kv_heads or not widths:
        raise GeometryMismatch(f"expected a part of a model with {whole.describe()}; got {geometry.describe()}")
    return whole, geometry.layers, heads


def _read_in_pieces(model: Any, ids: Tensor, piece_tokens: int, arguments: dict[str, Any], cached: Any) -> Any:
    """The cache of all tokens. cached: an empty one to read into; None: the model's own."""
    with task("prefill", len(ids), "tokens") as advance:
        for start in range(0, len(ids), piece_tokens):
            piece = ids[start : start + piece_tokens]
            cached = model(piece[None], past_key_values=cached, use_cache=True, **arguments).past_key_values
            advance(len(piece))
    return cached


def verify_rope(
    model: Any, geometry: CacheGeometry, token_ids: Tensor | Sequence[int], tolerance: float | None = None
) -> float:
    """Check `geometry.rope` against the model: cached keys, un-rotated, must be the keys it computed before rotation.

    Parameters:
        model: a transformers causal LM.
        geometry: the layers and heads to check.
        token_ids: [T] integers, T >= 2, because position 0 is never rotated.
        tolerance: largest relative error (Frobenius norms) of a layer; None: 1e-4 with float32 keys, 2e-2 with 16-bit.

    Returns:
        The largest error of a layer.

    Raises:
        UnsupportedModel: if a layer exceeds the tolerance, or its keys before rotation cannot be observed.
        InvalidArgument: for fewer than 2 token ids.
    """
    ids = as_ids(token_ids)
    if len(ids) < 2:
        raise InvalidArgument(
            f"expected at least 2 token ids, as a rotation shows from the second on; found {len(ids)}"
        )
    observed: dict[int, list[Tensor]] = {}
    names: dict[int, str] = {}
    normed: dict[int, float] = {}
    hooks = []
    layers: dict[str, int] = {}
    for path, module in model.get_decoder().named_modules():
        layer = _layer_of(path, module, layers)
        if layer is None:
            continue
        if "attention" in type(module).__name__.lower():
            names.setdefault(layer, type(module).__name__)
            if hasattr(module, "qk_norm"):
                normed[layer] = float(module.qk_norm.eps)
        if path.rsplit(".", 1)[-1] in _KEY_NORMS | _KEY_PROJECTIONS:
            hooks.append(module.register_forward_hook(_recorder(observed.setdefault(layer, []))))
    try:
        cache = capture(model, ids, geometry)
    finally:
        for hook in hooks:
            hook.remove()
    return _worst_rope_error(geometry, cache, observed, names, normed, _extent_of(model, geometry)[0], tolerance)


@neutral_torch_state
def _worst_rope_error(
    geometry: CacheGeometry,
    cache: KVCache,
    observed: dict[int, list[Tensor]],
    names: dict[int, str],
    normed: dict[int, float],
    whole: _Extent,
    tolerance: float | None,
) -> float:
    """observed: outputs of each layer's modules that may be its keys before rotation; names: of its attention module.

    normed: of layers that bring rotated keys to a root mean square of 1 (llama4), which commutes with rotation, what is added to
    the mean square.
    """
    if tolerance is None:
        tolerance = 1e-4 if cache.dtype == torch.float32 else 2e-2
    positions = cache.resolved_positions().to(cache.keys.device)
    unrotated = geometry.rope.unrotate(cache.keys, positions, cache.resolved_rope_length())
    heads = slice(geometry.first_kv_head, geometry.first_kv_head + geometry.n_kv_heads)
    worst = 0.0
    for index in range(geometry.n_layers):
        layer = geometry.layers[index]
        name = f"layer {layer} ({names.get(layer, 'no attention module')})"
        errors = [
            _relative_error(unrotated[index], candidate[heads])
            for output in observed.get(layer, [])
            for its in _key_candidates(output, whole, cache.n_tokens)
            for candidate in ([its, _at_unit_square(its, normed[layer])] if layer in normed else [its])
        ]
        if not errors:
            raise UnsupportedModel(
                f"{name}: no module shows its keys before rotation, so its rotation cannot be verified"
            )
        if not min(errors) <= tolerance:
            raise UnsupportedModel(
                f"{name}: un-rotated keys differ from the keys before rotation by {min(errors):.2e} (relative); "
                f"expected at most {tolerance:.0e}"
            )
        worst = max(worst, min(errors))
    return worst


@dataclass(frozen=True)
class _Extent:
    """Size of a model's whole cache."""

    n_layers: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    n_query_heads: int

    @classmethod
    def of_windows(cls, model: Any, geometry: CacheGeometry) -> _Extent:
        """That of all heads of some windows, whose shape was seen; `captured` looks at it again."""
        config = text_config(model)
        heads = geometry.first_kv_head + geometry.n_kv_heads
        return cls(int(config.num_hidden_layers), heads, *geometry.dims, int(config.num_attention_heads))

    @classmethod
    def of(cls, model_or_config: Any) -> _Extent:
        config = text_config(model_or_config)
        n_layers = int(config.num_hidden_layers)
        # Layers may differ in shape: sizes are those of the layers that are coded.
        config = config.per_layer_config[coded_layers(model_or_config)[0]]
        n_heads = int(config.num_attention_heads)
        rank = getattr(config, "kv_lora_rank", None)
        if rank is not None:
            return cls(n_layers, 1, rotated_dim(config), int(rank), n_heads).checked(config.model_type, is_latent=True)
        n_kv_heads = getattr(config, "num_key_value_heads", None)
        if config.model_type == "falcon":
            # Its new architecture groups heads in the projection but caches one key-value head for each query head.
            n_kv_heads = 1 if config.multi_query and not config.new_decoder_architecture else n_heads
        elif n_kv_heads is None:
            # Older architectures have no such field: every head has keys and values of its own.
            n_kv_heads = n_heads
        key_dim = rotated_dim(config)
        value_dim = getattr(config, "v_head_dim", None) or key_dim
        found = cls(n_layers, int(n_kv_heads), key_dim, int(value_dim), n_heads)
        return found.checked(config.model_type, is_latent=False)

    def checked(self, name: str, is_latent: bool) -> _Extent:
        """The same; `UnsupportedModel` where a cache would not show whether it holds latents, or its keys have no features."""
        looks_latent = looks_like_latent(self.n_kv_heads, self.key_dim, self.value_dim)
        if looks_latent is not is_latent or not self.key_dim:
            what = "latents" if is_latent else "keys and values"
            raise UnsupportedModel(
                f"{name} keeps {what} in {self.n_kv_heads} heads, {describe_widths(self.key_dim, self.value_dim)}; expected "
                "latents of two widths, and keys and values of one width where there is one head"
            )
        return self

    def describe(self) -> str:
        """Sizes in words, for messages."""
        return f"{self.n_layers} layers, {self.n_kv_heads} kv heads, {describe_widths(self.key_dim, self.value_dim)}"


def _range(name: str, wanted: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """Half-open (start, stop) -> (start, length)."""
    if wanted is not None and not (isinstance(wanted, (tuple, list)) and len(wanted) == 2):
        raise InvalidArgument(f"{name}: expected (start, stop), got {wanted!r}")
    start, stop = (0, count) if wanted is None else wanted
    if not 0 <= start < stop <= count:
        raise InvalidArgument(f"{name}: expected (start, stop) with 0 <= start < stop <= {count}, got {(start, stop)}")
    return start, stop - start


@neutral_torch_state
def as_ids(token_ids: Tensor | Sequence[int]) -> Tensor:
    """[T] int64; `InvalidArgument` for anything but one sequence of integers."""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"expected a sequence of token ids: {error}") from error
    ids = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids  # as tokenizers return one text
    whole_numbers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 1 or not (whole_numbers or ids.numel() == 0):
        raise InvalidArgument(f"expected one sequence of integer token ids, got {tuple(ids.shape)} of {ids.dtype}")
    return ids.to(torch.int64)


def _recorder(outputs: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps the output."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            # Kept, not copied: some models clamp a projection in place before they rotate it.
            outputs.append(output)

    return hook


def _layer_of(path: str, module: nn.Module, known: dict[str, int]) -> int | None:
    """The layer of the cache that a module belongs to; known: of attention modules before it, by their paths, which is added to.

    It is the one that its attention names, else the first number in its path.
    """
    if isinstance(named := getattr(module, "layer_idx", None), int):
        known[path] = named
    parents = [path[:end] for end in range(len(path), 0, -1) if path[:end] in known]
    return known[parents[0]] if parents else next((int(part) for part in path.split(".") if part.isdigit()), None)


def _key_candidates(output: Tensor, whole: _Extent, n_tokens: int) -> Iterator[Tensor]:
    """Readings of a module's output as keys [H, T, D] of all heads: each layout some architecture uses."""
    heads, dim, queries = whole.n_kv_heads, whole.key_dim, whole.n_query_heads
    if looks_like_latent(heads, dim, whole.value_dim):
        if output.numel() in (n_tokens * dim, n_tokens * (dim + whole.value_dim)):
            rotary = output.reshape(n_tokens, -1)[None, :, -dim:]  # alone, or behind the latent
            yield rotary
            yield halves(rotary)
        return
    if output.numel() == n_tokens * heads * dim:
        if output.shape == (1, heads, n_tokens, dim):
            yield output[0]
        yield output.reshape(n_tokens, heads, dim).transpose(0, 1)
        return
    width = output.numel() // n_tokens
    if output.numel() % n_tokens or width % dim:
        return
    rows = output.reshape(n_tokens, width // dim, dim)
    if width == 2 * heads * dim:
        yield rows[:, :heads].transpose(0, 1)  # k | v
    projected = (width // dim - queries) // 2
    if projected < 1 or queries + 2 * projected != width // dim or heads % projected:
        return
    yield rows[:, queries : queries + projected].transpose(0, 1).repeat_interleave(heads // projected, 0)  # q | k | v
    if queries % projected == 0:
        groups = rows.reshape(n_tokens, projected, queries // projected + 2, dim)
        yield groups[:, :, -2].transpose(0, 1).repeat_interleave(heads // projected, 0)  # per head or group: q, k, v


def _at_unit_square(keys: Tensor, added: float) -> Tensor:
    """Each key over its root mean square. added: to the mean square."""
    return keys * (keys.float().square().mean(dim=-1, keepdim=True) + added).rsqrt()


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    expected = expected.to(found.device, torch.float32)
    tiny = torch.finfo(torch.float32).tiny  # all-zero keys must come back as zeros
    return float((found - expected).norm() / expected.norm().clamp_min(tiny))
