"""kvtc in vLLM, for real: processes that share nothing but a directory, the reference model, and vLLM's own account of hits.

For each way into vLLM, the connector and the tier:

    store    a fresh process answers prompts, uncached; kvtc stores their chunks
    hit      another process answers them from the store: the same tokens
    damaged  one stored chunk is damaged on disk; another process loads what comes before it, computes the rest: the same tokens

Then `store` and `hit` of more: `quality`, the connector asked for a KL instead of a ratio; `parallel`, the connector with two
tensor-parallel workers, each with a calibration of its own; `canonical`, the tier with rows that are the same for any number of
workers, written by two and read by two and by one; `fp8`, the connector over a cache in 8 bits; and `lossless`, the connector
without a calibration, for each model that is there: kvtc-6m, a random one that caches latents, and SmolLM2-135M and Gemma 3 270M
(windows in 15 of 18 layers) if `make bench-models` has installed them.

Run in vLLM's environment: `make test-engines`, or this script with some of connector, tier, quality, parallel, canonical, fp8,
lossless.
Prints what was stored and loaded, and exits with 1 where something differs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_models

KL = 0.001
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Way:
    """How kvtc gets into vLLM, and what must come of it; the CPU backend packs pages by dtype, so both packings are run.

    profile: of the long prompt's streams. on_disk: (entries, their tokens). hits: tokens that vLLM counts as cached, for each
    prompt of a process; with the connector it counts what was promised, even where that failed. counted: metrics of the process
    that meets the damaged entry.
    """

    name: str
    dtype: str
    profile: str
    on_disk: tuple[int, int]
    hits: dict[str, list[int]]
    counted: dict[str, float]


WAYS = (
    # Process `hit` asks for the short prompt first: vLLM then has 288 tokens of the long one and loads from inside a chunk.
    Way(
        "connector",
        "bfloat16",
        "joint",
        (10, 1250),
        {"hit": [288, 1248], "damaged": [1248]},
        {"tokens_loaded": 512, "tokens_missed": 736, "damaged": 1},
    ),
    Way(
        "tier",
        "float32",
        "joint",
        (7, 1024 + 768),
        {"hit": [256, 1024, 768], "damaged": [512]},
        {"entries_loaded": 3, "misses": 1, "damaged": 1},
    ),
)


class Failure(Exception):
    """Something is not as it must be."""


def main() -> None:
    chosen = sys.argv[1:] or [*(way.name for way in WAYS), "quality", "parallel", "canonical", "fp8", "lossless"]
    long, short, other = prompts()
    for way in WAYS:
        if way.name in chosen:
            with tempfile.TemporaryDirectory() as scratch:
                run_way(way, Path(scratch), long, short, other)
    if "quality" in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            run_quality(Path(scratch), long)
    if "parallel" in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            run_parallel(Path(scratch), long)
    if "canonical" in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            run_canonical(Path(scratch), long)
    if "fp8" in chosen:
        from kvtc.reference import MODEL_DIRECTORY

        for rate in ("lossless", "ratio"):
            with tempfile.TemporaryDirectory() as scratch:
                run_fp8(Path(scratch), MODEL_DIRECTORY, rate)
    if "lossless" in chosen:
        with tempfile.TemporaryDirectory() as made:
            for model in models(Path(made)):
                with tempfile.TemporaryDirectory() as scratch:
                    run_lossless(Path(scratch), model)
    print("all as it must be")


def models(scratch: Path) -> list[Path]:
    """The folders of the models that are there, and of one that is made."""
    from kvtc.installed_models import INSTALLED_MODELS, places_of
    from kvtc.reference import MODEL_DIRECTORY

    installed = [places_of(name).directory for name in INSTALLED_MODELS]
    made = random_models.make_latent(scratch)
    return [MODEL_DIRECTORY, made, *(directory for directory in installed if directory.is_dir())]


def prompts() -> tuple[list[int], list[int], list[int]]:
    """Token ids of this project's licence: a long beginning, a short one, and another part."""
    from transformers import AutoTokenizer

    from kvtc.reference import MODEL_DIRECTORY

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)
    ids = tokenizer((ROOT / "LICENSE").read_text()).input_ids
    return ids[:1250], ids[:300], ids[1250:2100]


