"""Find how a transformers model rotates its keys, layer by layer.

The model's own rotary module supplies the frequencies, and its own `apply_rotary_pos_emb` decides everything else:
random keys are rotated by the model's code and by the table read from it, and a table is accepted only if both agree.
Partial rotation, pair layout, the factor on cos and sin, and frequencies that depend on the length are therefore
observed, not inferred from names. Whether a layer applies its table at all is known from the config alone; only
`huggingface.verify_rope` observes that.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..coding.rope import NO_ROTATION, DynamicScaling, LongScaling, Rope, RopeTable
from ..errors import InvalidArgument, MissingDependency, UnsupportedModel
from ..process.torch_state import torch_functions

# Models without a rotary module whose keys carry no position: learned embeddings, ALiBi, or recurrent layers that keep order.
_NEVER_ROTATE = frozenset(
    {
        *("biogpt", "bloom", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt", "xglm"),
        *("granitemoehybrid", "jamba", "kimi_linear", "nemotron_h", "zamba2"),
    }
)

# Layers that skip a rotary module their model does have; the modeling code decides by these config fields.
_ROTATE_SLIDING_ONLY = frozenset({"afmoe", "cohere2", "flint"})
_ROTATE_SLIDING_ONLY_IF_ANY = frozenset({"exaone4", "exaone_moe", "kolibri1"})

# Conditions on rotation that are not described by the tables above.
_UNKNOWN_LAYER_RULE = frozenset({"cohere2_moe", "zamba2"})

# What must be equal in all layers for the cache to be one [layers, heads, tokens, features] block.
_HEAD_SHAPE = frozenset(
    {"head_dim", "kv_lora_rank", "num_attention_heads", "num_key_value_heads", "qk_rope_head_dim", "v_head_dim"}
)

# Both sides round cos and sin of the same float32 angle; other tables differ by far more at the positions tried.
_AGREEMENT = 1e-5


def require_transformers() -> Any:
    """The transformers package; `MissingDependency` if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency('this call needs transformers: pip install "kvtc[hf]"') from error
    return transformers


def text_config(model_or_config: Any) -> Any:
    """The config of the text decoder, from a model, a config or a composite (multimodal) config."""
    config: Any = (
        getattr(model_or_config, "config", None) if isinstance(model_or_config, nn.Module) else model_or_config
    )
    if not hasattr(config, "get_text_config"):
        kind = type(model_or_config).__name__
        raise InvalidArgument(f"expected a transformers model or config, got {kind}")
    return config.get_text_config(decoder=True)


def refuse_several_shapes(config: Any, layers: Sequence[int]) -> None:
    """Raise `UnsupportedModel` unless some layers of a text config have key-value heads of one number and size."""
    by_layer = config.per_layer_config
    for name in sorted(_HEAD_SHAPE & set(getattr(config, "per_layer_attributes", None) or ())):
        found = {getattr(by_layer[layer], name, None) for layer in layers}
        if len(found) > 1:
            raise UnsupportedModel(
                f"{config.model_type} has full-attention layers that differ in {name} ({found}); expected one shape"
            )


def rotation_of(model_or_config: Any) -> tuple[Rope, str | None]:
    """The rotations of all layers of a causal language model or of its config, and None; or no rotation, and why none is known.

    Raises `InvalidArgument` for what is no model or config.
    """
    try:
        if isinstance(model_or_config, nn.Module):
            return rope_from_model(model_or_config), None
        return rope_from_config(model_or_config), None
    except UnsupportedModel as error:
        n_layers = int(text_config(model_or_config).num_hidden_layers)
        return Rope((), (NO_ROTATION,) * n_layers, is_known=False), " ".join(str(error).split())


