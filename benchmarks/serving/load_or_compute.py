"""From which context length on loading a prefix beats computing it, by tier, and what loading
spends its time on.

    python -m benchmarks.serving.load_or_compute --text FILE [--lengths 256 512 1024 2048 4000] [--stores memory file redis s3]

Servers of Redis and S3 (moto) are started for the run. `tiered` is memory over files over Redis:
once the prefix is in memory, and `tiered, cold` where it is in Redis alone and is copied into the
others. Every length is measured `--repeats` times, computing and loading from every store in turns;
medians, and the median of how many times as long computing took. Shares of loading: fetching, which
counts while nothing else goes on (chunks are fetched while others are decoded), entropy decoding
and dequantizing, the inverse transform, and the rest (rotation, putting together). `--redraw` draws
the picture of the saved results again.
"""

import argparse
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import wraps
from statistics import median
from unittest.mock import patch

import kvtc
from benchmarks.shared.first_token import (
    IMAGES,
    add_codec_arguments,
    first_token,
    parse,
    raw_bytes,
    saved_result,
    start,
    token_ids,
)
from benchmarks.shared.stores import NAMES, open_stores
from benchmarks.shared.timing import timed
from kvtc.entries import Entries
from kvtc.evaluate.provenance import save_result
from kvtc.profiles.joint.decoder import JointDecoder
from kvtc.report.charts import save_picture
from kvtc.report.parts import Chart, Point
from kvtc.report.table import format_bytes, format_table

NAME, COLD = "load_or_compute", "tiered, cold"
STAGES = {
    "fetch": [(Entries, "load"), (Future, "result")],
    "entropy decode": [(JointDecoder, "entropy_decode"), (JointDecoder, "add_prediction")],
    "inverse transform": [(JointDecoder, "reconstruct")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_codec_arguments(parser, draws=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4000])
    parser.add_argument("--stores", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--repeats", type=int, default=7)
    options = parse(parser)
    if not options.redraw:
        run(options)
    plot(saved_result(NAME)["rows"])


def run(options: argparse.Namespace) -> None:
    model, tokenizer, codec = start(options)
    rows = []
    with open_stores(options.stores) as stores:
        for n in options.lengths:
            rows += measure(model, codec, stores, token_ids(tokenizer, options.text[0], 0.1, n), options.repeats)
    rows.sort(key=lambda row: [*options.stores, COLD].index(row["store"]))
    print_rows(rows)
    settings = {"profile": options.profile, "ratio": options.ratio, "window_tokens": options.window}
    save_result(NAME, {"kind": NAME, **settings, "repeats": options.repeats, "rows": rows})


def measure(model, codec, stores: dict, ids, repeats: int) -> list[dict]:
    """One text, a row for each store: medians in seconds.

    Loading counts up to a cache to go on from; computing up to the cache of the same tokens.
    """
    _, cache, _ = first_token(model, ids, None)
    runs: dict[str, list[dict]] = {}
    with ExitStack() as stack:
        # A namespace for each length: what is stored is then all that this length needs, and not what a shorter one left.
        opened = {
            name: stack.enter_context(kvtc.PrefixCache(codec, store, min_tokens=1, namespace=str(len(ids))))
            for name, store in stores.items()
        }
        saved = {name: timed(lambda p=prefixes: p.save(ids, cache).result()) for name, prefixes in opened.items()}
        for turn in range(repeats + 1):
            compute = first_token(model, ids, None)[2]
            for name in rotated(list(opened), turn):
                if name == "tiered":
                    empty_all_but_the_last(stores[name])
                    runs.setdefault(COLD, []).append(load(opened[name], ids, compute))
                runs.setdefault(name, []).append(load(opened[name], ids, compute))
    rows = []
    for name in [*stores, *([COLD] if "tiered" in stores else [])]:
        report, save = saved[name.partition(",")[0]]
        found = {key: median(run[key] for run in runs[name][1:]) for key in runs[name][0]}
        sizes = {"raw_bytes": raw_bytes(cache), "stored_bytes": report.written_bytes}
        rows.append({"store": name, "tokens": len(ids), **found, "save": save, **sizes})
    return rows


def load(prefixes: kvtc.PrefixCache, ids, compute: float) -> dict[str, float]:
    """Seconds of one load and of its stages. compute: of computing instead."""
    clock = Clock()
    with ExitStack() as stack:
        for stage, places in STAGES.items():
            for owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, clock.watched(getattr(owner, attribute), stage)))
        (_, n_found), seconds = timed(lambda: prefixes.load(ids, whole=True))
    if n_found != len(ids):
        raise RuntimeError(f"{n_found} of {len(ids)} tokens were found")
    rest = seconds - sum(clock.spent.values())
    return {"compute": compute, "load": seconds, "times_faster": compute / seconds, **clock.spent, "rest": rest}


class Clock:
    """Seconds that the thread which made it spends in stages; a call inside of another is part of
    that.
    """

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._thread, self._is_running = threading.current_thread(), False

    def watched(self, function: Callable, stage: str) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            if self._is_running or threading.current_thread() is not self._thread:
                return function(*args, **kwargs)
            self._is_running, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._is_running = False
                self.spent[stage] += time.perf_counter() - started

        return run


def rotated(names: list[str], turn: int) -> list[str]:
    """Another first one each turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def empty_all_but_the_last(store) -> None:
    for tier in store.tiers[:-1]:
        for key in list(tier.keys()):
            tier.delete(key)


def print_rows(rows: list[dict]) -> None:
    shares = [*STAGES, "rest"]
    header = ["store", "tokens", "compute", "load", "times faster", *shares, "save", "raw", "stored", "total_ratio"]
    table = [
        [row["store"], row["tokens"], *(f"{1e3 * row[name]:.1f} ms" for name in ("compute", "load")),
         f"{row['times_faster']:.2f}x", *(f"{100 * row[name] / row['load']:.0f}%" for name in shares),
         f"{1e3 * row['save']:.0f} ms", format_bytes(row["raw_bytes"]), format_bytes(row["stored_bytes"]),
         f"{row['raw_bytes'] / row['stored_bytes']:.1f}x"]
        for row in rows
    ]  # fmt: skip
    print(format_table(header, table))


def plot(rows: list[dict]) -> None:
    """How many times as long computing takes as loading, by context."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        label = f"{row['store']}, {row['tokens']:,} tokens: {row['times_faster']:.2f}x"
        lines.setdefault(row["store"], []).append((row["tokens"], row["times_faster"], label))
    chart = Chart("Computing over loading", lines, "tokens of context", "times as long", y_log=False, x_times=False)
    save_picture(
        IMAGES / f"{NAME}.svg", "Computing a prefix again against loading it", "above 1 loading is faster", [chart]
    )


if __name__ == "__main__":
    main()