def run_way(way: Way, scratch: Path, long: list[int], short: list[int], other: list[int]) -> None:
    store = scratch / "store"
    config = transfer_config(way.name, f"file://{store}")
    order = [long, short] if way.name == "connector" else [long, short, other]
    print(
        f"\n{way.name}: kvtc-6m in {way.dtype}, ratio 8, prompts of {', '.join(str(len(ids)) for ids in order)} tokens"
    )
    uncached = serve(scratch, way.name, {"dtype": way.dtype}, config, order, "store")
    expect("nothing is cached at first", uncached["answers"][0]["cached"], 0)
    tokens = {len(ids): answer["tokens"] for ids, answer in zip(order, uncached["answers"], strict=True)}
    report_disk(store, *way.on_disk)

    again = [short, long, *order[2:]]
    compare(
        way,
        "hit",
        serve(scratch, way.name, {"dtype": way.dtype}, config, again, "hit"),
        [tokens[len(ids)] for ids in again],
    )

    print(f"  damaged: {damage(store, position=512)}")
    found = serve(scratch, way.name, {"dtype": way.dtype}, config, [long], "damaged")
    counted = {name: found["metrics"].get(f"vllm:kvtc_{name}") for name in way.counted}
    print(f"  damaged: {', '.join(f'vllm:kvtc_{name} {count}' for name, count in counted.items())}")
    compare(way, "damaged", found, [tokens[len(long)]])
    expect("what vLLM's metrics say of the damage", counted, way.counted)


def run_quality(scratch: Path, prompt: list[int]) -> None:
    """`kvtc.kl` in place of the guide's ratio: how many bytes that takes follows from the calibration's curve."""
    print(f"\nquality: kvtc-6m in bfloat16, {KL} nats, a prompt of {len(prompt)} tokens")
    config = transfer_config("connector", f"file://{scratch}/store")
    options = config["kv_connector_extra_config"]
    del options["kvtc.ratio"]
    options["kvtc.kl"] = KL
    engine = {"dtype": "bfloat16"}
    first, second = (serve(scratch, "quality", engine, config, [prompt], name) for name in ("store", "hit"))
    expect("nothing is cached at first", first["answers"][0]["cached"], 0)
    report_disk(scratch / "store", 10, len(prompt))
    found = second["answers"][0]
    print(f"  hit: cached {found['cached']} tokens; 32 tokens compared")
    expect("cached tokens", found["cached"], 1248)
    expect("the same tokens", found["tokens"], first["answers"][0]["tokens"])


