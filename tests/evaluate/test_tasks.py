"""The look-up tasks: what they ask is in the context, they fit, they repeat, and training can never have seen them."""

from __future__ import annotations

import gzip
import json
import random

import pytest

import kvtc
from kvtc.errors import InvalidArgument
from kvtc.evaluate import tasks

TEXT = (
    "the quick brown fox jumps over lazy dogs while seven grey wolves watch from distant hills and count every falling leaf "
    * 40
)
SYLLABLES = ("ba", "ko", "mi", "tur", "sel", "va", "nor", "pi", "gru", "la")
WORDS = " ".join(f"{a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES)


@pytest.fixture(scope="module")
def tokenizer():
    return kvtc.reference_model()[1]


def source(tokenizer, seed=0, held_out=True):
    return tasks.Source(
        lambda text: tokenizer.encode(text, add_special_tokens=False), TEXT + WORDS, held_out, random.Random(seed)
    )


def of_records(layout, kind):
    return lambda s, n: tasks.records(s, n, 4, layout, kind)[0]


DRAWN = {
    **{f"{layout}-{kind}": of_records(layout, kind) for layout in tasks.LAYOUTS for kind in tasks.KINDS},
    "needles": lambda s, n: tasks.needles(s, n, 4)[0],
    "variables": lambda s, n: tasks.variables(s, n, 6)[0],
    "words": lambda s, n: tasks.frequent_words(s, n)[0],
    "passages": lambda s, n: tasks.passages(s, n, 4),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("n_tokens", [300, 900])
def test_answers_stand_in_a_context_that_fits(tokenizer, name, n_tokens):
    example = DRAWN[name](source(tokenizer), n_tokens)
    assert n_tokens * 0.7 <= len(example.context) <= n_tokens
    assert example.questions
    text = tokenizer.decode(example.context)
    for question in example.questions:
        answer = tokenizer.decode(question.answer).strip()
        for part in answer.split(", ") if name in ("variables", "words") else [answer]:
            assert part in text
        assert 0 <= question.depth <= 1


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_seed_draws_the_same_task(tokenizer, name):
    first, second = (DRAWN[name](source(tokenizer, seed=3), 400) for _ in range(2))
    assert first == second
    assert first != DRAWN[name](source(tokenizer, seed=4), 400)


def test_training_and_evaluation_share_no_string(tokenizer):
    for held_out in (True, False):
        here = source(tokenizer, held_out=held_out)
        for draw in (here.word, here.number, here.hexadecimal, here.uuid, here.name):
            assert all(tasks.is_held_out(draw()) == held_out for _ in range(50))


def test_what_is_asked_lies_before_the_window(tokenizer):
    for name in ("lines-word", "json-uuid", "needles", "passages"):
        example = DRAWN[name](source(tokenizer), 900)
        last = max(question.depth for question in example.questions) * len(example.context)
        assert last <= len(example.context) - tasks.LATEST + 1


def test_variables_follow_their_chains(tokenizer):
    example = DRAWN["variables"](source(tokenizer), 900)
    text = tokenizer.decode(example.context)
    values = dict(line.split(" = ") for line in text.splitlines() if line.count(" = ") == 1 and len(line) < 14)

    def value_of(name):
        while name in values:
            name = values[name]
        return name

    for question in example.questions:
        prompt, answer = tokenizer.decode(question.prompt), tokenizer.decode(question.answer).strip()
        if "with the value" in prompt:
            number = prompt.split()[-2]
            assert [value_of(name) for name in answer.split(", ")] == [number] * (tasks.N_HOPS + 1)
        else:
            assert value_of(prompt.split()[-2]) == answer


@pytest.mark.parametrize("n_tokens", [300, 2000])
def test_published_records_are_cut_to_fit_with_the_asked_one(tokenizer, tmp_path, n_tokens):
    pairs = [[f"key-{i:04d}-abcdef", f"value-{i:04d}-fedcba"] for i in range(60)]
    path = tmp_path / "records.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for asked in (0, 31, 59):
            file.write(
                json.dumps({"ordered_kv_records": pairs, "key": pairs[asked][0], "value": pairs[asked][1]}) + "\n"
            )

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    examples = tasks.key_value_retrieval(path, encode, n_tokens, 5)
    assert len(examples) == 3
    for example, asked in zip(examples, (0, 31, 59), strict=True):
        assert len(example.context) <= n_tokens
        text = tokenizer.decode(example.context)
        assert f'"{pairs[asked][0]}": "{pairs[asked][1]}"' in text
        assert [tokenizer.decode(q.answer) for q in example.questions] == [pairs[asked][1]]


def test_text_without_words_is_refused(tokenizer):
    with pytest.raises(InvalidArgument, match="usable words"):
        tasks.Source(tokenizer.encode, "one two", True, random.Random(0))