def rotated_dim(config: Any) -> int:
    """Features of what is rotated of a key, by the config of its layer; the rotary part of a latent is a key by itself."""
    if getattr(config, "kv_lora_rank", None) is not None:
        return int(config.qk_rope_head_dim)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_from_model(model: Any) -> Rope:
    """The rotations of all layers of a live causal language model, from its own buffers.

    Frequencies have the values the model uses (float32; a model cast to 16 bits as a whole has rounded them). The model
    is left as it is. `UnsupportedModel` if the rotation is not understood, `InvalidArgument` if `model` is no
    transformers model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
        raise InvalidArgument(f"expected a transformers causal language model, got {type(model).__name__}")
    return _discover(model, lambda rotary: copy.deepcopy(rotary))


def rope_from_config(config: Any) -> Rope:
    """The rotations of all layers of the causal language model that `config` describes, without its weights.

    `UnsupportedModel` if the rotation is not understood or transformers knows no such model.
    """
    return _discover(skeleton_of(config), lambda rotary: type(rotary)(config=rotary.config))


def skeleton_of(config: Any) -> Any:
    """The model that a config describes, without memory for its numbers; `UnsupportedModel` where transformers cannot build it.

    It is the text decoder with its head where transformers has such a class, else without, else the whole model with images.
    """
    transformers = require_transformers()
    text, causal, plain = text_config(config), transformers.AutoModelForCausalLM, transformers.AutoModel
    auto = next((auto for auto in (causal, plain) if type(text) in auto._model_mapping), None)
    auto, described = (auto, text) if auto else (transformers.AutoModelForImageTextToText, config)
    try:
        with torch_functions(), torch.device("meta"):
            model = auto.from_config(copy.deepcopy(described), dtype=torch.bfloat16, attn_implementation="eager")
    except Exception as error:  # whatever the architecture's constructor raises
        reason = str(error).split("\n", 1)[0].split(" for this kind of ")[0][:160]
        raise UnsupportedModel(
            f"transformers cannot build a text model from {type(described).__name__}: {type(error).__name__}: {reason}"
        ) from error
    return model.eval()


def remembered_length(model: Any) -> int:
    """Length of the sequence whose frequencies a dynamic rotation now uses; 0 if they are unscaled or never change.

    Dynamic scaling keeps the frequencies of the longest sequence until one shorter than the original limit resets it.
    """
    longest = 0
    for module in _rotary_modules(model).values():
        kind = getattr(module, "rope_type", "")
        prefixes = [f"{name}_" for name in kind if "dynamic" in kind[name]] if isinstance(kind, dict) else [""]
        for prefix in prefixes if "dynamic" in str(kind) else []:
            length = int(getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached))
            if length > int(module.original_max_seq_len):
                longest = max(longest, length)
    return longest


def context_length(model_or_config: Any) -> int | None:
    """Tokens that a model was made to read at most; None where its config does not say. With scaled rotation it is the longer one
    of what the config says and what it is scaled to."""
    config = text_config(model_or_config)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    longest = limit
    # Either the parameters of all layers, or those of each type of layer.
    for settings in (parameters, *parameters.values()):
        factor = settings.get("factor") if isinstance(settings, dict) else None
        if factor:
            longest = max(longest, int(factor * (settings.get("original_max_position_embeddings") or limit)))
    return longest


def _rotary_modules(model: Any) -> dict[str, Any]:
    """Rotary modules of the text decoder, by path."""
    modules = model.get_decoder().named_modules()
    return {path: module for path, module in modules if type(module).__name__.endswith("RotaryEmbedding")}


def _discover(model: Any, fresh: Callable[[nn.Module], nn.Module]) -> Rope:
    """Rotations of all layers; `fresh` makes a rotary module that may be run without touching the model's own."""
    config = text_config(model)
    name = f"{type(model).__name__} ({config.model_type})"
    n_layers = int(config.num_hidden_layers)
    found = _rotary_modules(model)
    if len(found) > 1:
        listed = ", ".join(f"{path} ({type(module).__name__})" for path, module in found.items())
        raise UnsupportedModel(f"{name}: expected one rotary module for all layers, found {len(found)}: {listed}")
    if not found:
        kind = config.model_type
        if kind in _NEVER_ROTATE:
            return Rope((), (NO_ROTATION,) * n_layers)
        raise UnsupportedModel(f"{name}: has no *RotaryEmbedding module, and is not known to leave its keys unrotated")
    reader = _TableReader(name, config, next(iter(found.values())), fresh)
    tables: list[RopeTable] = []
    layer_tables = []
    for layer in range(n_layers):
        table = reader.table(layer) if _rotates(name, config, layer) else None
        if table is not None and table not in tables:
            tables.append(table)
        layer_tables.append(NO_ROTATION if table is None else tables.index(table))
    return Rope(tuple(tables), tuple(layer_tables))


