"""Rotation: tables read from models and configs against keys observed before rotation, and the arithmetic itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvtc.cache import CacheGeometry
from kvtc.coding.rope import NO_ROTATION, DynamicScaling, LongScaling, Rope, RopeTable
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.huggingface.models import capture, geometry_of, verify_rope
from kvtc.huggingface.rope_discovery import rope_from_config, rope_from_model

transformers = pytest.importorskip("transformers")

TOKENS = 40
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FULL = ["full_attention"] * 3
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
}


@dataclass(frozen=True)
class Case:
    """One architecture: its config, and the module that shows keys before rotation with the layout of its output."""

    config_class: str
    settings: dict[str, Any]
    module: str = "k_proj"
    layout: str = "flat"
    check: Callable[[Rope], bool] = bool


def scaled(**rope_parameters: Any) -> dict[str, Any]:
    return {**BASE, "rope_parameters": {"rope_theta": 10000.0, **rope_parameters}}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in BASE.items() if name not in names}


CASES = {
    "llama": Case("LlamaConfig", BASE, check=lambda rope: rope.layer_tables == (0, 0, 0)),
    "llama3": Case(
        "LlamaConfig",
        scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn": Case(
        "LlamaConfig",
        scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
        check=lambda rope: rope.tables[0].attention_scaling > 1.1,
    ),
    "linear": Case("LlamaConfig", scaled(rope_type="linear", factor=4.0)),
    "dynamic past its limit": Case(
        "LlamaConfig",
        {**scaled(rope_type="dynamic", factor=4.0), "max_position_embeddings": 16},
        check=lambda rope: isinstance(rope.tables[0].scaling, DynamicScaling),
    ),
    "longrope below": Case(
        "Phi3Config",
        {**BASE, "rope_parameters": LONG, "original_max_position_embeddings": TOKENS},
        "qkv_proj",
        "q|k|v",
        lambda rope: isinstance(rope.tables[0].scaling, LongScaling) and rope.tables[0].attention_scaling > 1.1,
    ),
    "longrope above": Case(
        "Phi3Config",
        {**BASE, "rope_parameters": LONG, "original_max_position_embeddings": TOKENS - 1},
        "qkv_proj",
        "q|k|v",
    ),
    "mistral": Case("MistralConfig", {**BASE, "sliding_window": None}),
    "qwen2": Case("Qwen2Config", BASE),
    "qwen3": Case("Qwen3Config", {**BASE, "head_dim": 16}, "k_norm", "tokens, heads"),
    "gpt_neox": Case(
        "GPTNeoXConfig",
        without("num_key_value_heads"),
        "query_key_value",
        "per head",
        lambda rope: rope.tables[0].rotated_dim == 4,
    ),
    "glm4": Case(
        "Glm4Config",
        {**BASE, "head_dim": 16},
        check=lambda rope: rope.tables[0].interleaved and rope.tables[0].rotated_dim == 8,
    ),
    "cohere": Case("CohereConfig", BASE, check=lambda rope: rope.tables[0].interleaved),
    "cohere qk norm": Case("CohereConfig", {**BASE, "use_qk_norm": True}, "k_norm", "tokens, heads"),
    "stablelm": Case("StableLmConfig", BASE, check=lambda rope: rope.tables[0].rotated_dim == 4),
    "stablelm qk norm": Case("StableLmConfig", {**BASE, "qk_layernorm": True}, "k_layernorm", "heads, tokens"),
    "olmo2": Case("Olmo2Config", BASE, "k_norm"),
    "smollm3": Case(
        "SmolLM3Config",
        {**BASE, "no_rope_layers": [1, 0, 1]},
        check=lambda rope: rope.layer_tables == (0, NO_ROTATION, 0),
    ),
    "cohere2 without rotation": Case(
        "Cohere2Config", {**BASE, "layer_types": FULL}, check=lambda rope: rope.layer_tables == (NO_ROTATION,) * 3
    ),
    "falcon": Case(
        "FalconConfig", {**without("num_key_value_heads"), "multi_query": False}, "query_key_value", "per head"
    ),
    "gpt2": Case(
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4},
        "c_attn",
        "q|k|v",
        lambda rope: rope == Rope((), (NO_ROTATION,) * 3),
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        {**BASE, "head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        "k_norm",
        "heads, tokens",
        lambda rope: rope.layer_tables == (0, 0, 1) and rope.tables[0] != rope.tables[1],
    ),
}
VERIFIED = sorted(CASES.keys() - {"gemma3"})


def build(case: Case) -> Any:
    """A random float32 model; norms are no identities, so that keys before and after them differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, case.config_class)(**case.settings))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model.float().eval()


