"""Tasks that can only be answered by looking at the cache: records, needles, variables, frequent
words, copied passages.

One generator serves evaluation and the training of the reference model. They can never meet: every
key, value, name and word of a task is drawn from one of two disjoint parts of all strings
(`is_held_out`), and running text is the caller's.

A task is a context, and questions that are each asked on top of the same context: the context is
prefilled and coded once, and every question is answered from the same restored cache. An answer is
right if each of its tokens is the most likely one after those before it, which is the same as
greedy generation giving exactly this answer.
"""

from __future__ import annotations

import gzip
import json
import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import InvalidArgument

Encode = Callable[[str], list[int]]

LATEST = 132
"""Tokens at the end of a context in which nothing asked for is hidden: a codec's exact window would
answer for the coded part.
"""

HELD_OUT_OF = 8
LETTERS = string.ascii_uppercase
HEX_LENGTHS = (4, 6, 8)
COPY_CUE = 12
COPY_LENGTH = 24
N_HOPS = 3


@dataclass(frozen=True)
class Question:
    """prompt, answer: token ids; depth: where in the context the answer lies, 0 (start) .. 1 (end)."""

    prompt: list[int]
    answer: list[int]
    depth: float


@dataclass(frozen=True)
class Example:
    """One context of token ids (without a token for the beginning of a text) and the questions
    asked on top of it.
    """

    context: list[int]
    questions: list[Question]


def is_held_out(text: str) -> bool:
    """Whether a string is kept for evaluation: one in eight, by its CRC-32, so that no list has to
    be agreed upon.
    """
    return zlib.crc32(text.encode()) % HELD_OUT_OF == 0


class Source:
    """What tasks are made of: random strings, words and running text, for evaluation or for
    training.

    Parameters:
        encode: text -> token ids, with nothing added.
        text: running text of at least a few thousand words.
        held_out: True for evaluation, False for training; no string is in both.
        rng: every choice is drawn from it, so that one seed gives one task.
    """

    def __init__(self, encode: Encode, text: str, held_out: bool, rng: random.Random) -> None:
        self.encode = lru_cache(maxsize=100_000)(lambda text: tuple(encode(text)))
        self._encode_once = encode
        self.text = text
        self.held_out = held_out
        self.rng = rng
        words = {
            word
            for word in text.split()
            if word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 9
        }
        self.words = sorted(word for word in words if is_held_out(word) == held_out)
        if len(self.words) < 20:
            raise InvalidArgument(f"the running text holds {len(self.words)} usable words; expected at least 20")

    def word(self) -> str:
        return self.rng.choice(self.words)

    def number(self) -> str:
        return self._draw(lambda: str(self.rng.randint(100, 99_999)))

    def hexadecimal(self) -> str:
        length = self.rng.choice(HEX_LENGTHS)
        return self._draw(lambda: f"{self.rng.getrandbits(4 * length):0{length}x}")

    def uuid(self) -> str:
        def draw() -> str:
            digits = f"{self.rng.getrandbits(128):032x}"
            return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

        return self._draw(draw)

    def name(self) -> str:
        return self._draw(lambda: "".join(self.rng.choices(LETTERS, k=2)))

    def distinct(self, draw: Callable[[], str], n: int) -> list[str]:
        """Up to n different strings: fewer where hardly more exist."""
        found: dict[str, None] = {}
        for _ in range(4 * n):
            found[draw()] = None
            if len(found) == n:
                break
        return list(found)

    def passage(self, n_tokens: int) -> list[int]:
        """n_tokens tokens of running text from a random place."""
        n_characters = 4 * n_tokens + 16
        while True:
            start = self.rng.randrange(max(1, len(self.text) - n_characters))
            # Text is cut between words, and tokenized as it would be in its place.
            start = max(self.text.find(" ", start), 0)
            ids = self._encode_once(self.text[start : start + n_characters])
            if len(ids) >= n_tokens or len(self.text) < n_characters:
                return ids[:n_tokens]
            n_characters *= 2

    def _draw(self, draw: Callable[[], str]) -> str:
        while is_held_out(text := draw()) != self.held_out:
            pass
        return text


@dataclass(frozen=True)
class Layout:
    """How records are written and asked for; "{key}" and "{value}" stand for what varies."""

    opening: str
    record: str
    separator: str
    closing: str
    question: str
    answer: str
    after: str = "\n"


