"""Look-ups by where the answer lies in its chunk: at every sixteenth offset, across the boundary of
two chunks, at a chunk's end.

    python -m benchmarks.quality.lookups_by_offset --text FILE... [--n-contexts 12] [--chunks 4]

Facts ("The magic number for ... is ...") overwrite running text such that the first token of the
number has a given offset in a chunk of the grid; no window is kept, so that every token but the
sinks is coded. Each is asked on top of the exact and of the restored caches. A dip at some offset
would show in the difference to the exact cache over the same questions, given with the standard
error of paired yes-no answers.
"""

import argparse
import copy
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import kvtc
from kvtc.evaluate.methods import as_method, restore
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.schema import PHASE_SWEEP, PhasePoint
from kvtc.evaluate.tasks import LATEST, NEEDLES, Source
from kvtc.huggingface.continuation import prefill
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_table

CHUNK = 256
SPACING = 64
STEP = 16
STRADDLES, LAST = "across two chunks", "last in a chunk"
EXACT = "exact cache"
CODED = (("paper", 16), ("paper", 32), ("joint", 32), ("joint", 64), ("conditional", 32), ("conditional", 64))


@dataclass(frozen=True)
class Asked:
    """place: an offset in a chunk, or STRADDLES, or LAST. prompt, answer: token ids."""

    place: int | str
    prompt: list[int]
    answer: list[int]


@dataclass
class Tally:
    """Of one method and place. right: whether each answer was; kl: nats summed over n_tokens tokens
    of answers.
    """

    right: list[bool] = field(default_factory=list)
    kl: float = 0.0
    n_tokens: int = 0


@dataclass
class Bytes:
    """Of one method over all contexts."""

    original: int = 0
    body_original: float = 0.0
    body: int = 0
    total: int = 0


def contexts(source: Source, bos: int, n_chunks: int, n_contexts: int) -> Iterator[tuple[list[int], list[Asked]]]:
    """Contexts [bos, ...] of n_chunks and a bit, with the facts in them: four a chunk and, at
    boundaries, the special places.
    """
    # As in the tasks, nothing asked for lies in the last tokens of the context.
    n_tokens = n_chunks * CHUNK + LATEST
    for _ in range(n_contexts):
        for first in range(0, SPACING, STEP):
            places = [
                (chunk * CHUNK + first + more, first + more)
                for chunk in range(n_chunks)
                for more in range(0, CHUNK, SPACING)
            ]
            yield _write(source, bos, n_tokens, places)
        for swapped in (False, True):
            names = (LAST, STRADDLES) if swapped else (STRADDLES, LAST)
            yield _write(source, bos, n_tokens, [((c + 1) * CHUNK, names[c % 2]) for c in range(n_chunks)])


def _write(
    source: Source, bos: int, n_tokens: int, places: list[tuple[int, int | str]]
) -> tuple[list[int], list[Asked]]:
    ids = [bos, *source.passage(n_tokens - 1)]
    keys = source.distinct(source.word, len(places))
    asked = []
    for key, (position, place) in zip(keys, places, strict=False):
        fact, prompt, answer, begin = _fact(source, key)
        if place == STRADDLES:
            position -= len(answer) // 2
        elif place == LAST:
            position -= len(answer)
        start = position - begin
        # Sinks are exact, and nothing may hang over the beginning.
        if start < 4:
            continue
        ids[start : start + len(fact)] = fact
        asked.append(Asked(place, prompt, answer))
    return ids, asked


def _fact(source: Source, key: str) -> tuple[list[int], list[int], list[int], int]:
    """Token ids of a fact, its question and its answer of at least two tokens, and where in the
    fact the answer begins.
    """
    wording, ask, reply = NEEDLES[0]
    while True:
        value = source.number()
        fact = list(source.encode(wording.format(key=key, value=value)))
        answer = list(source.encode(reply.format(value=value)))
        found = [at for at in range(len(fact)) if fact[at : at + len(answer)] == answer]
        if found and len(answer) >= 2:
            return fact, list(source.encode(ask.format(key=key))), answer, found[0]


def ask(model: Any, cache: Any, questions: list[Asked]) -> list[torch.Tensor]:
    """Log-probabilities [n, vocabulary] float32 of each answer's n tokens, all questions on top of
    one cache.
    """
    fed = [[*question.prompt, *question.answer[:-1]] for question in questions]
    longest = max(map(len, fed))
    # What is padded on the right is seen by nothing before it.
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in fed])
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(len(fed))
    with torch.no_grad():
        logits = model(padded, past_key_values=cache).logits
    return [
        logits[index, len(ids) - len(question.answer) : len(ids)].float().log_softmax(dim=-1)
        for index, (ids, question) in enumerate(zip(fed, questions, strict=True))
    ]


