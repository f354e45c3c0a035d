"""Train a small model: text and look-ups in, a model of a few million parameters out, by default the reference model.

    python reference_model/train.py tokenize --text SHARD... --run RUN     # once: token ids of the text, in RUN
    python reference_model/train.py train --preset cpu --run RUN           # starts, or goes on from the last checkpoint in RUN
    python reference_model/train.py export --preset cpu --run RUN --output DIRECTORY  # bf16 safetensors, config and tokenizer
    python reference_model/train.py plot --run RUN --output FILE.svg       # the loss curve

What is drawn at a step follows from the seed and the number of the step alone, and a checkpoint holds weights and optimizer in full
precision, so a run that was stopped goes on as if it had not been. RUN/log.jsonl has one line a step; with --held-out TEXT...
RUN/held_out.jsonl has the bits per byte of these texts every 20 steps. With --config FILE any small config of transformers is
trained in place of the preset's own.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvtc.evaluate import tasks
from kvtc.evaluate.scoring import bits_per_byte
from kvtc.report.charts import save_picture
from kvtc.report.parts import Chart, Marks, Point

HERE = Path(__file__).parent
TOKENIZER = HERE / "seed-3m"
KVTC_6M = HERE.parent / "src" / "kvtc" / "reference" / "kvtc-6m"
BOS, EOS, PAD = 0, 1, 2
DOCUMENT_END = "\n\n\n"
PIECE = 8_000_000
"""Characters of text tokenized at a time."""
SYNTHETIC_TEXT = 4_000_000
"""Characters at the start of the text from which words and running text of the synthetic sequences are taken."""
CONTEXT_WEIGHT, ANSWER_WEIGHT, TEXT_WEIGHT = 0.05, 2.0, 1.0
"""What a token counts in the loss: random records cannot be predicted, answers can."""
MOMENTUM = 0.95
LLAMA_NAMES = {"feed_forward.": "mlp.", "pre_ff_layernorm": "post_attention_layernorm", "final_layernorm": "norm"}
"""How a Llama calls what Bamba has."""
CHECKPOINT_SECONDS = 300
HELD_OUT_WINDOWS = 4
"""Windows of 1 024 tokens of each held-out text that are measured every 20 steps."""


@dataclass(frozen=True)
class Preset:
    """One model and length of training.

    config: what a config of transformers is made of, with its model_type. stages: (steps, context length in tokens, share of
    synthetic sequences) in order. grow_from: a smaller model to start from, or one of another architecture; None to start
    from random weights. decay: the rate is constant after the warm-up, and falls linearly to zero over this last share of
    the steps.
    """

    config: dict[str, Any]
    tokens_per_step: int
    stages: tuple[tuple[int, int, float], ...]
    muon_rate: float
    adam_rate: float
    warmup: int
    decay: float
    seed: int = 0
    grow_from: Path | None = None

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(steps for steps, _, _ in self.stages)


_COMMON = {
    "vocab_size": 4096, "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_LLAMA = _COMMON | {"model_type": "llama", "head_dim": 32}
_SIZE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
_LATENT = {
    "model_type": "deepseek_v3", "num_key_value_heads": 6, "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 12,
}  # fmt: skip
_RECURRENT = {
    "model_type": "bamba", "attn_layer_indices": [3, 7, 11], "mamba_n_heads": 6, "mamba_d_head": 64, "mamba_n_groups": 1,
    "mamba_d_state": 32, "mamba_chunk_size": 64,
}  # fmt: skip
_OTHER_CACHES = {
    "tokens_per_step": 8192, "stages": ((320, 512, 0.25), (240, 1024, 0.25), (30, 2048, 0.4), (10, 4096, 0.4), (40, 1024, 0.25)),
    "muon_rate": 2e-3, "adam_rate": 1e-3, "warmup": 20, "decay": 0.5, "seed": 1, "grow_from": KVTC_6M,
}  # fmt: skip

PRESETS = {
    "gpu": Preset(
        config=_LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8,
        "num_key_value_heads": 2}, tokens_per_step=131_072, stages=((3400, 1024, 0.25), (200, 2048, 0.25), (400, 4096, 0.25)),
        muon_rate=4e-3, adam_rate=3e-3, warmup=200, decay=0.3,
    ),
    "cpu": Preset(
        config=_LLAMA | _SIZE, tokens_per_step=8192,
        stages=((480, 512, 0.3), (400, 1024, 0.4), (70, 2048, 0.4), (15, 4096, 0.4), (115, 1024, 0.6)), muon_rate=2e-3,
        adam_rate=1e-3, warmup=40, decay=0.35, grow_from=HERE / "seed-3m",
    ),
    "latent": Preset(config=_COMMON | _SIZE | _LATENT, **_OTHER_CACHES | {
        "stages": ((60, 512, 0.25), (20, 1024, 0.25), (4, 2048, 0.4), (2, 4096, 0.4), (14, 1024, 0.25)),
    }),
    "recurrent": Preset(config=_COMMON | _SIZE | _RECURRENT, **_OTHER_CACHES),
}  # fmt: skip


# Text


def documents(paths: list[Path]) -> Iterator[str]:
    """Pieces of whole documents from zstd files, each piece of at least PIECE characters but the last of a file."""
    for path in paths:
        rest = ""
        with path.open("rb") as file:
            reader = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(file)
            text = io.TextIOWrapper(reader, "utf-8")
            while block := text.read(PIECE):
                whole, end, rest = (rest + block).rpartition(DOCUMENT_END)
                if end:
                    yield whole
                else:
                    rest = whole + rest
        if rest.strip():
            yield rest


def tokenize(paths: list[Path], run: Path) -> None:
    """Write RUN/tokens.bin (uint16, every document between <|bos|> and <|eos|>) and RUN/synthetic.txt."""
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    total = 0
    with (run / "tokens.bin").open("wb") as output:
        for index, piece in enumerate(documents(paths)):
            if index == 0:
                (run / "synthetic.txt").write_text(piece[:SYNTHETIC_TEXT], encoding="utf-8")
            encoded = tokenizer(piece.split(DOCUMENT_END), add_special_tokens=False)["input_ids"]
            ids = np.concatenate([np.array([BOS, *document, EOS], dtype=np.uint16) for document in encoded])
            ids.tofile(output)
            total += len(ids)
            print(f"{total / 1e6:.1f} M tokens", flush=True)


# Sequences


class Sequences:
    """The sequences of a step: windows of text, and a share of synthetic ones, with the weight of every token."""

    def __init__(self, preset: Preset, run: Path) -> None:
        self.preset = preset
        self.tokens = np.memmap(run / "tokens.bin", dtype=np.uint16, mode="r")
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
        self.source = tasks.Source(
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            (run / "synthetic.txt").read_text(encoding="utf-8"),
            held_out=False,
            rng=random.Random(preset.seed),
        )

    def step(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [B, T + 1], weights [B, T + 1], is_text [B]) of one step."""
        preset = self.preset
        context, synthetic = stage_at(preset, step)
        n_rows = preset.tokens_per_step // context
        ids, weights = np.full((n_rows, context + 1), PAD, np.int64), np.zeros((n_rows, context + 1), np.float32)
        is_text = np.zeros(n_rows, bool)
        for row in range(n_rows):
            rng = random.Random(f"{preset.seed}/{step}/{row}")
            is_text[row] = rng.random() >= synthetic
            drawn, weight = self.text(rng, context) if is_text[row] else self.synthetic(rng, context)
            ids[row, : len(drawn)], weights[row, : len(drawn)] = drawn, weight
        return torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(is_text)

    def text(self, rng: random.Random, context: int) -> tuple[np.ndarray, np.ndarray]:
        start = rng.randrange(len(self.tokens) - context)
        ids = self.tokens[start : start + context + 1].astype(np.int64)
        ids[0] = BOS
        return ids, np.full(len(ids), TEXT_WEIGHT, np.float32)

    def synthetic(self, rng: random.Random, context: int) -> tuple[list[int], list[float]]:
        source = self.source
        source.rng = rng
        space = int(context * rng.uniform(0.65, 0.85))
        kind = rng.choices(("records", "needles", "variables", "words", "copy", "repeat"), (42, 22, 14, 4, 12, 6))[0]
        if kind == "records":
            example, after = tasks.records(source, space, 60)
        elif kind == "needles":
            example, after = tasks.needles(source, space, rng.randint(1, max(2, context // 64)))
        elif kind == "variables":
            example, after = tasks.variables(source, space, rng.randint(4, 10), n_chains=rng.randint(2, 4))
        elif kind == "words":
            example, after = tasks.frequent_words(source, space)
        elif kind == "copy":
            example, after = tasks.passages(source, space, rng.randint(2, max(2, context // 128))), "\n"
        else:
            segment = [rng.randrange(3, 4096) for _ in range(rng.randint(16, context // 2 - 2))]
            repeats = context // len(segment)
            return [BOS] + segment * repeats, [CONTEXT_WEIGHT] * (1 + len(segment)) + [TEXT_WEIGHT] * (
                len(segment) * (repeats - 1)
            )
        prose = kind in ("needles", "copy", "variables")
        ids = [BOS, *example.context]
        weights = [TEXT_WEIGHT if prose else CONTEXT_WEIGHT] * len(ids)
        for question in rng.sample(example.questions, len(example.questions)):
            for piece, weight in (
                (question.prompt, 0.0),
                (question.answer, ANSWER_WEIGHT),
                (source.encode(after), CONTEXT_WEIGHT),
            ):
                ids += piece
                weights += [weight] * len(piece)
            if len(ids) > context:
                break
        return ids[: context + 1], weights[: context + 1]


def stage_at(preset: Preset, step: int) -> tuple[int, float]:
    """Context length and share of synthetic sequences of a step."""
    done = 0
    for steps, context, synthetic in preset.stages:
        done += steps
        if step < done:
            return context, synthetic
    return preset.stages[-1][1:]


# Model


def new_model(preset: Preset) -> Any:
    """A model of random weights, or one grown from another."""
    torch.manual_seed(preset.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset.config), attn_implementation="sdpa")
    spread_steps(model)
    if preset.grow_from is not None:
        smaller = AutoModelForCausalLM.from_pretrained(preset.grow_from, dtype=torch.float32)
        grow(model, smaller)
        if hasattr(model.config, "kv_lora_rank"):
            share_latents(model, smaller)
    return model


def spread_steps(model: Any) -> None:
    """Give the heads of Mamba 2 steps of 0.001 to 0.1, as published, so that some states last.

    transformers begins a Bamba with steps of 1.3: its states forget a token before the next one, and do not learn to remember.
    """
    lowest, highest = math.log(1e-3), math.log(0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                steps = torch.empty_like(parameter).uniform_(lowest, highest).exp()
                parameter.copy_(steps + torch.log(-torch.expm1(-steps)))


def grow(model: Any, smaller: Any) -> None:
    """Fill a model with one that is shallower, spread evenly, or of another architecture; a new layer follows each old one.

    A new layer keeps its random projections, so that its keys and values are its own and no copy of its neighbour's, and gets zeros
    for the two projections back to the residual stream: the grown model computes exactly what the smaller one does. Of another
    architecture what means the same and has the same shape is taken.
    """
    factor, rest = divmod(len(model.model.layers), len(smaller.model.layers))
    if rest:
        raise ValueError("the number of layers must be a multiple of the smaller model's")
    given = dict(smaller.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            layer = re.match(r"layers\.(\d+)\.", name)
            if layer and int(layer[1]) % factor:
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
                continue
            old = re.sub(r"^layers\.(\d+)", lambda match: f"layers.{int(match[1]) // factor}", name)
            for its_name, llama_name in LLAMA_NAMES.items():
                old = old.replace(its_name, llama_name)
            if old in given and given[old].shape == parameter.shape:
                # The weight of a norm is stored as it is or less 1, which its first value tells.
                parameter.copy_(given[old] + (parameter - 1 if "norm" in old else 0))


def share_latents(model: Any, llama: Any) -> None:
    """Give latent attention the projections of a Llama of as many layers and query heads, as near as its widths allow.

    The rotated key, which all heads share, takes every second frequency of the Llama's: at each frequency the keys of the heads are
    complex multiples of the token's hidden state, and the multiple that explains most of them stays; queries take over its factor.
    Values, and of the keys what turns slowly and is not explained yet, are the latent's: the directions that explain most of both.
    """
    config = model.config
    n_queries, n_heads = config.num_attention_heads, llama.config.num_key_value_heads
    half, n_turns, rank = llama.config.head_dim // 2, config.qk_rope_head_dim // 2, config.kv_lora_rank
    slow = torch.arange(half) >= half // 2
    scale = math.sqrt(
        config.qk_head_dim / llama.config.head_dim
    )  # of logits: each divides by the root of its own width
    for layer, (moments, old) in zip(model.model.layers, hidden_moments(llama), strict=True):
        values, vectors = torch.linalg.eigh(moments)
        root = vectors * values.clamp_min(1e-9 * values[-1]).sqrt()  # hidden states are root @ white noise
        inverse = vectors.T / values.clamp_min(1e-9 * values[-1]).sqrt()[:, None]
        keys, queries = (
            torch.complex(*weight.double().view(-1, 2, half, weight.shape[1]).unbind(1)).transpose(0, 1)
            for weight in (old.k_proj.weight, old.q_proj.weight)
        )  # [frequency, head, hidden]
        rotated, rotated_queries = [], []
        for turn in range(0, half, half // n_turns):
            factors, sizes, directions = torch.linalg.svd(keys[turn] @ root.to(keys.dtype), full_matrices=False)
            rotated.append(sizes[0] * directions[0] @ inverse.to(keys.dtype))
            keys[turn] -= factors[:, :1] * rotated[-1]
            rotated_queries.append(
                queries[turn] * factors[:, 0].conj().repeat_interleave(n_queries // n_heads)[:, None]
            )
        rest = torch.where(slow[:, None, None], keys, 0).transpose(0, 1)  # [head, frequency, hidden]
        rest = torch.cat(
            [torch.cat([rest.real, rest.imag], 1), old.v_proj.weight.double().view(n_heads, 2 * half, -1)], 1
        )
        factors, sizes, directions = torch.linalg.svd(rest.flatten(0, 1) @ root, full_matrices=False)
        up = (factors[:, :rank] * sizes[:rank]).view(n_heads, -1, rank).repeat_interleave(n_queries // n_heads, 0)
        down = torch.cat(
            [directions[:rank] @ inverse, torch.view_as_real(torch.stack(rotated)).transpose(1, 2).flatten(0, 1)]
        )
        turned = (
            torch.view_as_real(torch.stack(rotated_queries, 1)).transpose(2, 3).flatten(1, 2)
        )  # pairs stand side by side
        asked = torch.cat([old.q_proj.weight.double().view(n_queries, 2 * half, -1), turned], 1) * scale
        new = layer.self_attn
        with torch.no_grad():
            new.q_proj.weight.copy_(asked.flatten(0, 1))
            new.kv_a_proj_with_mqa.weight.copy_(down)
            new.kv_b_proj.weight.copy_(up.flatten(0, 1))


def hidden_moments(llama: Any) -> list[tuple[Tensor, Any]]:
    """Per layer the second moments [hidden, hidden], float64, of what its attention reads, and that attention.

    Taken over 32 x 128 tokens of the model's own text.
    """
    torch.manual_seed(0)
    moments: list[tuple[Tensor, Any]] = []

    def add(attention: Any, _: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = named["hidden_states"].double().flatten(0, 1)
        moments.append((hidden.T @ hidden / len(hidden), attention))

    hooks = [layer.self_attn.register_forward_pre_hook(add, with_kwargs=True) for layer in llama.model.layers]
    with torch.no_grad():
        ids = llama.generate(torch.full((32, 1), BOS), max_new_tokens=127, do_sample=True, pad_token_id=PAD)
        moments.clear()
        llama(ids)
    for hook in hooks:
        hook.remove()
    return moments


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Cross entropy [B, T] in nats of ids[:, 1:]."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    losses: Tensor = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1)


# Training


def optimizers_of(model: Any, preset: Preset) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, Adam for embeddings and norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return {
        "muon": torch.optim.Muon(
            matrices, lr=preset.muon_rate, momentum=MOMENTUM, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        "adam": torch.optim.AdamW(others, lr=preset.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    }


def rate_at(preset: Preset, step: int) -> float:
    """Share of the full learning rate at a step."""
    left = (preset.steps - step) / (preset.decay * preset.steps)
    return min(1.0, (step + 1) / preset.warmup, left)


def train(
    preset: Preset, run: Path, device: str, last_step: int, minutes: float, compile_layers: bool, held_out: list[Path]
) -> None:
    """Train to last_step or for so many minutes, from the last checkpoint in RUN if there is one."""
    sequences = Sequences(preset, run)
    model = new_model(preset).to(device).train()
    optimizers = optimizers_of(model, preset)
    step = load_checkpoint(model, optimizers, run)
    cut_log(run / "log.jsonl", step)
    cut_log(run / "held_out.jsonl", step)
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    started, saved = time.monotonic(), time.monotonic()
    with (run / "log.jsonl").open("a") as log, ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(sequences.step, step)
        while step < last_step and time.monotonic() - started < 60 * minutes:
            began = time.monotonic()
            ids, weights, is_text = upcoming.result()
            upcoming = pool.submit(sequences.step, step + 1)
            ids, weights = ids.to(device), weights.to(device)
            parts = train_step(model, optimizers, preset, step, ids, weights)
            text, answers = is_text[:, None].expand_as(parts).to(device), weights[:, 1:] == ANSWER_WEIGHT
            record = {
                "step": step,
                "context": ids.shape[1] - 1,
                "loss": round(mean(parts, weights[:, 1:] > 0), 6),
                "text": round(mean(parts, text), 6),
                "answers": round(mean(parts, answers), 6),
                "seconds": round(time.monotonic() - began, 2),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            step += 1
            if step % 20 == 0:
                print(record, flush=True)
                measure(model, step, run, held_out)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(model, optimizers, step, run)
                saved = time.monotonic()
        upcoming.cancel()
    save_checkpoint(model, optimizers, step, run)
    print(f"stopped after step {step} of {preset.steps}")


def measure(model: Any, step: int, run: Path, held_out: list[Path]) -> None:
    """Add a line to RUN/held_out.jsonl: bits per byte of each held-out text, and the last of so many steps."""
    if not held_out:
        return
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    with torch.compiler.set_stance("force_eager"):  # or the layers would be compiled again for these lengths
        bits = {
            path.stem: round(bits_per_byte(model, tokenizer, path.read_text("utf-8"), 1024, HELD_OUT_WINDOWS), 4)
            for path in held_out
        }
    with (run / "held_out.jsonl").open("a") as log:
        log.write(json.dumps({"step": step - 1, **bits}) + "\n")
    print(f"bits per byte after step {step}: {bits}", flush=True)


def train_step(
    model: Any, optimizers: dict[str, torch.optim.Optimizer], preset: Preset, step: int, ids: Tensor, weights: Tensor
) -> Tensor:
    """One update; the losses [B, T] before it."""
    for optimizer, rate in (("muon", preset.muon_rate), ("adam", preset.adam_rate)):
        for group in optimizers[optimizer].param_groups:
            group["lr"] = rate * rate_at(preset, step)
    weight = weights[:, 1:].sum()
    losses = []
    # A few sequences at a time: logits and activations of a whole step would not stay in the processor's caches.
    rows = max(1, 16_384 // ids.shape[1]) if ids.device.type == "cuda" else max(1, 2048 // (ids.shape[1] - 1))
    for first in range(0, len(ids), rows):
        part = loss_of(model, ids[first : first + rows])
        ((part * weights[first : first + rows, 1:]).sum() / weight).backward()
        losses.append(part.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses)


def mean(values: Tensor, where: Tensor) -> float:
    return float(values[where].mean()) if bool(where.any()) else math.nan


# Checkpoints


def save_checkpoint(model: Any, optimizers: dict[str, torch.optim.Optimizer], step: int, run: Path) -> None:
    """RUN/checkpoint.safetensors: weights and optimizer state in full precision, replaced in one move."""
    tensors = {f"model/{name}": parameter.detach().cpu() for name, parameter in model.named_parameters()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{name}/{index}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    partial = run / "checkpoint.partial"
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(run / "checkpoint.safetensors")


def load_checkpoint(model: Any, optimizers: dict[str, torch.optim.Optimizer], run: Path) -> int:
    """Restore what `save_checkpoint` wrote; the next step, 0 where there is no checkpoint."""
    path = run / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, _, rest = key.partition("/")
            if owner == name:
                index, _, field = rest.partition("/")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


def cut_log(path: Path, step: int) -> None:
    """Keep the lines before a step: those after the checkpoint will be written again."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] < step))


def export(run: Path, preset: Preset, output: Path) -> None:
    """The model of RUN's last checkpoint as anyone loads it: bf16 safetensors of at most 15 MB a file, config, tokenizer."""
    model = new_model(preset)
    load_checkpoint(model, {}, run)
    model.to(torch.bfloat16).save_pretrained(output, max_shard_size="15MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, output / name)


def plot(run: Path, preset: Preset, output: Path) -> None:
    """Loss of text and of answers to look-ups against tokens seen: running medians of 25 steps."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    millions = np.arange(1, len(records) + 1) * preset.tokens_per_step / 1e6
    lines: dict[str, list[Point]] = {}
    for name, title in (("text", "text"), ("answers", "answers to look-ups")):
        values = np.array([record[name] for record in records], dtype=float)
        smooth = [float(np.nanmedian(values[max(0, i - 12) : i + 13])) for i in range(len(values))]
        lines[title] = list(zip(millions.tolist(), smooth, [f"{value:.2f}" for value in smooth], strict=True))
    contexts = [record["context"] for record in records]
    starts = [i for i in range(len(contexts)) if i == 0 or contexts[i] != contexts[i - 1]]
    changes = [(*lines["text"][i][:2], f"from here on contexts of {contexts[i]} tokens") for i in starts]
    chart = Chart(
        "Loss", lines, "million tokens", "cross entropy, nats a token", x_log=False, y_log=False, x_times=False,
        marks=[Marks("text", changes, is_hollow=True)],
    )  # fmt: skip
    lengths = ", ".join(str(contexts[i]) for i in starts)
    note = f"Running medians of 25 steps. Marks: contexts change, to {lengths} tokens."
    save_picture(output, "Loss of text and of answers", note, [chart])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tokenize", "train", "export", "plot"))
    parser.add_argument("--run", type=Path, required=True, help="where tokens, log and checkpoint are")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], help="zstd files of documents separated by two blank lines"
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--config", type=Path, help="config.json of another small model, trained as the preset says")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="texts whose bits per byte are measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--last-step", type=int, help="stop there; all steps of the preset otherwise")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, default=Path("exported"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset]
    if options.config:
        preset = replace(preset, config=json.loads(options.config.read_text(encoding="utf-8")), grow_from=None)
    if options.command == "tokenize":
        tokenize(options.text, options.run)
    elif options.command == "train":
        last_step = preset.steps if options.last_step is None else options.last_step
        train(preset, options.run, options.device, last_step, options.minutes, not options.no_compile, options.held_out)
    elif options.command == "export":
        export(options.run, preset, options.output)
    else:
        plot(options.run, preset, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