def _rotates(name: str, config: Any, layer: int) -> bool:
    """Whether a layer of a model that has a rotary module applies it."""
    kind = config.model_type
    if kind in _UNKNOWN_LAYER_RULE:
        raise UnsupportedModel(f"{name}: it is not known whether layer {layer} rotates its keys")
    if kind == "falcon":
        return not config.alibi
    sliding = _layer_type(config, layer) == "sliding_attention"
    if kind in _ROTATE_SLIDING_ONLY:
        return sliding
    if kind in _ROTATE_SLIDING_ONLY_IF_ANY:
        return sliding or config.sliding_window is None
    # Despite its name the list marks with 1 the layers that do rotate (smollm3, llama4).
    rotating = getattr(config, "no_rope_layers", None)
    return rotating is None or bool(rotating[layer])


def _layer_type(config: Any, layer: int) -> str | None:
    types = getattr(config, "layer_types", None)
    return None if types is None else str(types[layer])


class _TableReader:
    """Reads the tables of one rotary module, once per layer type, and checks them against the model's own rotation."""

    def __init__(self, name: str, config: Any, rotary: nn.Module, fresh: Callable[[nn.Module], nn.Module]) -> None:
        self._name = f"{name}, {type(rotary).__name__}"
        self._config = config
        self._rotary = rotary
        self._fresh = fresh
        self._per_type = "layer_type" in inspect.signature(type(rotary).forward).parameters
        self._known: dict[str | None, RopeTable | None] = {}

    def table(self, layer: int) -> RopeTable | None:
        """The table of a layer; None if its layer type has no rotation."""
        layer_type = _layer_type(self._config, layer) if self._per_type else None
        if layer_type not in self._known:
            where = f"{self._name}, layer {layer}" + (f" ({layer_type})" if layer_type else "")
            try:
                self._known[layer_type] = self._read(layer_type, where, layer)
            except UnsupportedModel:
                raise
            except Exception as error:  # the rotary module is foreign code: any failure means it is not understood
                raise UnsupportedModel(f"{where}: cannot read the rotation: {type(error).__name__}: {error}") from error
        return self._known[layer_type]

    def _read(self, layer_type: str | None, where: str, layer: int) -> RopeTable | None:
        settings = self._config.rope_parameters
        if layer_type is not None:
            settings = settings[layer_type]
            if settings is None:
                return None
        of_layer = self._config.per_layer_config[layer]
        probe = _Probe(self._fresh(self._rotary), layer_type, _takes_pairs(of_layer))
        head_dim = rotated_dim(of_layer)
        kind = probe.rope_type
        # Read after a short sequence: the buffers of a live model may still hold the frequencies of a long one.
        base = probe.frequencies(1)
        limit = int(getattr(self._config, "max_position_embeddings", None) or 4096)
        scaling: DynamicScaling | LongScaling | None = None
        if "dynamic" in kind:
            scaling = DynamicScaling(float(settings["rope_theta"]), float(settings["factor"]), limit)
        elif kind == "longrope":
            limit = int(settings["original_max_position_embeddings"])
            scaling = LongScaling(probe.frequencies(limit + 1), limit)
        for interleaved in (False, True):
            table = RopeTable(base, probe.attention_scaling, interleaved, scaling)
            # Within the limit, just past it and far past it: the frequencies of each are observed.
            if all(probe.agrees(table, head_dim, length) for length in (limit, limit + 1, 3 * limit)):
                return table
        raise UnsupportedModel(
            f"{where}: the model's own rotation (rope type {kind!r}, {2 * len(base)} features) is neither half-split "
            "nor interleaved rotation of the first features by its frequencies"
        )


