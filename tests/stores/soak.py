"""Readers and writers on one store for as long as asked, with every value checked: `python -m tests.stores.soak --seconds 300`.

Four processes of four threads each. Every thread has keys of its own, which nobody else writes, so that it knows which entries
must be there, and shares others with all. Exits with 1 where an entry was lost, a value was not what was put, or memory grew.
On a disk, on a disk with a budget (where an absent entry is no loss), and on a Redis server started for it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvtc.errors import StoreError
from kvtc.store import Store, open_store

from .servers import redis_server
from .writer import value_of

N_PROCESSES, N_THREADS = 4, 4
N_OWN_KEYS, N_SHARED_KEYS = 60, 400
BUDGET_BYTES = 8_000_000
GROWTH_BYTES = 64 << 20  # of a process after its first quarter: the allocator's slack, not a leak of values


class Thread(threading.Thread):
    """One reader and writer; `counts` says what it met."""

    def __init__(self, store: Store, name: str, deadline: float, may_forget: bool) -> None:
        super().__init__(name=name)
        self.store, self.deadline, self.may_forget = store, deadline, may_forget
        self.random = random.Random(name)
        self.own: dict[str, bool] = {f"own/{name}/{i}": False for i in range(N_OWN_KEYS)}
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        while time.monotonic() < self.deadline:
            try:
                self.step()
            except StoreError as error:
                self.counts["errors"] += 1
                self.counts[f"error: {error}"[:200]] += 1

    def step(self) -> None:
        is_own = self.random.random() < 0.5
        key = self.random.choice(list(self.own)) if is_own else f"common/{self.random.randrange(N_SHARED_KEYS)}"
        action = self.random.random()
        if action < 0.35:
            self.store.put(key, value_of(key))
            self.counts["puts"] += 1
            if is_own:
                self.own[key] = True
        elif action < 0.4:
            self.store.delete(key)
            self.counts["deletes"] += 1
            if is_own:
                self.own[key] = False
        elif action < 0.5:
            keys = [key, *self.random.sample(list(self.own), 5)]
            for one, value in zip(keys, self.store.get_many(keys), strict=True):
                self.check(one, value)
        else:
            self.check(key, self.store.get(key))

    def check(self, key: str, value: bytes | None) -> None:
        self.counts["gets"] += 1
        if value is None:
            self.counts["misses"] += 1
            self.counts["lost"] += self.own.get(key, False) and not self.may_forget
            return
        self.counts["bytes_read"] += len(value)
        self.counts["wrong"] += value != value_of(key)
        self.counts["deleted_but_there"] += self.own.get(key) is False


def work(url: str, number: int, seconds: float, may_forget: bool, results: Any) -> None:
    with open_store(url) as store:
        deadline = time.monotonic() + seconds
        threads = [Thread(store, f"{number}-{i}", deadline, may_forget) for i in range(N_THREADS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        early = resident_bytes()
        for thread in threads:
            thread.join()
        counts: Counter[str] = Counter()
        for thread in threads:
            counts.update(thread.counts)
        counts["damaged"], counts["evictions"] = store.statistics().damaged, store.statistics().evictions
        results.put((counts, early, resident_bytes()))


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def soak(name: str, url: str, seconds: float, may_forget: bool) -> bool:
    """Whether nothing was amiss; prints one line of JSON."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=work, args=(url, i, seconds, may_forget, results)) for i in range(N_PROCESSES)]
    for worker in workers:
        worker.start()
    counts: Counter[str] = Counter()
    growth = peak = 0
    for _ in workers:
        one, early, late = results.get(timeout=seconds + 120)
        counts.update(one)
        growth, peak = max(growth, late - early), max(peak, late)
    for worker in workers:
        worker.join()
    amiss = {key: counts[key] for key in ("wrong", "lost", "deleted_but_there", "damaged", "errors")}
    operations = counts["puts"] + counts["gets"] + counts["deletes"]
    figures = {"store": name, "seconds": seconds, "concurrent": N_PROCESSES * N_THREADS} | amiss
    figures |= {key: counts[key] for key in ("gets", "misses", "puts", "deletes", "evictions")}
    figures |= {
        "operations_per_second": round(operations / seconds),
        "megabytes_read_per_second": round(counts["bytes_read"] / seconds / 1e6, 1),
        "resident_megabytes": round(peak / 1e6),
        "growth_megabytes": round(growth / 1e6, 1),
    }
    print(json.dumps(figures), flush=True)
    for text in counts:
        if text.startswith("error: "):
            print(f"  {counts[text]} x {text}", flush=True)
    return not any(amiss.values()) and growth <= GROWTH_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="for each store (300)")
    seconds = parser.parse_args().seconds
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtc-soak-")))
        is_well = soak("file", f"file://{path}/plain", seconds, may_forget=False)
        is_well &= soak("file with a budget", f"file://{path}/budget?bytes={BUDGET_BYTES}", seconds, may_forget=True)
        used = sum(-(-entry.stat().st_size // 4096) * 4096 for entry in (path / "budget").rglob("*.entry"))
        print(f"disk with a budget of {BUDGET_BYTES} bytes: {used} used at the end", flush=True)
        is_well &= used <= BUDGET_BYTES
        try:
            server = stack.enter_context(redis_server(path))
        except pytest.skip.Exception as reason:
            print(f"Redis left out: {reason}")
        else:
            is_well &= soak("redis", f"redis://127.0.0.1:{server.port}?timeout=30", seconds, may_forget=False)
    print("nothing amiss" if is_well else "FAILED")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
