"""Conversations that pause between turns: the cache is computed again, held as it is, or stored by
the prefix cache.

    python -m benchmarks.serving.multi_turn --text FILE... [--turns 6] [--turn-tokens 480] [--answer-tokens 32] [--ratio 32]

Every turn adds held-out text and an answer that the model gives to the exact cache; all policies
see the same tokens. Time to the first token is what a user waits for: computing or fetching the
cache, and reading the new turn. Saving happens while the user types, so it is listed apart.
Quality: KL of the answer's predictions against those from the recomputed cache. `--redraw` draws
the plot of the saved results again.
"""

import argparse
from collections import defaultdict
from functools import partial
from statistics import mean, median

import torch

import kvtc
from benchmarks.shared.first_token import (
    IMAGES,
    add_codec_arguments,
    answer,
    divergence,
    first_token,
    follow,
    parse,
    raw_bytes,
    saved_result,
    start,
    token_ids,
)
from benchmarks.shared.timing import timed
from kvtc.evaluate.provenance import save_result
from kvtc.report.charts import save_picture
from kvtc.report.parts import Chart, Point
from kvtc.report.table import format_bytes, format_table

NAME = "multi_turn_serving"


def converse(model, codec, turns: list[torch.Tensor], n_answer: int, rows: dict) -> None:
    """One conversation under all three policies."""
    ids, held = torch.empty(0, dtype=torch.int64), None
    with kvtc.open_store("memory:") as store, kvtc.PrefixCache(codec, store, min_tokens=256) as prefixes:
        for turn, new in enumerate(turns):
            ids = torch.cat([ids, new])
            exact, cache, recompute = first_token(model, ids, None)
            said = answer(model, exact, cache, n_answer)
            expected = torch.cat([exact[None], follow(model, _cut(cache, len(ids)), said[:-1])])

            _, held, hold = first_token(model, ids, held)
            with torch.no_grad():
                held = model(said[None, :-1], past_key_values=held).past_key_values

            (restored, n_found), load = timed(lambda ids=ids: prefixes.load(ids))
            found, restored, read = first_token(model, ids, restored)
            followed = torch.cat([found[None], follow(model, restored, said[:-1])])
            with torch.no_grad():
                restored = model(said[None, :-1], past_key_values=restored).past_key_values
            ids = torch.cat([ids, said])
            report, save = timed(lambda ids=ids, restored=restored: prefixes.save(ids, restored).result())

            row = {
                "recompute_seconds": recompute,
                "hold_seconds": hold,
                "kvtc_seconds": load + read,
                "save_seconds": save,
                "found_tokens": n_found,
                "tokens": len(ids),
                "raw_bytes": raw_bytes(held),
                "stored_bytes": store.statistics().stored_bytes,
                "written_bytes": report.written_bytes,
                "kl": divergence(expected, followed),
                "agreement": float((expected.argmax(-1) == followed.argmax(-1)).float().mean()),
            }
            rows[turn].append(row)


def _cut(cache, n_tokens: int):
    """The first tokens of a cache, which stays as it is."""
    part = kvtc.codec.transformers_cache.new_transformers_cache()
    for index, layer in enumerate(cache.layers):
        part.update(layer.keys[:, :, :n_tokens], layer.values[:, :, :n_tokens], index)
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_codec_arguments(parser, draws=True)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--turn-tokens", type=int, default=480)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--conversations", type=int, default=2, help="per file")
    options = parse(parser)
    if not options.redraw:
        run(options)
    plot(saved_result(NAME)["turns"])


def run(options: argparse.Namespace) -> None:
    model, tokenizer, codec = start(options)
    rows: dict[int, list[dict]] = defaultdict(list)
    for path in options.text:
        for index in range(options.conversations):
            whole = token_ids(
                tokenizer, path, (index + 0.5) / options.conversations * 0.9, options.turns * options.turn_tokens
            )
            converse(model, codec, list(whole.split(options.turn_tokens)), options.answer_tokens, rows)
    summary = [
        {"turn": turn + 1, "conversations": len(of_turn)}
        | {name: (median if "seconds" in name else mean)(row[name] for row in of_turn) for name in of_turn[0]}
        for turn, of_turn in sorted(rows.items())
    ]
    print_summary(summary)
    settings = {"profile": options.profile, "ratio": options.ratio, "window_tokens": options.window}
    save_result(NAME, {"kind": NAME, **settings, "turns": summary})


def print_summary(summary: list[dict]) -> None:
    header = [
        "turn",
        "tokens",
        "recompute",
        "hold",
        "kvtc",
        "saved in",
        "raw cache",
        "stored",
        "total_ratio",
        "KL",
        "top-1",
    ]
    table = [
        [
            row["turn"],
            round(row["tokens"]),
            *(f"{1e3 * row[f'{name}_seconds']:.0f} ms" for name in ("recompute", "hold", "kvtc", "save")),
            format_bytes(row["raw_bytes"]),
            format_bytes(row["stored_bytes"]),
            f"{row['raw_bytes'] / row['stored_bytes']:.1f}x",
            f"{row['kl']:.5f}",
            f"{100 * row['agreement']:.1f}%",
        ]
        for row in summary
    ]
    print(format_table(header, table))


def plot(turns: list[dict]) -> None:
    """What a user waits for, and what the server keeps while the user is away, after each turn."""
    waiting: dict[str, list[Point]] = {"hold the cache": [], "kvtc": [], "compute again": []}
    keeping: dict[str, list[Point]] = {"hold the cache": [], "kvtc": []}
    for row in turns:
        for line, name in zip(waiting, ("hold", "kvtc", "recompute"), strict=True):
            seconds = row[f"{name}_seconds"]
            waiting[line].append((row["tokens"], 1e3 * seconds, f"{line}, turn {row['turn']}: {1e3 * seconds:.0f} ms"))
        for line, name in zip(keeping, ("raw_bytes", "stored_bytes"), strict=True):
            label = f"{line}, turn {row['turn']}: {format_bytes(row[name])}"
            keeping[line].append((row["tokens"], row[name] / 2**20, label))
    over_tokens = partial(Chart, x_title="tokens of the conversation", x_log=False, y_log=False, x_times=False)
    charts = [
        over_tokens("Until the first token", waiting, y_title="milliseconds"),
        over_tokens("Kept between turns", keeping, y_title="MiB"),
    ]
    save_picture(IMAGES / "multi_turn.svg", "Conversations that grow", "means over conversations, by turn", charts)


if __name__ == "__main__":
    main()