def token_ids(count: int = TOKENS) -> Tensor:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(1))


def observe(model: Any, case: Case, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [L, H, T, D] before rotation and as cached."""
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: outputs.append(call[2]))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == case.module
    ]
    with torch.no_grad():
        layers = model(ids[None], use_cache=True).past_key_values.layers
    for hook in hooks:
        hook.remove()
    cached = torch.stack([layer.keys[0] for layer in layers])
    n_layers, heads, tokens, dim = cached.shape
    before = []
    for output in outputs:
        if case.layout == "heads, tokens":
            before.append(output[0])
        elif case.layout == "q|k|v":
            width = heads * dim
            first = output.shape[-1] - 2 * width
            before.append(output[0, :, first : first + width].view(tokens, heads, dim).transpose(0, 1))
        elif case.layout == "per head":
            before.append(output[0].view(tokens, heads, 3 * dim)[..., dim : 2 * dim].transpose(0, 1))
        else:
            before.append(output.reshape(tokens, heads, dim).transpose(0, 1))
    assert len(before) == n_layers
    return torch.stack(before), cached


def relative(found: Tensor, expected: Tensor) -> float:
    """Worst layer's error, Frobenius norms."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_unrotated_keys_are_those_before_rotation(name: str) -> None:
    model = build(CASES[name])
    rope = rope_from_model(model)
    before, cached = observe(model, CASES[name], token_ids())
    unrotated = rope.unrotate(cached, torch.arange(TOKENS), TOKENS)
    assert relative(unrotated, before) < 1e-6
    assert relative(rope.rotate(unrotated, torch.arange(TOKENS), TOKENS), cached) < 1e-6
    rotated = [index for index in rope.layer_tables if index != NO_ROTATION]
    assert (relative(cached, before) > 0.01) == bool(rotated)
    assert CASES[name].check(rope)


@pytest.mark.parametrize("name", CASES)
def test_config_alone_gives_the_rotation_of_the_model(name: str) -> None:
    model = build(CASES[name])
    rope = rope_from_config(model.config)
    assert rope == rope_from_model(model)
    observe(model, CASES[name], token_ids())
    assert rope == rope_from_model(model), "a forward pass changed what is discovered"
    assert Rope.from_json(json.loads(json.dumps(rope.to_json()))) == rope


@pytest.mark.parametrize("name", VERIFIED)
def test_verification_accepts_the_model_and_names_a_tampered_layer(name: str) -> None:
    model = build(CASES[name])
    geometry = geometry_of(model)
    assert verify_rope(model, geometry, token_ids()) < 1e-6
    right = geometry.rope.tables[0] if geometry.rope.tables else RopeTable((1.0, 0.1))
    wrong_theta = replace(right, inverse_frequencies=tuple(f**1.1 for f in right.inverse_frequencies), scaling=None)
    wrong_layout = replace(right, interleaved=not right.interleaved)
    for wrong in (wrong_theta, wrong_layout):
        with pytest.raises(UnsupportedModel, match=r"^layer 1 \(\w+\): .*expected at most 1e-04"):
            verify_rope(model, tampered(geometry, 1, wrong), token_ids())


def tampered(geometry: CacheGeometry, layer: int, table: RopeTable | None) -> CacheGeometry:
    """The geometry with another rotation in one layer."""
    tables = geometry.rope.tables + (() if table is None else (table,))
    layers = list(geometry.rope.layer_tables)
    layers[layer] = NO_ROTATION if table is None else len(tables) - 1
    return replace(geometry, rope=Rope(tables, tuple(layers)))


def test_verification_notices_a_missed_and_an_imagined_rotation() -> None:
    model = build(CASES["smollm3"])
    geometry = geometry_of(model)
    with pytest.raises(UnsupportedModel, match=r"^layer 2 "):
        verify_rope(model, tampered(geometry, 2, None), token_ids())
    with pytest.raises(UnsupportedModel, match=r"^layer 1 "):
        verify_rope(model, tampered(geometry, 1, geometry.rope.tables[0]), token_ids())


def test_verification_covers_a_rank() -> None:
    model = build(CASES["smollm3"])
    geometry = geometry_of(model, layers=(1, 3), kv_heads=(1, 2))
    assert geometry.rope.layer_tables == (NO_ROTATION, 0)
    assert verify_rope(model, geometry, token_ids()) < 1e-6
    with pytest.raises(UnsupportedModel, match=r"^layer 2 "):
        verify_rope(model, tampered(geometry, 1, None), token_ids())


def test_verification_needs_a_rotated_position_and_honours_its_tolerance() -> None:
    model = build(CASES["llama"])
    geometry = geometry_of(model)
    with pytest.raises(InvalidArgument, match="at least 2 token ids"):
        verify_rope(model, geometry, [5])
    with pytest.raises(UnsupportedModel, match="expected at most 1e-12"):
        verify_rope(model, geometry, token_ids(), tolerance=1e-12)


def test_verification_refuses_an_attention_it_cannot_look_into() -> None:
    model = build(CASES["llama"])
    geometry = geometry_of(model)
    attention = model.model.layers[1].self_attn
    attention.k_proj = nn.Sequential()

    def forward(hidden_states: Tensor, past_key_values: Any, **_: Any) -> tuple[Tensor, None]:
        past_key_values.update(*torch.zeros(2, 1, 2, TOKENS, 16), 1)
        return torch.zeros_like(hidden_states), None

    attention.forward = forward
    with pytest.raises(UnsupportedModel, match=r"^layer 1 \(LlamaAttention\): no module shows its keys"):
        verify_rope(model, geometry, token_ids())


def test_verification_of_a_bfloat16_model() -> None:
    model = build(CASES["llama"]).to(torch.bfloat16)
    geometry = geometry_of(model)
    # Casting the whole model rounds its frequencies too; the live buffers are what it rotates by.
    assert geometry.rope != rope_from_config(model.config)
    assert 1e-4 < verify_rope(model, geometry, token_ids()) < 1e-2


def test_discovery_leaves_a_dynamic_model_alone_and_capture_tells_the_length_it_used() -> None:
    case = CASES["dynamic past its limit"]
    model = build(case)
    observe(model, case, token_ids(60))
    buffer = model.model.rotary_emb.inv_freq.clone()
    geometry = geometry_of(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, buffer)
    # The model keeps the frequencies of the longer sequence it saw first, until a short one resets it.
    assert capture(model, token_ids(30)).rope_length == 60
    assert verify_rope(model, geometry, token_ids(30)) < 1e-6
    assert capture(model, token_ids(10)).rope_length is None
    assert verify_rope(model, geometry, token_ids(10)) < 1e-6


@pytest.mark.parametrize("length", [4097, 30001, 131072])
def test_dynamic_frequencies_are_the_models_but_for_the_last_digit_of_its_powers(length: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 1.7},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))
    found = rope_from_config(config).tables[0].frequencies(length)
    torch.testing.assert_close(found, rotary.inv_freq, rtol=3 * 2**-23, atol=0)