def run_fp8(scratch: Path, model: Path, rate: str) -> None:
    """Pages of 8 bits come back bit for bit, and the answer is that of the engine's own prefix cache; or they are read by the
    engine's scales and coded."""
    prompt = prompts()[0]
    print(f"\nfp8, {rate}: {model.name} with a cache in fp8, a prompt of {len(prompt)} tokens")
    config = transfer_config("connector", f"file://{scratch}/store")
    if rate == "lossless":
        make_lossless(config)
    engine = {"model": str(model), "dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    first = serve(scratch, f"fp8-{rate}", engine, config, [prompt, prompt], "store")
    second = serve(scratch, f"fp8-{rate}", engine, config, [prompt], "hit")
    own, found = first["answers"][1], second["answers"][0]
    report_disk(scratch / "store", 10, len(prompt), n_bits=8)
    print(f"  hit: cached {found['cached']} tokens; 32 tokens compared")
    expect("cached tokens", found["cached"], 1248)
    if rate == "lossless":
        expect("the same tokens as by the engine's own prefix cache", found["tokens"], own["tokens"])


def make_lossless(config: dict[str, Any]) -> None:
    """The guide's configuration without its calibration and rate."""
    options = config["kv_connector_extra_config"]
    for name in ("kvtc.ratio", "kvtc.calibration"):
        del options[name]
    options["kvtc.lossless"] = True


def run_lossless(scratch: Path, model: Path) -> None:
    """Whatever the model's layers cache is loaded as it was saved: the answer is that of the engine's own prefix cache, which
    computes the rest of the prompt in the same products. (Computed whole, the prompt may give another answer.)"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    prompt = tokenizer((ROOT / "LICENSE").read_text()).input_ids[:1250]
    print(f"\nlossless: {model.name} in bfloat16, a prompt of {len(prompt)} tokens")
    config = transfer_config("connector", f"file://{scratch}/store")
    make_lossless(config)
    engine = {"model": str(model), "dtype": "bfloat16"}
    first = serve(scratch, "lossless", engine, config, [prompt, prompt], "store")
    second = serve(scratch, "lossless", engine, config, [prompt], "hit")
    cold, own, found = *first["answers"], *second["answers"]
    expect("nothing is cached at first", cold["cached"], 0)
    print(f"  hit: cached {found['cached']} tokens, by the engine itself {own['cached']}; 32 tokens compared")
    expect("cached tokens", found["cached"], 1248)
    expect("the same tokens as by the engine's own prefix cache", found["tokens"], own["tokens"])


def run_parallel(scratch: Path, prompt: list[int]) -> None:
    """A model with random weights: its answers say little, its pages are as any model's."""
    print(f"\nparallel: two workers, a random model of 4 heads in bfloat16, ratio 2, a prompt of {len(prompt)} tokens")
    texts = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    engine = {"model": str(random_models.make_parallel(scratch, texts)), "dtype": "bfloat16", "tensor_parallel_size": 2}
    config = transfer_config("connector", f"file://{scratch}/store")
    config["kv_connector_extra_config"] |= {
        "kvtc.calibration": f"{scratch}/{random_models.CALIBRATION}",
        "kvtc.ratio": 2,
    }
    first, second = (serve(scratch, "parallel", engine, config, [prompt], name) for name in ("store", "hit"))
    expect("nothing is cached at first", first["answers"][0]["cached"], 0)
    found = second["answers"][0]
    loaded = second["metrics"].get("vllm:kvtc_tokens_loaded")
    print(
        f"  hit: cached {found['cached']} tokens; vllm:kvtc_tokens_loaded {loaded} by both workers; 32 tokens compared"
    )
    expect("cached tokens", (found["cached"], loaded), (1248, 2 * 1248))
    expect("the same tokens", found["tokens"], first["answers"][0]["tokens"])


def run_canonical(scratch: Path, prompt: list[int]) -> None:
    """One calibration and one set of entries, whoever wrote them."""
    print(f"\ncanonical: two workers, then one, a random model in float32, ratio 2, a prompt of {len(prompt)} tokens")
    texts = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    engine = {"model": str(random_models.make_parallel(scratch, texts)), "dtype": "float32"}
    config = transfer_config("tier", f"file://{scratch}/store")
    extra = config["kv_connector_extra_config"]
    extra["canonical_layout"] = True
    extra["secondary_tiers"][0] |= {
        "kvtc.calibration": f"{scratch}/{random_models.WHOLE_CALIBRATION}",
        "kvtc.ratio": 2,
    }
    answers = {}
    for name, n_workers in (("store", 2), ("hit-2", 2), ("hit-1", 1)):
        size = {"tensor_parallel_size": n_workers}
        answers[name] = serve(scratch, "parallel", engine | size, config, [prompt], name)["answers"][0]
        entries = [file for file in (scratch / "store" / "entries").rglob("*") if file.is_file()]
        print(f"  {name}: cached {answers[name]['cached']} tokens; {len(entries)} files")
        expect("entries on disk", len(entries), 4)
    expect("cached tokens", [answer["cached"] for answer in answers.values()], [0, 1024, 1024])
    expect("the same tokens", answers["hit-2"]["tokens"], answers["store"]["tokens"])
    expect("the same tokens with one worker", answers["hit-1"]["tokens"], answers["store"]["tokens"])


def transfer_config(way: str, store: str) -> dict[str, Any]:
    """A configuration of the guide, with a store of the test's own and, for the tier, a specification that runs on CPUs."""
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/guides/vllm.md").read_text(), flags=re.DOTALL)
    for config in map(json.loads, blocks):
        extra = config["kv_connector_extra_config"]
        if (config["kv_connector"] == "OffloadingConnector") == (way == "tier"):
            options = extra["secondary_tiers"][0] if way == "tier" else extra
            options["kvtc.store"] = store
            if way == "tier":
                extra |= {
                    "spec_name": "CpuTieringSpec",
                    "spec_module_path": "vllm_cpu_spec",
                    "cpu_bytes_to_use": 64 << 20,
                }
            found: dict[str, Any] = config
            return found
    raise Failure(f"the guide has no configuration of the {way}")


def serve(
    scratch: Path, way: str, engine: dict[str, Any], config: dict[str, Any], order: list[list[int]], name: str
) -> dict[str, Any]:
    """One vLLM process -> its answers and metrics. engine: arguments of `vllm.LLM`."""
    task, result = scratch / f"{name}.task.json", scratch / f"{name}.result.json"
    task.write_text(json.dumps({"transfer_config": config, "engine": engine, "prompts": order}))
    log = Path(os.environ.get("KVTC_ENGINE_LOGS", scratch)) / f"vllm-{way}-{name}.log"
    with log.open("w") as output:
        process = subprocess.run(
            [sys.executable, HERE / "vllm_serve.py", task, result],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                # Two workers may find fewer cores than they would bind.
                **({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if way == "parallel" else {}),
                "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
                "HF_HUB_OFFLINE": "1",
            },
            check=False,
        )
    if process.returncode or not result.is_file():
        raise Failure(f"vLLM ended with {process.returncode}:\n" + "\n".join(log.read_text().splitlines()[-40:]))
    for line in log.read_text().splitlines():
        if "kvtc, " in line:
            print(f"  {name}: vLLM logs: {line[line.index('kvtc, ') :]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def compare(way: Way, name: str, found: dict[str, Any], tokens: list[list[int]]) -> None:
    cached = [answer["cached"] for answer in found["answers"]]
    hits = found["metrics"]["vllm:external_prefix_cache_hits"]
    print(
        f"  {name}: cached {cached} tokens; vllm:external_prefix_cache_hits {hits:.0f}; {len(tokens)} x 32 tokens compared"
    )
    expect(f"cached tokens, {name}", cached, way.hits[name])
    expect(f"the same tokens, {name}", [answer["tokens"] for answer in found["answers"]], tokens)


def report_disk(store: Path, n_entries: int, n_tokens: int, n_bits: int = 16) -> None:
    """What lies on the disk, every byte, against the same tokens at 16 bits a value, or as many as the engine's cache has."""
    from kvtc.reference import reference_calibration

    files = [file for file in (store / "entries").rglob("*") if file.is_file()]
    expect("entries on disk", len(files), n_entries)
    original = reference_calibration().geometry.joint_features * n_bits // 8 * n_tokens
    stored = sum(file.stat().st_size for file in files)
    print(f"  store: {len(files)} files, {stored} bytes for {n_tokens} tokens, {original} bytes at {n_bits} bits")
    print(f"  store: total ratio on disk {original / stored:.2f}")


def damage(store: Path, position: int) -> str:
    """Flip a byte, on disk, of every chunk that begins at a position."""
    from kvtc import inspect
    from kvtc.store import open_store

    with open_store(f"file://{store}") as opened:
        streams = [opened.get(key) or b"" for key in opened.keys() if not key.startswith("tails/")]  # noqa: SIM118
    chosen = [stream for stream in streams if inspect(stream).first_position == position]
    damaged = []
    for file in (file for file in (store / "entries").rglob("*") if file.is_file()):
        data = bytearray(file.read_bytes())
        if any(stream in data for stream in chosen):
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
            damaged.append(file.name)
    return f"one bit of {', '.join(damaged)} is flipped"


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failure(f"{what}: expected {wanted}, found {found}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
