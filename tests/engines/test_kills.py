"""Engines that are killed at any moment: no page with other bytes, no entry that is damaged, a directory within its budget.

KVTC_KILLS says how many processes are killed; `make test-faults` kills 200.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from kvtc.maintenance.verification import verify
from kvtc.store import open_place, open_store

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("KVTC_KILLS", "3"))
BUDGET, DEADLINE_SECONDS = 400_000, 60


def start(store: str, seed: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.engines.serving_process", store, str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def answered(engine: subprocess.Popen[str]) -> list[tuple[int, int]]:
    """(tokens, loaded) of the prompts whose lines are whole."""
    text = engine.stdout.read()
    engine.stdout.close()
    lines = (line.split() for line in text[: text.rfind("\n") + 1].splitlines())
    return [(int(length), int(n_loaded)) for length, n_loaded in lines]


def disk_bytes(root: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in (root / "entries").rglob("*") if file.is_file())


def test_engines_killed_at_any_moment_never_give_a_wrong_page(tmp_path):
    url, generator = f"file://{tmp_path}/store?bytes={BUDGET}", random.Random(16)
    n_loaded = 0
    for kill in range(N_KILLS):
        engines = [start(url, 2 * kill + each) for each in range(2)]  # two at a time, as workers of one machine
        assert all(engine.stdout.readline() for engine in engines)  # the first prompt is answered
        time.sleep(generator.uniform(0, 1.5))
        for engine in engines:
            engine.kill()
        begin = time.monotonic()
        for engine in engines:
            n_loaded += sum(loaded for _, loaded in answered(engine))
            assert engine.wait(DEADLINE_SECONDS) == -9  # neither wrong (3) nor ended by an error
        with open_store(url) as store:
            store.flush()
        assert disk_bytes(tmp_path / "store") <= BUDGET
        assert time.monotonic() - begin < DEADLINE_SECONDS
    with open_place(f"file://{tmp_path}/store") as place:
        found = verify(place)
    print(f"{2 * N_KILLS} engines killed, {n_loaded} tokens loaded, {found}")
    assert not found.faults
    assert n_loaded or N_KILLS < 3