def test_long_frequencies_start_past_the_original_length() -> None:
    table = RopeTable((1.0, 0.5), scaling=LongScaling((0.5, 0.25), 8))
    assert table.frequencies(8).tolist() == [1.0, 0.5]
    assert table.frequencies(9).tolist() == [0.5, 0.25]


def test_a_large_config_costs_no_weights() -> None:
    rope = rope_from_config(transformers.LlamaConfig(hidden_size=16384, num_attention_heads=128, num_hidden_layers=126))
    assert rope.layer_tables == (0,) * 126
    assert rope.tables[0].rotated_dim == 128


def test_sliding_layers_of_cohere2_rotate_and_full_ones_do_not() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = rope_from_config(transformers.Cohere2Config(**BASE, layer_types=types, sliding_window=8))
    assert rope.layer_tables == (0, NO_ROTATION, 0)


@pytest.mark.parametrize(
    ("config_class", "config_settings", "message"),
    [
        (
            "GPTJConfig",
            {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8},
            r"gptj.*no \*RotaryEmbedding",
        ),
        ("BertConfig", {"is_decoder": True, "num_hidden_layers": 1}, "not known to leave its keys unrotated"),
        ("NanoChatConfig", BASE, "NanoChatRotaryEmbedding, layer 0: .* neither half-split nor interleaved"),
        ("CLIPVisionConfig", {}, "CLIPVisionModel .* not known to leave its keys unrotated"),
    ],
)
def test_rotations_that_are_not_understood_are_refused(
    config_class: str, config_settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        rope_from_config(getattr(transformers, config_class)(**config_settings))


def test_rope_arguments_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="transformers causal language model, got Linear"):
        rope_from_model(nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="model or config, got dict"):
        rope_from_config({})
    with pytest.raises(InvalidArgument, match="layer 1 names rotation table 1"):
        Rope((RopeTable((1.0,)),), (0, 1))
    with pytest.raises(InvalidArgument, match="keys have 2 layers, the rotation describes 1"):
        Rope((), (NO_ROTATION,)).rotate(torch.zeros(2, 1, 3, 4), torch.arange(3), 3)


