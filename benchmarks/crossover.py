"""From which context length on loading a prefix beats computing it, by tier, and what loading spends its time on.

    python benchmarks/crossover.py --text FILE [--lengths 256 512 1024 2048 4000] [--stores memory: file:///tmp/kvtc-crossover ...]

Every length is timed `--repeats` times, computing and loading in turns; medians. Shares: fetching from the store, entropy decoding
and dequantizing, the inverse transform, and the rest (rotation, putting together). A plot needs matplotlib.
"""

import argparse
import time
from contextlib import ExitStack
from functools import wraps
from statistics import median
from unittest.mock import patch

import kvtc
import kvtc.codec
import kvtc.profiles.joint
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.table import format_bytes, format_table
from serving import add_codec_arguments, first_token, raw_bytes, start, timed, token_ids

STAGES = {
    "entropy decode": (kvtc.profiles.joint.JointCoder, "decode"),
    "inverse transform": (kvtc.profiles.joint.JointCoder, "restore"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_codec_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4000])
    parser.add_argument("--stores", nargs="+", default=["memory:", "file:///tmp/kvtc-crossover"], help="URLs")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer, codec = start(options)
    rows = []
    for url in options.stores:
        with kvtc.open_store(url) as store, kvtc.PrefixCache(codec, store, min_tokens=1) as prefixes:
            for n in options.lengths:
                rows.append(measure(model, prefixes, token_ids(tokenizer, options.text[0], 0.1, n), options.repeats))
                rows[-1] = {"store": url.partition(":")[0], **rows[-1]}
    header = ["store", "tokens", "compute", "load", "times faster", "fetch", *STAGES, "rest", "save", "raw", "stored"]
    table = [
        [row["store"], row["tokens"], *(f"{1e3 * row[name]:.1f} ms" for name in ("compute", "load")),
         f"{row['compute'] / row['load']:.1f}x",
         *(f"{100 * row[name] / row['load']:.0f}%" for name in ("fetch", *STAGES, "rest")), f"{1e3 * row['save']:.0f} ms",
         format_bytes(row["raw_bytes"]), format_bytes(row["stored_bytes"])]
        for row in rows
    ]  # fmt: skip
    print(format_table(header, table))
    save_result("crossover", {"kind": "crossover", "profile": options.profile, "ratio": options.ratio, "rows": rows})
    plot(rows, "docs/images/crossover.png")


def measure(model, prefixes, ids, repeats: int) -> dict:
    """One text: medians in seconds. Loading counts up to a cache to go on from; computing up to the cache of the same tokens."""
    _, cache, _ = first_token(model, ids, None)
    report, save = timed(lambda: prefixes.save(ids, cache).result())
    stages = {**STAGES, "fetch": (type(prefixes.store), "get_many")}
    runs = []
    for _ in range(repeats + 1):
        spent = dict.fromkeys(stages, 0.0)
        compute = first_token(model, ids, None)[2]
        with ExitStack() as stack:
            for name, (owner, attribute) in stages.items():
                stack.enter_context(patch.object(owner, attribute, timer(getattr(owner, attribute), name, spent)))
            (_, n_found), load = timed(lambda: prefixes.load(ids, whole=True))
        if n_found != len(ids):
            raise RuntimeError(f"{n_found} of {len(ids)} tokens were found")
        runs.append({"compute": compute, "load": load, **spent, "rest": load - sum(spent.values())})
    found = {name: median(run[name] for run in runs[1:]) for name in runs[0]}
    sizes = {"raw_bytes": raw_bytes(cache), "stored_bytes": report.written_bytes}
    return {"tokens": len(ids), **found, "save": save, **sizes}


def timer(function, name: str, spent: dict[str, float]):
    @wraps(function)
    def run(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    return run


def plot(rows: list[dict], path: str) -> None:
    from kvtc.evaluate.plots import plot_style, require_matplotlib

    plt = require_matplotlib()
    with plt.rc_context(plot_style()):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        stores = list(dict.fromkeys(row["store"] for row in rows))
        first = [row for row in rows if row["store"] == stores[0]]
        axes.plot([r["tokens"] for r in first], [1e3 * r["compute"] for r in first], "o-", label="compute again")
        for store in stores:
            here = [row for row in rows if row["store"] == store]
            axes.plot([r["tokens"] for r in here], [1e3 * r["load"] for r in here], "s-", label=f"load from {store}")
        axes.set(xlabel="Tokens of context", ylabel="Milliseconds", xscale="log", yscale="log")
        axes.set_xticks([r["tokens"] for r in first], [str(r["tokens"]) for r in first])
        ticks = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(0.7e3 * min(r["load"] for r in rows), 1.4e3 * max(r["compute"] for r in rows))
        axes.minorticks_off()
        axes.legend(frameon=False)
        figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
