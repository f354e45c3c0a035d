"""A model for two tensor-parallel ranks: random weights, four key-value heads, and a calibration for either half of them.

The reference model has three heads, which two ranks cannot share.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import kvtc
from kvtc.reference import MODEL_DIRECTORY

CALIBRATION = "tp{tp_rank}.safetensors"
N_HEADS, N_RANKS = 4, 2
_TOKENS, _SEQUENCES = 1024, 16


def make(directory: Path, texts: list[str]) -> Path:
    """Write model and calibrations -> the model's directory; the calibrations lie beside it, as `CALIBRATION`."""
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
    path = directory / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    # Loaded and not cast back: a cast to bfloat16 rounds the frequencies of the rotation, too.
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIRECTORY / name, path / name)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)
    ids = [
        ids[at : at + _TOKENS]
        for text in texts
        for ids in [tokenizer(text).input_ids]
        for at in range(0, len(ids), _TOKENS)
    ]
    each = N_HEADS // N_RANKS
    for rank in range(N_RANKS):
        calibration = kvtc.calibrate(model, ids[:_SEQUENCES], kv_heads=(rank * each, (rank + 1) * each), progress=False)
        calibration.save(directory / CALIBRATION.format(tp_rank=rank))
    return path
