"""What a model's configuration says about its caches: bytes a token, parameters, and the size of a
calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidPlan
from .fields import Fields, read_json

# Decoder blocks of these kinds are counted here: attention of four products, a gated MLP of three, two norms.
COUNTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class PlannedModel:
    """A model's cache. dims: features of a head's key and of its value; of latents, of their rotary
    part and of the vector. n_parameters: all of them; input_embedding: those of the table of input
    embeddings.
    """

    name: str
    n_layers: int
    n_kv_heads: int
    dims: tuple[int, int]
    n_parameters: int
    input_embedding: int = 0
    bits_per_value: int = 16

    @property
    def side_features(self) -> tuple[int, int]:
        """Features of one token's keys over all layers and heads, and of its values."""
        n_heads = self.n_layers * self.n_kv_heads
        return n_heads * self.dims[0], n_heads * self.dims[1]

    @property
    def bytes_per_token(self) -> float:
        """Keys and values of one token."""
        return sum(self.side_features) * self.bits_per_value / 8

    def calibration_parameters(self, rank: int) -> int:
        """Numbers in the bases of keys and of values, p x min(rank, p) each (the paper's table 21).

        A joint basis of keys and values of the same rank has as many.
        """
        return sum(p * min(rank, p) for p in self.side_features)

    def calibration_share(self, rank: int) -> float:
        """Those over the parameters of the model without its input embeddings, which is how table
        21 comes out.
        """
        return self.calibration_parameters(rank) / (self.n_parameters - self.input_embedding)


def read_model(fields: Fields, directory: Path) -> PlannedModel:
    """The field `model` of a plan: {"config": FILE or object of transformers}, or a geometry in
    numbers.

    Raises:
        InvalidPlan: if something is missing that cannot be computed.
    """
    bits = fields.whole("bits_per_value", 16, low=4)
    if "config" in fields:
        config = fields.get("config")
        where = f"{fields.where}.config"
        if isinstance(config, str):
            path = directory / config
            config, where = read_json(path), str(path)
        parameters = fields.whole("parameters", None)
        model = model_from_config(config, where, fields.text("name", None), parameters, bits)
    else:
        head_dim = fields.whole("head_dim")
        model = PlannedModel(
            fields.text("name"),
            fields.whole("layers"),
            fields.whole("kv_heads"),
            (head_dim, fields.whole("value_dim", head_dim)),
            fields.whole("parameters"),
            fields.whole("input_embedding_parameters", 0, low=0),
            bits,
        )
    if model.input_embedding >= model.n_parameters:
        raise InvalidPlan(
            f"{fields.where}: the input embeddings have {model.input_embedding:,} of {model.n_parameters:,} parameters"
        )
    return model


def model_from_config(
    config: Any, where: str = "config", name: str | None = None, parameters: int | None = None, bits: int = 16
) -> PlannedModel:
    """The caches of a model, from its transformers config.json. Kinds of models that are not
    counted here need `parameters`.
    """
    fields = Fields(config, where)
    kind = fields.text("model_type")
    n_layers, hidden = fields.whole("num_hidden_layers"), fields.whole("hidden_size")
    n_heads = fields.whole("num_attention_heads")
    n_kv_heads = fields.whole("num_key_value_heads", n_heads)
    head_dim = fields.whole("head_dim", hidden // n_heads)
    dims = head_dim, fields.whole("v_head_dim", head_dim)
    if (rank := fields.whole("kv_lora_rank", None)) is not None:  # latents
        n_kv_heads, dims = 1, (fields.whole("qk_rope_head_dim"), rank)
    embedding = fields.whole("vocab_size") * hidden
    if parameters is None:
        if kind not in COUNTED_MODELS:
            raise InvalidPlan(
                f"{where}: parameters of model_type {kind!r} are not counted here, only those of {', '.join(COUNTED_MODELS)}; "
                "give the field parameters"
            )
        tied = fields.truth("tie_word_embeddings", False)
        layer = _block_parameters(fields, kind, hidden, n_heads * head_dim, n_kv_heads * head_dim, head_dim)
        parameters = embedding * (1 if tied else 2) + n_layers * layer + hidden
    return PlannedModel(name or kind, n_layers, n_kv_heads, dims, parameters, embedding, bits)


def _block_parameters(fields: Fields, kind: str, hidden: int, queries: int, keys: int, head_dim: int) -> int:
    """Parameters of one decoder block."""
    attention = 2 * hidden * queries + 2 * hidden * keys
    if kind == "qwen2":  # biases of queries, keys and values
        attention += queries + 2 * keys
    elif fields.truth("attention_bias", False):
        attention += queries + 2 * keys + hidden
    if kind == "qwen3":  # norms of queries and keys
        attention += 2 * head_dim
    mlp = 3 * hidden * fields.whole("intermediate_size")
    if fields.truth("mlp_bias", False):
        mlp += 2 * fields.whole("intermediate_size") + hidden
    return int(attention + mlp + 2 * hidden)
