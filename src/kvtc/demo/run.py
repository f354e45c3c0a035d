"""What `kvtc demo` does and prints: a newcomer's first look, so every figure stands beside what it is measured against."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import Calibration
from ..codec import Codec
from ..errors import InvalidArgument, MissingDependency
from ..evaluate.plots import plot_rate_quality, plot_spectrum
from ..evaluate.provenance import Provenance
from ..evaluate.quality import Quality, evaluate_continuation, prefill, timed
from ..evaluate.table import format_bytes, format_fields, format_ratio, format_seconds, format_table
from ..inspection import StreamInfo, inspect
from ..reference import MODEL_DIRECTORY, reference_calibration

CONVERSATION = Path(__file__).parent / "conversation.txt"
HELD_OUT = "\n=====\n"
FACT = re.compile(r"The magic number for (\w+) is (\d+)\.")
QUESTION = "\n\nThe magic number for {} is"
PLOTS = ("spectrum.png", "rate_quality.png")
WIDTH = 96


@dataclass(frozen=True)
class Conversation:
    """Token ids: `read` [T] are prefilled (the last of them is fed afterwards), `held_out` [n] is how the text goes on.

    facts: (name, number) told in the part that is read. questions: per fact, the ids that ask for it.
    """

    read: Tensor
    held_out: Tensor
    facts: list[tuple[str, str]]
    questions: list[Tensor]


def run_demo(
    output_directory: str | Path,
    ratio: float = 16,
    *,
    ratios: Sequence[float] = (8, 16, 32, 64),
    n_generated: int = 40,
    repeats: int = 5,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo; `say` gets the text, block by block. Returns every figure in it, ready for JSON.

    ratio: what the story is told at. ratios: rows of the table. repeats: runs behind every time (after a warm-up).
    Writes spectrum.png and rate_quality.png to `output_directory`, if matplotlib is installed.

    Raises `InvalidArgument` for a ratio that cannot be, `MissingDependency` without transformers.
    """
    model, tokenizer = _load_model()
    calibration = reference_calibration()
    conversation = _read_conversation(tokenizer)
    codecs = {f"{wanted:g}": Codec(calibration, ratio=wanted) for wanted in sorted({*ratios, ratio})}
    codec = codecs[f"{ratio:g}"]
    say(_introduction(model, calibration, conversation, ratio))

    cached = conversation.read[:-1]
    cache, _ = timed(lambda: prefill(model, cached), 1)
    exact = _Voice(model, tokenizer, cache)
    exact_text = exact.go_on(conversation.read, n_generated)
    exact_answers = exact.answers(conversation)
    stream = codec.encode(cache, cached)
    info = inspect(stream)
    del cache, exact
    restored = _Voice(model, tokenizer, codec.decode(stream, cached))
    restored_text = restored.go_on(conversation.read, n_generated)
    restored_answers = restored.answers(conversation)

    text = torch.cat([conversation.read, conversation.held_out])
    qualities = evaluate_continuation(model, text, codecs, len(conversation.held_out), repeats)
    quality = next(quality for quality in qualities if quality.name == f"{ratio:g}")
    say(_cost(info, quality, codec))
    say(_continuation(exact_text, restored_text, n_generated))
    say(_facts(conversation, exact_answers, restored_answers))
    say(_quality(quality))
    remembered = {
        name: _n_right(_Voice(model, tokenizer, other.decode(other.encode(prefill(model, cached)))), conversation)
        for name, other in codecs.items()
    }
    say(_table(qualities, remembered, len(conversation.facts)))
    plots = _plot(Path(output_directory), calibration, codec, qualities, say)
    provenance = Provenance.now()
    say(f"Measured {provenance.describe()}.")
    return {
        "ratio": ratio,
        "stream": {key: value for key, value in asdict(info).items() if key != "sections"},
        "calibration_parameters": calibration.n_parameters,
        "model_parameters": _n_parameters(model),
        "continuation": {"exact": exact_text, "restored": restored_text, "equal": exact_text == restored_text},
        "facts": [
            {"name": name, "told": told, "exact": exact_answer, "restored": restored_answer}
            for (name, told), exact_answer, restored_answer in zip(
                conversation.facts, exact_answers, restored_answers, strict=True
            )
        ],
        "qualities": [{**asdict(quality), "facts_right": remembered[quality.name]} for quality in qualities],
        "plots": [str(path) for path in plots],
        "provenance": asdict(provenance),
    }


class _Voice:
    """A model that goes on, greedily, from one cache; the cache is left as it is."""

    def __init__(self, model: Any, tokenizer: Any, cache: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cache = cache

    def go_on(self, token_ids: Tensor, n_tokens: int) -> str:
        """The next `n_tokens` tokens after token_ids [T], of which the cache holds the first."""
        output = self._model.generate(
            token_ids[None],
            attention_mask=torch.ones_like(token_ids)[None],
            past_key_values=copy.deepcopy(self._cache),
            max_new_tokens=n_tokens,
            do_sample=False,
        )
        return str(self._tokenizer.decode(output[0, len(token_ids) :]))

    def answers(self, conversation: Conversation) -> list[str]:
        """What the model says to each question: the digits with which it begins."""
        found = []
        for (_, number), question in zip(conversation.facts, conversation.questions, strict=True):
            said = self.go_on(torch.cat([conversation.read, question]), len(number) + 2)
            digits = re.match(r"\s*(\d+)", said)
            found.append(digits[1] if digits else said.strip())
        return found


def _load_model() -> tuple[Any, Any]:
    """The reference model in bfloat16, the precision in which models are served: an exact token then costs 16 bits a value."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependency('the demo needs transformers; pip install "kvtc[demo]"') from error
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype="bfloat16", local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)


def _read_conversation(tokenizer: Any) -> Conversation:
    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)

    read, _, held_out = CONVERSATION.read_text(encoding="utf-8").partition(HELD_OUT)
    facts = FACT.findall(read)
    return Conversation(
        torch.cat([torch.tensor([tokenizer.bos_token_id]), ids(read)]),
        ids(held_out),
        facts,
        [ids(QUESTION.format(name)) for name, _ in facts],
    )


def _n_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _n_right(voice: _Voice, conversation: Conversation) -> int:
    return sum(
        answer == told for answer, (_, told) in zip(voice.answers(conversation), conversation.facts, strict=True)
    )
