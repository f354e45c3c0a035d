"""One engine process that answers prompts for ever, to be killed: `python -m tests.engines.serving_process STORE SEED`.

Prompts are drawn from few, so that most are loaded in part from what other processes saved. The model has windows beside full
attention. After each prompt a line is printed: its tokens and how many were loaded. The exit code is 3 if a page that was loaded
has other bytes than the model computes for it, which are known without a model.
"""

from __future__ import annotations

import random
import sys

import torch

from tests.builders import HEAD_DIM, N_HEADS, N_LAYERS, same_bits, told_cache, told_ids
from tests.fake_engine import FakeEngine
from tests.fake_vllm import configs, fake_vllm

WINDOWS = {1: 300, 2: 300}
LENGTHS = (300, 520, 700, 1030)
N_TEXTS = 6
WRONG = 3


def main() -> None:
    store, seed = sys.argv[1:]
    generator = random.Random(seed)
    options = {"kvtc.lossless": True, "kvtc.store": store, "kvtc.identity": "tiny", "kvtc.threads": 2}
    shape = {"n_layers": N_LAYERS, "n_kv_heads": N_HEADS, "head_dim": HEAD_DIM}
    number = 0
    while True:
        with fake_vllm():
            from kvtc.engines.vllm.connector import KvtcConnector

            config = configs(options, **shape, dtype=torch.bfloat16, windows=WINDOWS, layers_per_table=1)
            engine = FakeEngine(KvtcConnector, *config, n_blocks=512)
            for _ in range(4):
                text, length = generator.randrange(N_TEXTS), generator.choice(LENGTHS)
                truth = told_cache(length, torch.bfloat16, seed=text)
                n_loaded, found = engine.run(f"r{number}", told_ids(length, text).tolist(), truth)
                for layer in range(N_LAYERS):
                    first = max(0, length - WINDOWS[layer] + 1) if layer in WINDOWS else 0
                    sides = (found.keys, truth.keys), (found.values, truth.values)
                    if not all(same_bits(side[layer, :, first:], wanted[layer, :, first:]) for side, wanted in sides):
                        sys.exit(WRONG)
                print(length, n_loaded, flush=True)
                number += 1
            engine.finish()


if __name__ == "__main__":
    main()
