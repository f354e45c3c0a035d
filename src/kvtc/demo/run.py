"""What `kvtc demo` does: prefill, store, restore, go on, and measure; `report.py` puts it into
words.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import load_calibration
from ..codec import Codec
from ..codec.inspection import inspect
from ..errors import InvalidArgument
from ..evaluate.provenance import Provenance
from ..evaluate.quality import Quality, evaluate_continuation
from ..huggingface.continuation import prefill
from ..installed_models import SMOLLM2, InstalledModel, installed_model
from ..process.progress import task, track
from ..reference import CALIBRATION_FILE, MODEL_DIRECTORY, MODEL_NAME, load_model
from ..report.charts import save_picture
from ..report.text_sections import rate_distortion
from . import report

CONVERSATION = Path(__file__).parent / "conversation.txt"
HELD_OUT = "\n=====\n"
FACT = re.compile(r"The magic number for (\w+) is (\d+)\.")
QUESTION = "\n\nThe magic number for {} is"
PICTURE = "rate_quality.svg"
REFERENCE = "reference"
SHIPPED = InstalledModel(MODEL_NAME, MODEL_DIRECTORY, CALIBRATION_FILE)


@dataclass(frozen=True)
class Conversation:
    """The text of the demo as token ids.

    Parameters:
        read: ids [T] of the text that the model has read.
        held_out: ids [n] of how the text continues.
        facts: (name, number), as told in the part that is read.
        questions: for each fact, the ids of the question about it.
    """

    read: Tensor
    held_out: Tensor
    facts: list[tuple[str, str]]
    questions: list[Tensor]

    @property
    def cached(self) -> Tensor:
        """[T - 1]: all tokens read but the last, which is fed to the model again to get its
        prediction.
        """
        return self.read[:-1]


def run_demo(
    output_directory: str | Path,
    ratio: float = 16,
    *,
    ratios: Sequence[float] = (8, 16, 32, 64),
    n_generated: int = 40,
    repeats: int = 5,
    source: InstalledModel = SHIPPED,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo, and write rate_quality.svg.

    Parameters:
        output_directory: where the picture is written.
        ratio: the ratio of the calibration's last profile, in the main part.
        ratios: ratios of the table, for every profile.
        n_generated: tokens that the model continues by.
        repeats: number of runs behind every time, after a warm-up run.
        source: the model, with its calibration; the default is the one that ships with kvtc.
        say: gets the text block by block.

    Returns:
        Every figure, ready for JSON.

    Raises:
        InvalidArgument: if a ratio is impossible.
        MissingDependency: if transformers is not installed.
    """
    calibration = load_calibration(source.calibration)
    # In bfloat16, as models are served: a token kept exactly then costs 16 bits a value and not 32.
    model, tokenizer = load_model(source.directory, dtype="bfloat16")
    codecs = {
        f"{profile} {wanted:g}x": Codec(calibration, profile, ratio=wanted, model=model)
        for profile in calibration.profiles
        for wanted in sorted({*ratios, ratio})
    }
    chosen = f"{calibration.profiles[-1]} {ratio:g}x"
    talk = _read_conversation(tokenizer)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    introduction = report.introduction(
        source.name,
        model.config,
        n_parameters,
        calibration,
        source.calibration.stat().st_size,
        len(talk.read),
        len(talk.held_out),
    )
    say(introduction)

    cache = prefill(model, talk.cached)
    exact = _Speaker(model, tokenizer, cache)
    exact_text, exact_answers = exact.go_on(talk.read, n_generated), exact.answers(talk)
    stream = codecs[chosen].encode(cache, talk.cached)
    # From here on the exact cache is gone; the model has nothing but the stream.
    del cache, exact
    restored = _Speaker(model, tokenizer, codecs[chosen].decode(stream, talk.cached))
    restored_text, restored_answers = restored.go_on(talk.read, n_generated), restored.answers(talk)

    text = torch.cat([talk.read, talk.held_out])
    with task("measuring every profile", len(codecs), "codecs") as advance:
        qualities = evaluate_continuation(model, text, codecs, len(talk.held_out), repeats, advance)
    quality = next(quality for quality in qualities if quality.name == chosen)
    say(report.cost(inspect(stream), quality, chosen, repeats))
    say(report.continuation(exact_text, restored_text, n_generated))
    say(report.facts(talk.facts, exact_answers, restored_answers))
    say(report.predictions(quality))
    cache = prefill(model, talk.cached)
    n_known = {"exact": _n_right(exact_answers, talk), chosen: _n_right(restored_answers, talk)}
    for name, codec in track(codecs.items(), "asking again from every codec", "codecs"):
        if name != chosen:
            speaker = _Speaker(model, tokenizer, codec.decode(codec.encode(cache, talk.cached), talk.cached))
            n_known[name] = _n_right(speaker.answers(talk), talk)
    say(report.table(qualities, n_known, len(talk.facts)))
    plot = _draw(Path(output_directory), source.name, qualities)
    say(report.picture(plot))
    provenance = Provenance.now()
    say(report.ending(provenance))
    return {
        "model": source.name,
        "ratio": ratio,
        "calibration_parameters": calibration.n_parameters,
        "model_parameters": n_parameters,
        "continuation": {"exact": exact_text, "restored": restored_text, "equal": exact_text == restored_text},
        "facts": [
            {"name": name, "told": told, "exact": from_exact, "restored": from_restored}
            for (name, told), from_exact, from_restored in zip(talk.facts, exact_answers, restored_answers, strict=True)
        ],
        "qualities": [{**asdict(quality), "n_known": n_known[quality.name]} for quality in qualities],
        "plot": str(plot),
        "provenance": asdict(provenance),
    }


