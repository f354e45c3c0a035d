"""Folders of models and adapters, as engines load them: tiny, the same on every run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CONFIG = {"hidden_size": 16, "num_hidden_layers": 3, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two large tensors, of which a sample is read, and a small one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed.weight": (1024, 64), "model.layers.0.q.weight": (512, 256), "model.norm.weight": (64,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor] | None = None, n_files: int = 1, **config: Any) -> Path:
    """A model of safetensors files, with an index where there are several."""
    tensors = weights() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    files = {f"model-{index}.safetensors": list(tensors)[index::n_files] for index in range(n_files)}
    for name, members in files.items():
        safetensors.torch.save_file({member: tensors[member] for member in members}, folder / name)
    if n_files > 1:
        places = {member: name for name, members in files.items() for member in members}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def write_adapter(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A LoRA adapter as PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"base_model_name_or_path": str(folder), "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.torch.save_file(
        {"q.lora_A.weight": weights(seed)["model.embed.weight"]}, folder / "adapter_model.safetensors"
    )
    return folder
