"""A serving engine under load, without a tier and with each kind of one: vLLM, conversations that share their beginning.

    python -m benchmarks.serving.engine_load --model DIRECTORY --text FILE [--calibration FILE] [--minutes 10]
        [--settings none none lossless tier-lossless uncompressed] [--conversations 16] [--running 4] [--cache-tokens 6144]

Run in vLLM's environment (`tests/engines/setup.sh vllm DIRECTORY`). So many conversations are open at a time. Each begins with
the same system prompt and grows by a turn of held-out text; the text also stands for the answers of earlier turns, so that every
setting gets the same requests, in the same order within a conversation. A turn is asked as soon as the one before it is answered.
A conversation that is full makes room for another one. The engine answers few requests at a time, and its own cache holds fewer
tokens than the open conversations have, so that prefixes fall out of it.

Settings, each in an engine of its own with an empty store:

    none                                  no tier
    lossless, ratio=16, kl=0.01, ..       kvtc's connector
    tier-lossless, tier-ratio=16, ..      kvtc as the secondary tier of vLLM's offloading
    uncompressed                          vLLM's own secondary tier of files

vLLM's offloading goes through a tier in host memory, which holds as many tokens as the engine's cache. On CPUs it needs
`tests/engines/vllm_cpu_spec.py`, which copies the blocks. Answers are compared with those of the first setting, as far as both
answered the same request; naming `none` twice shows how many change only because requests are batched otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from benchmarks.shared.vllm_engine import (
    connector,
    offloading,
    rate_options,
    run_alone,
    stored,
    token_bytes,
    uncompressed,
)
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_table

SEED = 20261130
BLOCK_TOKENS = 32
_TIER = "tier-"
_COUNTED = ("prefix_cache", "kv_offload", "kvtc", "preemptions")
_DEADLINE_SECONDS = 300
"""Of one request: a hang ends the run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="held-out running text")
    parser.add_argument("--calibration", help="for settings with a rate")
    parser.add_argument("--settings", nargs="+", default=["none", "none", "lossless", "tier-lossless", "uncompressed"])
    parser.add_argument("--minutes", type=float, default=10, help="of load, for each setting")
    parser.add_argument("--conversations", type=int, default=16, help="open at a time")
    parser.add_argument("--running", type=int, default=4, help="requests that the engine answers at a time")
    parser.add_argument("--cache-tokens", type=int, default=6144, help="of the engine's own cache")
    parser.add_argument("--system-tokens", type=int, default=512, help="of the beginning that all share")
    parser.add_argument("--turn-tokens", type=int, default=96, help="by which a turn is longer than the one before")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--full-tokens", type=int, default=1536, help="of a conversation's longest prompt")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        options.process.write_text(json.dumps(asyncio.run(serve(options, json.loads(options.process.read_text())))))
        return
    runs = []
    for setting in options.settings:
        found = run_alone("benchmarks.serving.engine_load", setting, {"setting": setting})
        if found is not None:
            runs.append(found)
            print(f"{setting}: {len(found['requests'])} requests in {found['seconds']:.0f} s", flush=True)
    rows = [described(run, runs[0]) for run in runs]
    print_table(rows)
    measured = [{name: run[name] for name in ("setting", "metrics")} for run in runs]
    save_result("engine_load", {"kind": "engine load", "rows": rows, "runs": measured})


def prompts(options: argparse.Namespace, ids: Sequence[int], seat: int) -> Iterator[tuple[str, list[int]]]:
    """One conversation after the other of a seat: the name and the prompt of each turn.

    Parameters:
        options: The command line.
        ids: Of the text; the system prompt is its beginning.
        seat: Number of the conversation among those that are open at a time.
    """
    system, rest = list(ids[: options.system_tokens]), ids[options.system_tokens :]
    generator = random.Random(f"{SEED}/{seat}")
    number = 0
    while True:
        first = generator.randrange(len(rest) - options.full_tokens)
        # Not all seats fill up at the same time.
        length = options.system_tokens + generator.randint(1, options.turn_tokens)
        while length <= options.full_tokens:
            yield f"{seat}/{number}/{length}", [*system, *rest[first : first + length - len(system)]]
            length += options.turn_tokens
        number += 1


