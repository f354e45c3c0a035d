"""kvtc in LMCache, for real: LMCache's server beside vLLM, the reference model, and vLLM's own account of hits.

    store     vLLM answers a prompt, uncached; LMCache's server stores its chunks in seven places at once, in each through kvtc
    hit       for each place: a new server that has nothing but that place, a new vLLM: the chunks come back, the same tokens
    process   LMCache's engine inside a process, without its server: caches go to kvtc's remote plugin and come back
    damaged   a stored chunk is damaged on disk; new processes load what comes before it, compute the rest: the same tokens
    lossless  other models: a random one that caches latents, and SmolLM2-135M and Gemma 3 270M (windows in 15 of 18 layers) if
              `make bench-models` has installed them; the tokens are those of vLLM's own prefix cache

Run in LMCache's environment: `make test-engines ENGINES=lmcache`, or this script with some of reference, lossless. Prints what is
stored, and exits with 1 where something differs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lmcache_places import (
    FilePlace,
    Place,
    PluginPlace,
    PluginRedisPlace,
    PluginS3Place,
    RedisPlace,
    S3Place,
    bucket_host,
    free_port,
    redis_server,
    running,
    s3_server,
)
from vllm_end_to_end import HERE, ROOT, Failure, expect, models, prompts

RATIO = 8
CHUNK_TOKENS, PAGE_TOKENS = 256, 32
N_CHUNKS = 4
ANSI = "\x1b\\[[0-9;]*m"


def main() -> None:
    chosen = sys.argv[1:] or ["reference", "lossless"]
    if "reference" in chosen:
        run_reference()
    if "lossless" in chosen:
        with tempfile.TemporaryDirectory() as made:
            for model in models(Path(made))[1:]:  # kvtc-6m is above
                with tempfile.TemporaryDirectory() as scratch:
                    run_lossless(Path(scratch), model)
    print("all as it must be")


def run_reference() -> None:
    """kvtc-6m, in every place."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as servers:
        scratch = Path(directory)
        servers.enter_context(bucket_host())
        options = chunk_options()
        redis_port, s3_port = servers.enter_context(redis_server(scratch)), servers.enter_context(s3_server())
        places: list[Place] = [
            PluginPlace(scratch, options),
            PluginRedisPlace(redis_port, options),
            PluginS3Place(s3_port, options),
            FilePlace(scratch, options),
            RedisPlace(redis_port, options),
            S3Place(s3_port, options),
            PluginPlace(scratch, exact_options(options), "plugin, lossless"),
        ]
        prompt = prompts()[0]
        print(f"lmcache: kvtc-6m in bfloat16, ratio {RATIO}, a prompt of {len(prompt)} tokens, pages {options}")
        tokens = store(scratch, places, prompt)
        for place in places:
            report(place)
        for place in places:
            answer_again(scratch, place, prompt, tokens, cached=N_CHUNKS * CHUNK_TOKENS)
        print(f"  damaged: {damage(places[0])}")
        answer_again(scratch, places[0], prompt, tokens, cached=2 * CHUNK_TOKENS)
        in_process(scratch)


def run_lossless(scratch: Path, model: Path) -> None:
    """Pages of any kind, by kvtc's adapter without a calibration."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    # vLLM's own prefix cache then has as many of its tokens as whole chunks have.
    prompt = tokenizer((ROOT / "LICENSE").read_text()).input_ids[: N_CHUNKS * CHUNK_TOKENS + PAGE_TOKENS // 2]
    print(f"\nlossless: {model.name} in bfloat16, a prompt of {len(prompt)} tokens")
    place = PluginPlace(scratch, {"kvtc.model": str(model), "kvtc.lossless": True}, "plugin, lossless")
    # On CPUs LMCache moves pages of one block table alone: windows are then cached like full attention.
    engine = {"model": str(model), "disable_hybrid_kv_cache_manager": True}
    with lmcache_server(scratch, "store", [place]) as port:
        cold, own = ask(scratch, "store", port, [prompt, prompt], engine)
    expect("nothing is cached at first", cold["cached"], 0)
    print(f"  store: {len(place.sizes())} entries, {sum(place.sizes())} bytes")
    with lmcache_server(scratch, "hit", [place]) as port:
        (found,) = ask(scratch, "hit", port, [prompt], engine)
    print(f"  hit: cached {found['cached']} tokens, by the engine itself {own['cached']}; 32 tokens compared")
    expect("cached tokens", (found["cached"], own["cached"]), (N_CHUNKS * CHUNK_TOKENS,) * 2)
    expect("the same tokens as by the engine's own prefix cache", found["tokens"], own["tokens"])


def chunk_options() -> dict[str, Any]:
    """What a user writes for this machine: vLLM's CPU attention packs its pages, which LMCache does not know."""
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from kvtc.engines.page_layout import vllm_layout
    from kvtc.reference import MODEL_DIRECTORY, reference_calibration

    geometry = reference_calibration().geometry
    sizes = geometry.n_layers, geometry.n_kv_heads, geometry.head_dim
    isa = _get_attn_isa(torch.bfloat16, PAGE_TOKENS, geometry.head_dim)
    packing = vllm_layout(*sizes, PAGE_TOKENS, backend="CPU_ATTN", isa=isa).packing
    return {
        "kvtc.calibration": "reference",
        "kvtc.model": str(MODEL_DIRECTORY),
        "kvtc.ratio": RATIO,
        "kvtc.packing": packing,
        "kvtc.page_tokens": PAGE_TOKENS,
    }


