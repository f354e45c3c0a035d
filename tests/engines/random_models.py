"""Models with random weights, for what the reference model cannot show: their answers say little, their pages are as any model's.

`make_parallel` gives two tensor-parallel ranks four key-value heads to share, with a calibration for either half; the reference
model has three. `make_latent` caches latents (multi-head latent attention) of the width that vLLM's CPU backends take.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import kvtc
from kvtc.reference import MODEL_DIRECTORY

CALIBRATION, WHOLE_CALIBRATION = "tp{tp_rank}.safetensors", "whole.safetensors"
N_HEADS, N_RANKS = 4, 2
_TOKENS, _SEQUENCES = 1024, 16


def make_parallel(directory: Path, texts: list[str]) -> Path:
    """Write model and calibrations -> the model's directory; the calibrations lie beside it, those of the ranks as `CALIBRATION`,
    and that of all heads as `WHOLE_CALIBRATION`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    path = _saved(LlamaForCausalLM(config), directory / "model")
    # Loaded and not cast back: a cast to bfloat16 rounds the frequencies of the rotation, too.
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)
    ids = [
        ids[at : at + _TOKENS]
        for text in texts
        for ids in [tokenizer(text).input_ids]
        for at in range(0, len(ids), _TOKENS)
    ]
    each = N_HEADS // N_RANKS
    parts = {CALIBRATION.format(tp_rank=rank): (rank * each, (rank + 1) * each) for rank in range(N_RANKS)}
    for name, heads in {**parts, WHOLE_CALIBRATION: (0, N_HEADS)}.items():
        kvtc.calibrate(model, ids[:_SEQUENCES], kv_heads=heads, progress=False).save(directory / name)
    return path


def make_latent(directory: Path) -> Path:
    """Write a small model with the attention of DeepSeek-V3 -> its directory."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=4096,
    )
    torch.manual_seed(1)
    return _saved(DeepseekV3ForCausalLM(config), directory / "latent")


def _saved(model: torch.nn.Module, path: Path) -> Path:
    """In bfloat16, with the reference model's tokenizer."""
    model.to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIRECTORY / name, path / name)
    return path
