"""How a model does on tasks and on text, from the exact cache and from restored ones."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codec import Codec
from ..errors import InvalidArgument
from ..huggingface.continuation import predict, prefill
from ..process.progress import Advance, nobody
from ..process.torch_state import model_torch_state
from . import tasks
from .methods import Method, as_method, restore

EXACT = "exact cache"
N_DEPTHS = 4


@dataclass(frozen=True)
class TaskScore:
    """The score of one codec on one task.

    Parameters:
        task: the name of the task.
        context: tokens of a context.
        codec: the name of the method, or "exact cache".
        exact: share of questions whose whole answer is right, 0 .. 1.
        tokens: share of answer tokens that are right, 0 .. 1.
        n_contexts, n_questions: how many were measured.
        kl: mean KL(exact cache || restored) over the tokens of the answers, in nats.
        same: share of questions to which the model gives the answer that it gives from the exact
            cache, right or wrong, 0 .. 1; None in results that were made before this was measured.
        change_low, change_high: 95 % interval of `exact` less that of the exact cache, paired by
            question (normal approximation); None as for `same`.
        body_ratio, total_ratio: as in `kvtc.StreamInfo`, bytes summed over the contexts; None for
            the exact cache.
        by_depth: `exact` for answers in each quarter of the context, the first quarter first; None
            where no answer lies.
    """

    task: str
    codec: str
    context: int
    n_contexts: int
    n_questions: int
    exact: float
    tokens: float
    kl: float
    by_depth: list[float | None]
    body_ratio: float | None
    total_ratio: float | None
    same: float | None = None
    change_low: float | None = None
    change_high: float | None = None


@dataclass(frozen=True)
class _Answer:
    """One answer.

    Parameters:
        depth: where in the context stands what is asked for, 0 .. 1.
        n_right, n_tokens: tokens that are right, and all.
        is_same: whether it is the answer from the exact cache.
    """

    depth: float
    n_right: int
    n_tokens: int
    is_same: bool

    @property
    def is_right(self) -> bool:
        return self.n_right == self.n_tokens


@dataclass
class _Tally:
    """What one codec did, question by question."""

    answers: list[_Answer]
    kl: float = 0.0
    original_bytes: int = 0
    total_bytes: int = 0
    body_original: float = 0.0
    body_bytes: int = 0


def standard_tasks(
    tokenizer: Any, text: str, n_tokens: int, n_contexts: int, n_questions: int, seed: int = 0
) -> dict[str, list[tasks.Example]]:
    """The look-up tasks of the reference model by name; the same seed gives the same tasks.

    Parameters:
        tokenizer: a transformers tokenizer.
        text: held-out running text, in which facts are hidden and from which passages are copied.
        n_tokens: tokens of a context with its longest question.
    """

    def encode(piece: str) -> list[int]:
        ids: list[int] = tokenizer.encode(piece, add_special_tokens=False)
        return ids

    longest_question = 80
    space = n_tokens - longest_question - 1
    found: dict[str, list[tasks.Example]] = {}
    for index in range(n_contexts):
        source = tasks.Source(encode, text, held_out=True, rng=random.Random(f"{seed}/{n_tokens}/{index}"))
        layout = list(tasks.LAYOUTS)[index % len(tasks.LAYOUTS)]
        drawn = {
            **{
                f"records: {kind}s": tasks.records(source, space, n_questions, layout, kind)[0]
                for kind in tasks.KINDS[:3]
            },
            "records: UUIDs": tasks.records(source, space, n_questions, "json", "uuid")[0],
            "needle": tasks.needles(source, space, n_questions, template=0)[0],
            "variables": tasks.variables(source, space, min(n_questions, 4))[0],
            "copy": tasks.passages(source, space, n_questions),
        }
        for name, example in drawn.items():
            found.setdefault(name, []).append(example)
    return found


@model_torch_state()
def score_task(
    model: Any,
    bos_token_id: int | None,
    name: str,
    examples: Sequence[tasks.Example],
    methods: Mapping[str, Method | Codec],
    advance: Advance = nobody,
) -> list[TaskScore]:
    """Scores of the exact cache and of each method on the same examples, in this order.

    Each context is prefilled once. Each method codes and restores that cache, and every question
    follows it.

    Parameters:
        model: a transformers causal LM.
        bos_token_id: the token that every text begins with, if any.
        advance: called after each method on each example, the exact cache included.
    """
    if not any(example.questions for example in examples):
        raise InvalidArgument(f"task {name!r} asks nothing: its contexts are too short")
    tallies = {method: _Tally([]) for method in (EXACT, *methods)}
    for example in examples:
        ids = torch.tensor([*_beginning(bos_token_id), *example.context], device=model.device)
        exact = prefill(model, ids)
        expected = [_answer(model, exact, len(ids), question) for question in example.questions]
        for method_name, tally in tallies.items():
            cache = exact
            if method_name != EXACT:
                restored = restore(as_method(methods[method_name]), model, exact, ids)
                cache = restored.cache
                tally.original_bytes += restored.cost.original_bytes
                tally.total_bytes += restored.cost.total_bytes
                tally.body_original += restored.cost.body_original_bytes
                tally.body_bytes += restored.cost.body_bytes
            for question, wanted in zip(example.questions, expected, strict=True):
                found = wanted if method_name == EXACT else _answer(model, cache, len(ids), question)
                given = found.argmax(dim=-1).cpu()
                right = given == torch.tensor(question.answer, device="cpu")
                is_same = bool((given == wanted.argmax(dim=-1).cpu()).all())
                tally.answers.append(_Answer(question.depth, int(right.sum()), len(right), is_same))
                tally.kl += float((wanted.exp() * (wanted - found)).sum())
            advance(1)
    context = max(len(example.context) for example in examples)
    exact_tally = tallies[EXACT]
    return [_score(name, method, context, len(examples), tally, exact_tally) for method, tally in tallies.items()]


@model_torch_state()
def bits_per_byte(model: Any, tokenizer: Any, text: str, n_tokens: int, n_windows: int) -> float:
    """The cost of a text under the model, in bits per byte of its UTF-8 form.

    It is measured on `n_windows` evenly spaced windows of `n_tokens` tokens. Each begins with the
    token for the beginning of a text, and all its tokens are counted (but the first, if the
    tokenizer has no such token).
    """
    first = _beginning(tokenizer.bos_token_id)
    nats, n_bytes = 0.0, 0
    for index in range(n_windows):
        start = len(text) * index // n_windows
        ids = tokenizer.encode(text[start : start + 8 * n_tokens], add_special_tokens=False)
        ids = [*first, *ids][:n_tokens]
        fed, wanted = (torch.tensor(part, device=model.device) for part in (ids[:-1], ids[1:]))
        logits = model(fed[None], use_cache=False).logits[0].float()
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        n_bytes += len(tokenizer.decode(ids[1:]).encode())
    return nats / math.log(2) / n_bytes


def _beginning(bos_token_id: int | None) -> list[int]:
    return [] if bos_token_id is None else [bos_token_id]


def _answer(model: Any, cache: Any, n_read: int, question: tasks.Question) -> torch.Tensor:
    """Log-probabilities [n, vocabulary] of the answer's n tokens, each given those before it and a
    context of n_read tokens.
    """
    fed = torch.tensor([*question.prompt, *question.answer[:-1]], device=model.device)
    return predict(model, cache, fed, first_position=n_read)[-len(question.answer) :]


def _score(name: str, codec: str, context: int, n_contexts: int, tally: _Tally, exact: _Tally) -> TaskScore:
    answers = tally.answers
    n_right, n_tokens = sum(answer.n_right for answer in answers), sum(answer.n_tokens for answer in answers)
    by_depth: list[float | None] = []
    for quarter in range(N_DEPTHS):
        inside = [answer.is_right for answer in answers if min(int(answer.depth * N_DEPTHS), N_DEPTHS - 1) == quarter]
        by_depth.append(sum(inside) / len(inside) if inside else None)
    changes = [now.is_right - before.is_right for now, before in zip(answers, exact.answers, strict=True)]
    change = sum(changes) / len(changes)
    spread = 1.96 * (sum((one - change) ** 2 for one in changes) / max(1, len(changes) - 1) / len(changes)) ** 0.5
    return TaskScore(
        task=name,
        codec=codec,
        context=context,
        n_contexts=n_contexts,
        n_questions=len(answers),
        exact=sum(answer.is_right for answer in answers) / len(answers),
        tokens=n_right / n_tokens,
        kl=tally.kl / n_tokens,
        by_depth=by_depth,
        body_ratio=tally.body_original / tally.body_bytes if tally.body_bytes else None,
        total_ratio=tally.original_bytes / tally.total_bytes if tally.total_bytes else None,
        same=sum(answer.is_same for answer in answers) / len(answers),
        change_low=max(-1.0, change - spread),
        change_high=min(1.0, change + spread),
    )