def exact_options(options: dict[str, Any]) -> dict[str, Any]:
    """The same without a calibration, bit for bit."""
    left_out = ("kvtc.calibration", "kvtc.ratio")
    return {name: value for name, value in options.items() if name not in left_out} | {"kvtc.lossless": True}


def store(scratch: Path, places: list[Place], prompt: list[int]) -> list[int]:
    """The tokens of an uncached answer, once its chunks lie in all places."""
    with lmcache_server(scratch, "store", places) as port:
        (answer,) = ask(scratch, "store", port, [prompt])
        expect("nothing is cached at first", answer["cached"], 0)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and any(len(place.sizes()) < N_CHUNKS for place in places):
            time.sleep(0.5)
    tokens: list[int] = answer["tokens"]
    return tokens


def report(place: Place) -> None:
    """What lies in a place, every byte of its values, against the same tokens at 16 bits a number."""
    from kvtc.reference import reference_calibration

    sizes = place.sizes()
    expect(f"chunks stored, {place.name}", len(sizes), N_CHUNKS)
    original = reference_calibration().geometry.joint_features * 2 * N_CHUNKS * CHUNK_TOKENS
    print(
        f"  store: {place.name}: {len(sizes)} chunks, {sum(sizes)} bytes for {original} at 16 bits: total ratio "
        f"{original / sum(sizes):.2f}"
    )


def answer_again(scratch: Path, place: Place, prompt: list[int], tokens: list[int], cached: int) -> None:
    name = f"hit-{re.sub('[^a-z0-9]+', '-', place.name.lower())}-{cached}"
    with lmcache_server(scratch, name, [place]) as port:
        (answer,) = ask(scratch, name, port, [prompt])
    print(f"  hit: {place.name}: cached {answer['cached']} tokens; {len(tokens)} tokens compared")
    for line in log_path(scratch, f"server-{name}").read_text().splitlines():
        if "retained keys" in line or "kvtc, " in line:
            print(f"       {re.sub(r'.*INFO:|' + ANSI, '', line).strip()}")
    expect(f"cached tokens, {place.name}", answer["cached"], cached)
    expect(f"the same tokens, {place.name}", answer["tokens"], tokens)


def damage(place: Place) -> str:
    """Flip a byte, on disk, of the chunk that begins at position 512."""
    from kvtc import inspect
    from kvtc.store import open_store

    if not isinstance(place, PluginPlace):
        raise Failure(f"nothing to damage in {place.name}")
    with open_store(f"file://{place.directory}") as opened:
        described = {key: inspect(opened.get(key) or b"").first_position for key in opened.keys()}  # noqa: SIM118
    expect("positions in streams", sorted(described.values()), [0, 256, 512, 768])
    (key,) = [key for key, position in described.items() if position == 2 * CHUNK_TOKENS]
    (file,) = [file for file in place.files() if key.rsplit("/", 1)[1] in file.name]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return f"a byte of {file.name[:60]}.. is flipped"


def in_process(scratch: Path) -> None:
    """LMCache's engine inside a process, with kvtc as its remote storage plugin."""
    log = log_path(scratch, "in-process")
    with log.open("w") as output:
        command = [sys.executable, HERE / "lmcache_in_process.py"]
        process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment(), check=False)
    print("\n".join(line for line in log.read_text().splitlines() if line.startswith("  in process:")))
    expect("exit status of the engine in a process", process.returncode, 0)


@contextmanager
def lmcache_server(scratch: Path, name: str, places: list[Place]) -> Iterator[int]:
    """A new server with these places behind it -> its port."""
    port, http_port = free_port(), free_port()
    adapters = [part for place in places for part in ("--l2-adapter", json.dumps(place.adapter))]
    # Only the serde needs kvtc's launcher.
    needs_launcher = any("serde" in place.adapter for place in places)
    launcher = [sys.executable, "-m", "kvtc.engines.lmcache.server"]
    command = [*(launcher if needs_launcher else [str(Path(sys.prefix) / "bin" / "lmcache")]), "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(http_port)]
    command += ["--l1-size-gb", "1", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
    # The default mode moves pages on GPUs; metrics are off because nobody collects them, events are on.
    command += ["--supported-transfer-mode", "auto", "--disable-metrics", *adapters]
    with (
        log_path(scratch, f"server-{name}").open("w") as log,
        running(*command, port=http_port, stdout=log, env=environment()),
    ):
        yield port


def ask(
    scratch: Path, name: str, port: int, order: list[list[int]], engine: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One vLLM process -> its answers to prompts. engine: arguments of `vllm.LLM`."""
    task, result = scratch / f"{name}.task.json", scratch / f"{name}.result.json"
    config = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }
    work = {
        "transfer_config": config,
        "engine": {"dtype": "bfloat16"} | (engine or {}),
        "prompts": order,
        "settle": 5,
    }
    task.write_text(json.dumps(work))
    log = log_path(scratch, f"vllm-{name}")
    with log.open("w") as output:
        process = subprocess.run(
            [sys.executable, HERE / "vllm_serve.py", task, result],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            check=False,
        )
    if process.returncode or not result.is_file():
        raise Failure(f"vLLM ended with {process.returncode}:\n" + "\n".join(log.read_text().splitlines()[-40:]))
    found: list[dict[str, Any]] = json.loads(result.read_text())["answers"]
    return found


def log_path(scratch: Path, name: str) -> Path:
    return Path(os.environ.get("KVTC_ENGINE_LOGS", scratch)) / f"{name}.log"


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "DO_NOT_TRACK": "1",
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that servers are stopped
    try:
        main()
    except (Failure, RuntimeError) as failure:
        sys.exit(f"FAILED: {failure}")