def choose_model(name: str | None = None) -> tuple[InstalledModel, str]:
    """The model to show: the one that is named, otherwise smollm2-135m where it is ready, otherwise
    the one that ships with kvtc.

    Returns:
        (the model, why it is not smollm2-135m and what to do about that; empty where nothing is to say).

    Raises:
        InvalidArgument: if the model that is named is not installed or not calibrated.
    """
    if name == REFERENCE:
        return SHIPPED, ""
    try:
        found = installed_model(name or SMOLLM2)
        if not found.calibration.is_file():
            raise InvalidArgument(
                f"{found.name} is not calibrated: expected {found.calibration}; "
                f"`kvtc calibrate --model {found.name} --text FILE -o {found.calibration}` makes it"
            )
    except InvalidArgument as error:
        if name is not None:
            raise
        return SHIPPED, f"Shown on {SHIPPED.name}, a small model. {error}."
    return found, ""


class _Speaker:
    """A model that goes on, greedily, from one cache; the cache is left as it is."""

    def __init__(self, model: Any, tokenizer: Any, cache: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cache = cache

    def go_on(self, token_ids: Tensor, n_tokens: int) -> str:
        """The next `n_tokens` tokens after token_ids [T], of which the cache holds the first ones."""
        output = self._model.generate(
            token_ids[None],
            attention_mask=torch.ones_like(token_ids)[None],
            past_key_values=copy.deepcopy(self._cache),
            max_new_tokens=n_tokens,
            do_sample=False,
        )
        return str(self._tokenizer.decode(output[0, len(token_ids) :]))

    def answers(self, talk: Conversation) -> list[str]:
        """What the model says to each question, up to the end of the number."""
        said = [
            self.go_on(torch.cat([talk.read, question]), len(number) + 1)
            for (_, number), question in zip(talk.facts, talk.questions, strict=True)
        ]
        return [re.split(r"[.\n]", answer.strip())[0] for answer in said]


def _n_right(answers: list[str], talk: Conversation) -> int:
    return sum(answer == told for answer, (_, told) in zip(answers, talk.facts, strict=True))


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


def _draw(directory: Path, name: str, qualities: list[Quality]) -> Path:
    path, first = directory / PICTURE, qualities[0]
    read = f"{name}, {first.n_tokens:,} tokens cached, {first.n_continuation} predictions"
    chart = rate_distortion([asdict(quality) for quality in qualities], "body_ratio")
    save_picture(path, "What quality costs: lower is better, further right is smaller", read, [chart])
    return path