JSON_OBJECT = Layout(
    # The wording of Liu et al., "Lost in the Middle" (2023), whose examples `key_value_retrieval` reads.
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{{",
    '"{key}": "{value}"',
    ",\n ",
    "}}\n",
    '\nKey: "{key}"\nCorresponding value: "',
    "{value}",
    '"\n',
)
LAYOUTS = {
    "json": JSON_OBJECT,
    "quoted": Layout("Records:\n", '"{key}": "{value}"', "\n", "\n\nQuestions:\n", '"{key}": "', "{value}", '"\n'),
    "lines": Layout("Records:\n", "{key}: {value}", "\n", "\n\nQuestions:\n", "{key}:", " {value}"),
    "equals": Layout("Settings:\n", "{key} = {value}", "\n", "\n\nWhat are they?\n", "{key} =", " {value}"),
    "sentence": Layout("", "The code of {key} is {value}.", " ", "\n\n", "The code of {key} is", " {value}", ".\n"),
    "table": Layout(
        "| key | value |\n", "| {key} | {value} |", "\n", "\n\nLook up:\n", "| {key} |", " {value}", " |\n"
    ),
}
KINDS = ("word", "number", "hexadecimal", "uuid")


def records(
    source: Source, n_tokens: int, n_questions: int, layout: str | None = None, kind: str | None = None
) -> tuple[Example, str]:
    """As many records of key and value as fit in n_tokens, and questions about some of them.

    Parameters:
        layout: one of LAYOUTS; drawn if it is not given.
        kind: one of KINDS, for keys and values alike; if it is not given, both are drawn.

    Returns:
        (the example, the text after an answer).
    """
    rng = source.rng
    chosen = LAYOUTS[layout or rng.choice(list(LAYOUTS))]
    if kind is None:
        key_kind, value_kind = rng.choices(KINDS, (4, 2, 4, 2), k=2)
    else:
        key_kind = value_kind = kind
    draw_key, draw_value = getattr(source, key_kind), getattr(source, value_kind)
    pairs = [(key, draw_value()) for key in source.distinct(draw_key, max(2, n_tokens // 6))]
    return ask_records(source.encode, chosen, pairs, n_tokens, n_questions, rng), chosen.after


def ask_records(
    encode: Callable[[str], Sequence[int]],
    layout: Layout,
    pairs: Sequence[tuple[str, str]],
    n_tokens: int,
    n_questions: int,
    rng: random.Random,
    asked: int | None = None,
) -> Example:
    """Records that fit in n_tokens, and questions about some of them.

    Parameters:
        asked: index of the only record that is asked for; it stays as deep in the context as it
            was. None: the first records are kept, and questions are drawn from all but the latest.
    """
    opening, closing = list(encode(layout.opening.format())), list(encode(layout.closing.format()))
    separator = list(encode(layout.separator))
    written = [list(encode(layout.record.format(key=key, value=value))) for key, value in pairs]
    spare = n_tokens - len(opening) - len(closing)
    kept = _fitting([len(ids) + len(separator) for ids in written], asked or 0, spare)
    context, ends = list(opening), {}
    for index in kept:
        context += (separator if index != kept.start else []) + written[index]
        ends[index] = len(context)
    context += closing
    askable = [index for index, end in ends.items() if end <= len(context) - LATEST] or list(ends)
    chosen = [asked] if asked is not None else rng.sample(askable, min(n_questions, len(askable)))
    questions = [
        Question(
            list(encode(layout.question.format(key=pairs[index][0]))),
            list(encode(layout.answer.format(value=pairs[index][1]))),
            ends[index] / len(context),
        )
        for index in chosen
    ]
    return Example(context, questions)


def _fitting(costs: Sequence[int], asked: int, spare: int) -> range:
    """The records around one that fit: on both sides in proportion to what there is."""
    start, stop = asked, asked + 1
    spare -= costs[asked]
    while start > 0 or stop < len(costs):
        before, after = (asked - start) / max(1, asked), (stop - asked - 1) / max(1, len(costs) - asked - 1)
        goes_before = start > 0 and (before <= after or stop == len(costs))
        spare -= costs[start - 1] if goes_before else costs[stop]
        if spare < 0:
            break
        start, stop = (start - 1, stop) if goes_before else (start, stop + 1)
    return range(start, stop)


NEEDLES = (
    ("\nThe magic number for {key} is {value}.\n", "\nThe magic number for {key} is", " {value}"),
    ("\nRemember: {key} weighs {value} grams.\n", "\nRemember: {key} weighs", " {value}"),
    ("\nNote that the password of {key} is {value}.\n", "\nThe password of {key} is", " {value}"),
)


def needles(source: Source, n_tokens: int, n_questions: int, template: int | None = None) -> tuple[Example, str]:
    """n_questions facts hidden in running text at even depths, each with a question: (example, text
    after an answer).
    """
    rng = source.rng
    fact, ask, answer = NEEDLES[rng.randrange(len(NEEDLES)) if template is None else template]
    facts = [(key, source.number()) for key in source.distinct(source.word, n_questions)]
    inserts = [list(source.encode(fact.format(key=key, value=value))) for key, value in facts]
    context, ends = _hide(source, inserts, n_tokens)
    questions = [
        Question(
            list(source.encode(ask.format(key=key))),
            list(source.encode(answer.format(value=value))),
            end / len(context),
        )
        for (key, value), end in zip(facts, ends, strict=True)
    ]
    return Example(context, questions), ".\n"


def variables(source: Source, n_tokens: int, n_questions: int, n_chains: int = 4) -> tuple[Example, str]:
    """Chains of assignments (QX = 317, TB = QX, ...) in running text, n_chains interleaved:
    (example, text after an answer).

    A question names a value; its answer lists the variables of the chain in order. If there are
    more questions than chains, the others ask for the value of a variable.
    """
    rng = source.rng
    names = source.distinct(source.name, n_chains * (N_HOPS + 1))
    chains = [names[index::n_chains] for index in range(n_chains)]
    values = source.distinct(source.number, n_chains)
    lines = []
    for index, name in enumerate(names):
        chain, hop = index % n_chains, index // n_chains
        lines.append(f"\n{name} = {values[chain] if hop == 0 else chains[chain][hop - 1]}\n")
    context, ends = _hide(source, [list(source.encode(line)) for line in lines], n_tokens)
    questions = []
    for chain in rng.sample(range(n_chains), min(n_questions, n_chains)):
        last = ends[chain + n_chains * (len(chains[chain]) - 1)]
        prompt, answer = f"\nThe variables with the value {values[chain]} are", " " + ", ".join(chains[chain])
        questions.append(Question(list(source.encode(prompt)), list(source.encode(answer)), last / len(context)))
    for _ in range(n_questions - n_chains):
        index = rng.randrange(len(names))
        prompt, answer = f"\nThe value of {names[index]} is", f" {values[index % n_chains]}"
        questions.append(Question(list(source.encode(prompt)), list(source.encode(answer)), ends[index] / len(context)))
    return Example(context, questions), ".\n"


def frequent_words(source: Source, n_tokens: int) -> tuple[Example, str]:
    """A list of words, three of them far more often than the others; (example, text after an
    answer).
    """
    rng = source.rng
    words = source.distinct(source.word, 20)
    frequent, rare = words[:3], words[3:]
    context = list(source.encode("Words:"))
    while len(context) < n_tokens:
        word = frequent[rng.choices((0, 1, 2), (4, 3, 2))[0]] if rng.random() < 0.5 else rng.choice(rare)
        context += source.encode(f" {word}")
    question = source.encode("\n\nThe most frequent words are"), source.encode(" " + ", ".join(frequent))
    return Example(context[:n_tokens], [Question(list(question[0]), list(question[1]), 0.5)]), ".\n"


def passages(source: Source, n_tokens: int, n_questions: int) -> Example:
    """Running text; a question is the beginning of one of its passages, and the answer is the rest
    of that passage.
    """
    context = source.passage(n_tokens)
    last = len(context) - LATEST - COPY_CUE - COPY_LENGTH
    prompt = list(source.encode("\n\n"))
    questions = []
    for index in range(n_questions):
        start = max(0, last) * index // max(1, n_questions - 1)
        cue, end = start + COPY_CUE, start + COPY_CUE + COPY_LENGTH
        questions.append(Question(prompt + context[start:cue], context[cue:end], end / max(1, len(context))))
    return Example(context, questions)


def key_value_retrieval(
    path: str | Path, encode: Encode, n_tokens: int, n_examples: int, seed: int = 0
) -> list[Example]:
    """Examples of "Lost in the Middle" (jsonl.gz, 75 or 140 records of UUIDs), each cut to the
    records that fit in n_tokens.
    """
    rng = random.Random(seed)
    examples: list[Example] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if len(examples) == n_examples:
                break
            found = json.loads(line)
            pairs = [(str(key), str(value)) for key, value in found["ordered_kv_records"]]
            asked = [key for key, _ in pairs].index(str(found["key"]))
            examples.append(ask_records(encode, JSON_OBJECT, pairs, n_tokens, 1, rng, asked))
    return examples


def _hide(source: Source, inserts: Sequence[Sequence[int]], n_tokens: int) -> tuple[list[int], list[int]]:
    """Running text with inserts spread over all but its end, n_tokens in all; and where each insert
    ends.
    """
    n_text = max(n_tokens - sum(map(len, inserts)), 0)
    text = source.passage(n_text)
    usable = max(n_text - LATEST, n_text // 2)
    context: list[int] = []
    ends, taken = [], 0
    for index, insert in enumerate(inserts):
        cut = int(usable * (index + source.rng.random()) / len(inserts))
        context += text[taken:cut]
        context += insert
        taken = cut
        ends.append(len(context))
    return context + text[taken:], ends
