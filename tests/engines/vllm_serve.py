"""One vLLM process: answer some prompts, write what came out of it as JSON. Run by `vllm_end_to_end.py`, in vLLM's environment."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "task",
        type=Path,
        help="JSON: transfer_config, prompts (token ids), engine (of vllm.LLM), settle",
    )
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    task = json.loads(arguments.task.read_text())
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from kvtc.reference import MODEL_DIRECTORY

    answers = []
    llm = LLM(
        **({"model": str(MODEL_DIRECTORY)} | task["engine"]),
        max_model_len=2048,
        enforce_eager=True,
        max_num_seqs=4,
        block_size=32,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**task["transfer_config"]),
    )
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for prompt in task["prompts"]:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling)
        answers.append({"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens})
        # Saving goes on in the background, in steps of the engine where it runs beside the scheduler.
        time.sleep(task.get("settle", 1))
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    del llm
    kept = {
        name: value
        for name, value in metrics.items()
        if "prefix_cache" in name or "kv_offload" in name or "kvtc" in name
    }
    arguments.result.write_text(json.dumps({"answers": answers, "metrics": kept}))


if __name__ == "__main__":
    main()