def sweep(options: argparse.Namespace) -> tuple[dict[tuple[str, int | str], Tally], dict[str, Bytes]]:
    """Answers by method and place, and bytes by method."""
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    calibration = kvtc.reference_calibration()
    codecs = {
        f"{name} {ratio}x": kvtc.Codec(calibration, name, ratio=ratio, window_tokens=0, model=MODEL_DIRECTORY)
        for name, ratio in CODED
    }
    text = "\n".join(path.read_text(encoding="utf-8") for path in options.text)
    source = Source(lambda piece: tokenizer.encode(piece, add_special_tokens=False), text, True, random.Random(0))
    tallies: dict[tuple[str, int | str], Tally] = {}
    sizes = {name: Bytes() for name in codecs}
    drawn = contexts(source, tokenizer.bos_token_id, options.chunks, options.n_contexts)
    for index, (context, questions) in enumerate(drawn):
        ids = torch.tensor(context)
        exact = prefill(model, ids)
        expected = ask(model, exact, questions)
        answers = {EXACT: expected}
        for name, codec in codecs.items():
            restored = restore(as_method(codec), model, exact, ids)
            answers[name] = ask(model, restored.cache, questions)
            cost, size = restored.cost, sizes[name]
            size.original += cost.original_bytes
            size.body_original += cost.body_original_bytes
            size.body += cost.body_bytes
            size.total += cost.total_bytes
        for name, found_ones in answers.items():
            for question, wanted, found in zip(questions, expected, found_ones, strict=True):
                tally = tallies.setdefault((name, question.place), Tally())
                tally.right.append(bool((found.argmax(dim=-1) == torch.tensor(question.answer)).all()))
                tally.kl += float((wanted.exp() * (wanted - found)).sum())
                tally.n_tokens += len(question.answer)
        print(f"context {index + 1} of {6 * options.n_contexts}", file=sys.stderr, flush=True)
    return tallies, sizes


def difference(exact: list[bool], coded: list[bool]) -> tuple[float, float]:
    """Share of right answers lost, and its standard error over paired questions."""
    lost = sum(a and not b for a, b in zip(exact, coded, strict=True))
    won = sum(b and not a for a, b in zip(exact, coded, strict=True))
    n = len(exact)
    return (lost - won) / n, math.sqrt(max(lost + won - (lost - won) ** 2 / n, 0)) / n


def describe(name: str, place: int | str, tallies: dict[tuple[str, int | str], Tally]) -> dict[str, Any]:
    """One method at one place."""
    tally, exact = tallies[name, place], tallies[EXACT, place]
    lost, error = difference(exact.right, tally.right)
    return {
        "name": name,
        "place": place,
        "n_questions": len(tally.right),
        "exact": sum(tally.right) / len(tally.right),
        "lost": lost,
        "standard_error": error,
        "kl": tally.kl / tally.n_tokens,
    }


def print_places(lines: list[dict[str, Any]]) -> None:
    """Places by methods: right answers from the exact cache; lost answers with their error, and KL,
    from the others.
    """
    found = {(line["name"], line["place"]): line for line in lines}
    names, places = (list(dict.fromkeys(line[key] for line in lines)) for key in ("name", "place"))
    rows = []
    for place in places:
        row = [place, found[EXACT, place]["n_questions"], f"{100 * found[EXACT, place]['exact']:.0f}"]
        others = [found[name, place] for name in names if name != EXACT]
        row += [f"{100 * o['lost']:+.1f} +-{100 * o['standard_error']:.1f}, {o['kl']:.4f}" for o in others]
        rows.append(row)
    print(format_table(["offset", "questions", "exact, %", *(f"{n}: lost, KL" for n in names if n != EXACT)], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text files")
    parser.add_argument("--chunks", type=int, default=4, help="of a context")
    parser.add_argument("--n-contexts", type=int, default=12, help="of each of six kinds")
    options = parser.parse_args()
    started = time.perf_counter()
    tallies, sizes = sweep(options)
    offsets = sorted(place for name, place in tallies if name == EXACT and isinstance(place, int))
    names = [EXACT, *sizes]
    # All offsets together, with less noise than any one of them.
    for name in names:
        of_all = [tallies[name, offset] for offset in offsets]
        right = [answer for tally in of_all for answer in tally.right]
        tallies[name, "all"] = Tally(right, sum(t.kl for t in of_all), sum(t.n_tokens for t in of_all))
    lines = [describe(name, place, tallies) for place in (*offsets, STRADDLES, LAST, "all") for name in names]
    print_places(lines)
    points = []
    for line in (line for line in lines if isinstance(line["place"], int)):
        size = sizes.get(line["name"])
        ratios = (size.body_original / size.body, size.original / size.total) if size else (None, None)
        kl = None if size is None else line["kl"]
        points.append(PhasePoint(line["name"], line["place"], None, line["n_questions"], line["exact"], kl, *ratios))
    result = {
        "kind": PHASE_SWEEP,
        "seconds": round(time.perf_counter() - started, 1),
        "points": [asdict(point) for point in points],
        "places": lines,
    }
    save_result("lookups_by_offset", result)


if __name__ == "__main__":
    main()