def _takes_pairs(config: Any) -> bool:
    """Whether latents are rotated by the function for keys whose pairs are neighbours, where a model has one."""
    return getattr(config, "kv_lora_rank", None) is not None and getattr(config, "rope_interleave", True) is not False


def halves(keys: Tensor) -> Tensor:
    """Keys [..., D] whose pairs are neighbours, with the first of all pairs before the second: some models cache them so."""
    return torch.cat([keys[..., 0::2], keys[..., 1::2]], dim=-1)


class _Probe:
    """A rotary module of its own, on the CPU, that is run at will. takes_pairs: see `_takes_pairs`."""

    def __init__(self, rotary: nn.Module, layer_type: str | None, takes_pairs: bool) -> None:
        self._rotary: Any = rotary.to("cpu")
        self._takes_pairs = takes_pairs
        self._prefix = "" if layer_type is None else f"{layer_type}_"
        self._arguments = {} if layer_type is None else {"layer_type": layer_type}
        kind = rotary.rope_type
        self.rope_type = str(kind[layer_type] if isinstance(kind, dict) else kind)

    @property
    def attention_scaling(self) -> float:
        return float(getattr(self._rotary, f"{self._prefix}attention_scaling"))

    def _embed(self, positions: Tensor) -> Any:
        """cos and sin, or complex factors, of the sequence that ends at the last of `positions`."""
        carrier = torch.zeros(1, len(positions), 1, dtype=torch.float32)
        # The class's forward: a copy of a dispatched model's module keeps the hook that moves its inputs off the CPU.
        return type(self._rotary).forward(self._rotary, carrier, positions[None], **self._arguments)

    def frequencies(self, length: int) -> tuple[float, ...]:
        """Inverse frequencies after a prefill of `length` tokens."""
        self._embed(torch.tensor([length - 1]))
        return tuple(getattr(self._rotary, f"{self._prefix}inv_freq").float().tolist())

    def agrees(self, table: RopeTable, head_dim: int, length: int) -> bool:
        """Whether `table` rotates the keys of a sequence of `length` tokens as the model's code does."""
        positions = torch.tensor(sorted({0, 1, 2, length // 2, length - 1}))
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(len(positions), head_dim, generator=generator, dtype=torch.float32)
        try:
            turned = self._turn(keys, positions)
        except RuntimeError:
            # With partial rotation some models cut the rotated features off before they call the function.
            keys = keys[:, : table.rotated_dim]
            turned = self._turn(keys, positions)
        for plain in (keys, halves(keys)):
            expected = Rope((table,), (0,)).rotate(plain[None, None], positions, length)[0, 0]
            if turned.shape == expected.shape and bool((turned - expected).norm() <= _AGREEMENT * keys.norm()):
                return True
        return False

    def _turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [T, D] rotated by the function of the model's own modeling module."""
        module = sys.modules[type(self._rotary).__module__]
        embedding = self._embed(positions)
        turned: Tensor
        if isinstance(embedding, Tensor):  # complex factors
            heads = keys[None, :, None]  # after tokens (llama4)
            turned = module.apply_rotary_emb(heads, heads, embedding)[1]
            if turned.shape != heads.shape:  # before tokens (deepseek_v2)
                turned = module.apply_rotary_emb(keys[None, None], keys[None, None], embedding)[1]
            turned = turned.reshape(keys.shape)
        elif self._takes_pairs and hasattr(module, "apply_rotary_pos_emb_interleave"):
            turned = module.apply_rotary_pos_emb_interleave(keys[None, None], keys[None, None], *embedding)[1][0, 0]
        elif "k" in inspect.signature(module.apply_rotary_pos_emb).parameters:
            turned = module.apply_rotary_pos_emb(keys[None, None], keys[None, None], *embedding)[1][0, 0]
        else:
            turned = module.apply_rotary_pos_emb(keys[None, None], *embedding)[0, 0]
        return turned
