"""Tiny random models of many architectures of transformers: two to eight layers, every kind of cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as remember
from typing import Any

import torch
from torch import Tensor

from kvtc.cache import CacheGeometry, KVCache
from kvtc.calibration import Calibration
from kvtc.calibration.fit import fit
from kvtc.calibration.gradients import GradientSample
from kvtc.calibration.rows import CalibrationRows
from kvtc.coding.rope import Rope, RopeTable

from .builders import SINK_TOKENS, random_cache, tiny_calibration, tiny_geometry, tiny_gradients

WINDOW = 16
"""Of every sliding window and every attention chunk."""
VOCABULARY = 64
MIXED_LAYERS, MIXED_WINDOWS = (0, 2, 5), (1, 4)
"""Those of full attention in `mixed_cache`, and those with windows."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
} | _EXPERTS
_INDEXED = _LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SLIDING = {"sliding_window": WINDOW}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {},
    "hy_v3": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mistral": _SLIDING,
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING | {"num_hidden_layers": 6, "sliding_window_pattern": 3},
    "gemma4_text": _SLIDING
    | {
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "gpt_oss": _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": _SLIDING,
    "olmo3": _SLIDING,
    "mimo_v2_flash": _SLIDING,
    "llama4_text": {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "qwen3_next": _DELTA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": _DELTA,
    "qwen4_exp_text": _DELTA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
    }
    | _EXPERTS,
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA2
    | {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "minimax": {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense"] * 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED | {"qk_head_dim": 12},
    "minicpm3": _LATENT,
    "kimi_linear": _LATENT
    | {
        "q_lora_rank": None,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "deepseek_v4": {
        "sliding_window": 8,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["moe"] * 3,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
"""By model type: what the config has beside the sizes that all have."""


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **(_COMMON | ARCHITECTURES[name] | changes))


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with random weights, the same on every run."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name, **changes)).to(dtype).eval()


def random_ids(n_sequences: int, n_tokens: int, seed: int = 0) -> Tensor:
    """Token ids that are no padding."""
    return torch.randint(2, VOCABULARY, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any = None, **arguments: Any) -> tuple[Tensor, Any]:
    """Logits and cache after a model has read tokens on top of a cache."""
    name = "cache_params" if model.config.model_type in ("mamba", "mamba2") else "past_key_values"
    output = model(ids, use_cache=True, **{name: cache}, **arguments)
    return output.logits, output[name]


def mixed_cache(n: int = 50, seed: int = 0, part_of: int | None = None) -> Any:
    """A transformers cache of n tokens: layers 0, 2 and 5 as `mixed_calibration` has them, two windows and a state between.

    part_of: tokens of the text that these are the first of.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    drawn_tokens = n if part_of is None else part_of
    neutral, cache = random_cache(drawn_tokens, seed=seed), DynamicCache()
    drawn = torch.Generator().manual_seed(seed)
    for layer in range(6):
        if layer in (1, 4):
            window = DynamicSlidingWindowLayer(sliding_window=8)
            sides = (torch.randn(1, 2, drawn_tokens, 4, generator=drawn)[:, :, :n] for _ in range(2))
            window.update(*sides)
            cache.layers.append(window)
        elif layer == 3:
            state = LinearAttentionLayer()
            state.update_conv_state(torch.randn(1, 6, 4, generator=drawn))
            state.update_recurrent_state(torch.randn(1, 2, 4, 4, generator=drawn))
            cache.layers.append(state)
        else:
            at, full = MIXED_LAYERS.index(layer), DynamicLayer()
            full.update(neutral.keys[None, at, :, :n], neutral.values[None, at, :, :n])
            cache.layers.append(full)
    return cache


def mixed_calibration() -> Calibration:
    """The tiny calibration, of layers 0, 2 and 5."""
    calibration = tiny_calibration()
    return replace(calibration, geometry=replace(calibration.geometry, layers=MIXED_LAYERS))


@remember
def windowed_calibration() -> Calibration:
    """For `joint`: of layers 0, 2 and 5, and of the windows of layers 1 and 4, which it codes, too."""
    table = RopeTable((1.0, 0.01))
    windows = CacheGeometry(MIXED_WINDOWS, 0, 2, 4, 4, Rope((table,), (0, 0)), is_window=True)
    rows = [
        CalibrationRows(geometry, sink_tokens=SINK_TOKENS)
        for geometry in (replace(tiny_geometry(), layers=MIXED_LAYERS), windows)
    ]
    drawn = torch.Generator().manual_seed(5)
    for seed in range(6):
        rows[0].add(replace(random_cache(200, seed=10_000 + seed), layers=MIXED_LAYERS))
        sides = torch.randn(2, 2, 2, 200, 4, generator=drawn)
        rows[1].add(KVCache(sides[0], sides[1], layers=MIXED_WINDOWS))
    shape = 256, windows.joint_features
    directions = torch.nn.functional.normalize(torch.randn(shape, generator=drawn), dim=1)
    sample = GradientSample(
        torch.randn(shape, generator=drawn).half(), directions.half(), torch.full((256,), 3.0), 4, (4, 4)
    )
    return fit(rows[0], paper=True, sample=tiny_gradients(), further=[(rows[1], sample)])