async def serve(options: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """One engine under load: what it answered, what it counted, and what was stored."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from transformers import AutoTokenizer
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    ids = AutoTokenizer.from_pretrained(options.model, local_files_only=True).encode(options.text.read_text())
    if len(ids) < 2 * options.full_tokens:
        sys.exit(f"{options.text} has {len(ids)} tokens; expected at least {2 * options.full_tokens}")
    arguments = AsyncEngineArgs(
        model=options.model,
        dtype="bfloat16",
        max_model_len=options.full_tokens + options.answer_tokens + BLOCK_TOKENS,
        enforce_eager=True,
        max_num_seqs=options.running,
        block_size=BLOCK_TOKENS,
        num_gpu_blocks_override=options.cache_tokens // BLOCK_TOKENS,
    )
    token = token_bytes(arguments.create_model_config())
    if (config := transfer(options, task, token)) is not None:
        arguments.kv_transfer_config = KVTransferConfig(**config)
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        # What a first request alone does, of a text that begins like no other; it is stored.
        await ask(engine, "first", ids[options.system_tokens :: -1], options.answer_tokens)
        before, cpu_before = metrics(), cpu_seconds()
        requests, seconds = await load(engine, options, ids)
        if task["setting"] != "none":
            await asyncio.to_thread(stored, task["store"])
        cpu = cpu_seconds() - cpu_before
        # Counts come with the steps of the engine: one more brings those of what was saved after the load.
        await ask(engine, "last", ids[: options.system_tokens : -1][:8], 1)
        counted = {name: value - before.get(name, 0) for name, value in metrics().items()}
    finally:
        engine.shutdown()
    found = {
        "setting": task["setting"],
        "requests": requests,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "metrics": counted,
    }
    return found | on_disk(Path(task["store"]), counted, token)


def on_disk(store: Path, counted: Mapping[str, float], token: int) -> dict[str, Any]:
    """Bytes that are stored, and how many times as many they are in 16 bits: for kvtc, of all that was written."""
    blocks = list(store.rglob("*.bin"))  # vLLM's own
    n_bytes = sum(file.stat().st_size for file in [*store.rglob("*.entry"), *blocks])
    written = counted.get("vllm:kvtc_saved_bytes", 0)
    if written:
        return {"bytes": n_bytes, "ratio": counted["vllm:kvtc_original_bytes"] / written}
    return {"bytes": n_bytes, "ratio": token * BLOCK_TOKENS * len(blocks) / n_bytes if blocks else None}


async def load(engine: Any, options: argparse.Namespace, ids: Sequence[int]) -> tuple[dict[str, Any], float]:
    """Keep all seats busy for the time that is given -> requests by name, and the seconds until the last one was answered."""
    begin = time.monotonic()
    answered: dict[str, Any] = {}

    async def sit(seat: int) -> None:
        for name, prompt in prompts(options, ids, seat):
            if time.monotonic() - begin > 60 * options.minutes:
                return
            async with asyncio.timeout(_DEADLINE_SECONDS):
                answered[name] = await ask(engine, name, prompt, options.answer_tokens)

    async with asyncio.TaskGroup() as seats:
        for seat in range(options.conversations):
            seats.create_task(sit(seat))
    return answered, time.monotonic() - begin


async def ask(engine: Any, name: str, prompt: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """Greedy tokens, how many tokens of the prompt were not computed, and seconds to the first token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
    begin, first, last = time.monotonic(), 0.0, None
    async for output in engine.generate({"prompt_token_ids": list(prompt)}, sampling, name):
        first, last = first or time.monotonic() - begin, output
    return {"tokens": list(last.outputs[0].token_ids), "cached": last.num_cached_tokens, "first_token": first}


def transfer(options: argparse.Namespace, task: Mapping[str, Any], token: int) -> dict[str, Any] | None:
    """vLLM's configuration of a setting's tier. token: bytes of one in the engine's cache."""
    setting, store = task["setting"], task["store"]
    if setting == "none":
        return None
    if setting == "uncompressed":
        return offloading(uncompressed(store), token * options.cache_tokens)
    if setting.startswith(_TIER):
        rate = rate_options(setting.removeprefix(_TIER), options.calibration)
        tier = {"type": "KvtcTier", "module_path": "kvtc.engines.vllm.tier", "kvtc.store": f"file://{store}"}
        return offloading(tier | rate, token * options.cache_tokens, block_size=256)
    return connector(store, setting, options.calibration)


def metrics() -> dict[str, float]:
    """Counters of the engine that tell of hits and tiers."""
    from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

    counted: dict[str, float] = {}
    for metric in get_metrics_snapshot():
        if isinstance(metric, Counter) and any(word in metric.name for word in _COUNTED):
            counted[metric.name] = counted.get(metric.name, 0) + metric.value
    return counted


def cpu_seconds() -> float:
    """Of this process, which asks and takes the answers, and of all that it started."""
    import psutil

    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def described(run: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """A row of the table. first: the run whose answers are compared with."""
    answers = run["requests"]
    seconds = sorted(answer["first_token"] for answer in answers.values())
    n_tokens = sum(len(answer["tokens"]) for answer in answers.values())
    both = answers.keys() & first["requests"].keys()
    counted = run["metrics"]

    def share(name: str) -> float:
        asked = counted.get("vllm:prefix_cache_queries", 0)
        return float(counted.get(f"vllm:{name}_hits", 0) / asked) if asked else 0.0

    return {
        "setting": run["setting"],
        "requests": len(answers),
        "tokens_per_second": n_tokens / run["seconds"],
        "first_token_median": median(seconds),
        "first_token_p95": quantiles(seconds, n=20)[-1],
        "own_hits": share("prefix_cache"),
        "external_hits": share("external_prefix_cache"),
        "cpu_per_token": run["cpu_seconds"] / n_tokens,
        "bytes": run["bytes"],
        "ratio": run["ratio"],
        "compared": len(both),
        "equal": fmean(answers[name]["tokens"] == first["requests"][name]["tokens"] for name in both) if both else None,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    header = ["setting", "requests", "tokens/s", "first token", "p95", "own hits", "external hits", "CPU/token"]
    header += ["bytes stored", "ratio to 16 bits", "equal answers"]
    table = [
        [
            row["setting"],
            str(row["requests"]),
            f"{row['tokens_per_second']:.1f}",
            f"{1e3 * row['first_token_median']:.0f} ms",
            f"{1e3 * row['first_token_p95']:.0f} ms",
            f"{100 * row['own_hits']:.1f} %",
            f"{100 * row['external_hits']:.1f} %",
            f"{1e3 * row['cpu_per_token']:.1f} ms",
            str(row["bytes"] or ""),
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            f"{100 * row['equal']:.1f} % of {row['compared']}" if row["compared"] else "",
        ]
        for row in rows
    ]
    print(format_table(header, table))


if __name__ == "__main__":
    main()