def tables_of(least: int, scaling: st.SearchStrategy) -> st.SearchStrategy:
    """Tables of so many pairs or more."""
    frequencies = st.lists(st.floats(0.0, 4.0, width=32), min_size=least, max_size=4)
    return st.builds(RopeTable, frequencies.map(tuple), st.floats(0.5, 2.0), st.booleans(), scaling)


dynamic = st.builds(DynamicScaling, st.just(1e4), st.floats(1.0, 8.0), st.just(2**31))
tables = tables_of(1, st.none()) | tables_of(2, dynamic)


@settings(max_examples=60, deadline=None)
@given(
    table=tables,
    positions=st.sets(st.integers(0, 2**20), min_size=1, max_size=9).map(sorted),
    rest=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_rotation_is_undone_exactly_and_touches_only_its_features(
    table: RopeTable, positions: list[int], rest: int, seed: int
) -> None:
    rope = Rope((table,), (0, NO_ROTATION))
    assert Rope.from_json(json.loads(json.dumps(rope.to_json()))) == rope
    keys = torch.randn(2, 2, len(positions), table.rotated_dim + rest, generator=torch.Generator().manual_seed(seed))
    at, length = torch.tensor(positions), positions[-1] + 1
    original = keys.clone()
    turned = rope.rotate(keys, at, length)
    assert torch.equal(keys, original)
    assert torch.equal(turned[1], keys[1])
    assert torch.equal(turned[..., table.rotated_dim :], keys[..., table.rotated_dim :])
    assert relative(rope.unrotate(turned, at, length), keys) < 1e-6
    assert torch.equal(rope.turn_layer(0, keys[0], at, length), turned[0])
    norms = [part[0, ..., : table.rotated_dim].norm(dim=-1) for part in (turned, keys)]
    torch.testing.assert_close(norms[0], norms[1] * table.attention_scaling, rtol=1e-5, atol=1e-6)


IMPOSSIBLE = {
    "a frequency of NaN": lambda: RopeTable((1.0, math.nan)),
    "an infinite frequency": lambda: RopeTable((math.inf,)),
    "a huge frequency": lambda: RopeTable((2.0**21,)),
    "no scaling of cosines": lambda: RopeTable((1.0,), 0.0),
    "NaN times cosines": lambda: RopeTable((1.0,), math.nan),
    "a base below 1": lambda: DynamicScaling(0.5, 2.0, 64),
    "an infinite base": lambda: DynamicScaling(math.inf, 2.0, 64),
    "a factor of 0": lambda: DynamicScaling(1e4, 0.0, 64),
    "a length of 0": lambda: DynamicScaling(1e4, 2.0, 0),
    "one pair with an exponent of d / (d - 2)": lambda: RopeTable((1.0,), scaling=DynamicScaling(1e4, 2.0, 64)),
    "more frequencies for long sequences": lambda: RopeTable((1.0,), scaling=LongScaling((1.0, 0.5), 64)),
    "a negative length": lambda: LongScaling((1.0,), -1),
    "an infinite frequency of long sequences": lambda: LongScaling((math.inf,), 64),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_rotations_are_refused(case):
    with pytest.raises(InvalidArgument):
        IMPOSSIBLE[case]()
