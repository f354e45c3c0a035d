"""A sweep: profiles of kvtc and their baselines over ratios and windows, on text, on tasks and in
multi-turn use, in one result.

`kvtc evaluate` is this on the command line; the result is of the kind "evaluation" (`schema`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import Calibration
from ..codec import Codec
from ..errors import InvalidArgument
from ..huggingface.continuation import prefill
from ..process.progress import task, track
from ..process.torch_state import model_torch_state
from .baselines import EvictedKvtc, Tova, baselines
from .derived import fewer_bytes, within_a_point
from .method_names import split_name
from .methods import KvtcMethod, Method
from .multi_turn import MultiTurn, evaluate_turns
from .quality import Quality, evaluate_continuation, summarize
from .schema import EVALUATION, QualityRecord, ScoreRecord, TurnRecord
from .scoring import TaskScore, bits_per_byte, score_task, standard_tasks
from .tasks import key_value_retrieval


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The methods of a sweep.

    Parameters:
        profiles: profiles of kvtc. None (default): all that the calibration serves.
        ratios: ratios of each profile; default 8, 16, 32, 64 and 128.
        windows: last tokens kept exactly; each window is a part of the sweep of its own.
            Default 128 alone.
        baselines: names of series in `kvtc.evaluate.baselines`; None: all. Default none.
        evicted: for each n, TOVA keeps 1 / n of the tokens and the last profile codes them at
            every ratio. Default none.

    Example:
        >>> from kvtc.evaluate.sweep import Methods, methods_of
        >>> list(methods_of(calibration, Methods(profiles=("joint",), ratios=(16, 32), baselines=("FP8",)), window_tokens=128))
        ['FP8', 'joint 16x', 'joint 32x']
    """

    profiles: Sequence[str] | None = None
    ratios: Sequence[float] = (8, 16, 32, 64, 128)
    windows: Sequence[int] = (128,)
    baselines: Sequence[str] | None = ()
    evicted: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Held-out text.

    Parameters:
        files: text files; default none.
        n_tokens: tokens of a stretch; default 1792.
        n_continuation: last tokens of a stretch, which are predicted; default 256.
        per_file: evenly spaced stretches of each file; default 4.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.evaluate.sweep import Texts, stretches
        >>> written = Path("held_out.txt").write_text(text)
        >>> texts = Texts(files=[Path("held_out.txt")], n_tokens=300, per_file=2)
        >>> [len(ids) for ids in stretches(tokenizer, texts, texts.files)]
        [300, 300]
    """

    files: Sequence[Path] = ()
    n_tokens: int = 1792
    n_continuation: int = 256
    per_file: int = 4


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Look-up tasks.

    Parameters:
        names: names in `kvtc.evaluate.scoring.standard_tasks`; None: all. Default none.
        contexts: tokens of a context; each length is measured. Default 1024 alone.
        n_contexts: contexts of each length; default 6.
        n_questions: questions for each context; default 8.
        published: files of "Lost in the Middle"; default none.

    Example:
        >>> from kvtc.evaluate.sweep import Sweep, Tasks
        >>> Sweep(tasks=Tasks(names=None, contexts=(512, 1024))).tasks.n_contexts
        6
    """

    names: Sequence[str] | None = ()
    contexts: Sequence[int] = (1024,)
    n_contexts: int = 6
    n_questions: int = 8
    published: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that is measured.

    Parameters:
        methods: what is measured.
        texts: the text on which it is measured.
        tasks: the tasks on which it is measured.
        turns: (tokens of a turn, number of turns) of multi-turn use; default none.
        n_bits_windows: windows of 1 024 tokens of each file for bits per byte; 0 (default):
            none.
        profile_files: text on which CacheGen is profiled; default none.
        on_texts: whether the texts themselves are measured (default); otherwise they only serve
            to make tasks.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.evaluate.sweep import Methods, Sweep, Texts
        >>> sweep = Sweep(methods=Methods(ratios=(32,)), texts=Texts(files=[Path("held_out.txt")]), turns=[(256, 4)])
        >>> sweep.methods.windows, sweep.texts.n_continuation
        ((128,), 256)
    """

    methods: Methods = field(default_factory=Methods)
    texts: Texts = field(default_factory=Texts)
    tasks: Tasks = field(default_factory=Tasks)
    turns: Sequence[tuple[int, int]] = ()
    n_bits_windows: int = 0
    profile_files: Sequence[Path] = ()
    on_texts: bool = True


@model_torch_state()
def run_sweep(
    model: Any, tokenizer: Any, calibration: Calibration | None, sweep: Sweep, model_name: str = ""
) -> dict[str, Any]:
    """Run a sweep, with the exact cache beside everything.

    Parameters:
        model: a transformers causal LM.
        tokenizer: of the model.
        calibration: of the model. None: only the exact cache is measured, on tasks and for bits
            per byte.
        sweep: what to measure.
        model_name: the name of the model in the result; default "".

    Returns:
        A result of the kind "evaluation".

    Raises:
        InvalidArgument: a baseline, task or text does not exist, or a text is too short.
            Encoding raises what it raises.
    """
    running = [path.read_text(encoding="utf-8") for path in sweep.texts.files]
    result: dict[str, Any] = {
        "kind": EVALUATION,
        "model": model_name,
        "n_layers": model.config.get_text_config().num_hidden_layers,
        "cache_dtype": str(model.dtype).removeprefix("torch."),
    }
    if sweep.n_bits_windows:
        result["bits_per_byte"] = {}
        for path, text in track(list(zip(sweep.texts.files, running, strict=True)), "bits per byte", "texts"):
            result["bits_per_byte"][path.stem] = bits_per_byte(model, tokenizer, text, 1024, sweep.n_bits_windows)
    profiled = list(stretches(tokenizer, sweep.texts, sweep.profile_files))
    if profiled:
        profiled = [prefill(model, ids) for ids in track(profiled, "texts to profile on", "texts")]
    if calibration is not None and sweep.on_texts:
        texts = list(stretches(tokenizer, sweep.texts, sweep.texts.files))
        result |= _on_texts(model, texts, calibration, profiled, sweep)
    if sweep.tasks.names is None or sweep.tasks.names or sweep.tasks.published:
        result |= _on_tasks(model, tokenizer, "\n".join(running), calibration, profiled, sweep)
    return result


def methods_of(
    calibration: Calibration,
    methods: Methods,
    window_tokens: int,
    profile_caches: Sequence[Any] = (),
    model: Any = None,
) -> dict[str, Method]:
    """Every method by name, for one window. model: what `conditional` recomputes layers of.

    Raises `InvalidArgument` for baselines that are not known.
    """
    found: dict[str, Method] = {}
    if methods.baselines is None or methods.baselines:
        known = baselines(calibration.geometry, window_tokens, profile_caches)
        series = dict.fromkeys(split_name(name)[0] for name in known)
        wanted = set(series if methods.baselines is None else methods.baselines)
        if unknown := {name for name in wanted if not any(_is_of(one, name) for one in series)}:
            hint = "; CacheGen needs text to be profiled on" if "CacheGen" in unknown else ""
            raise InvalidArgument(
                f"unknown baselines: {', '.join(sorted(unknown))}; expected {', '.join(series)}{hint}"
            )
        chosen = {one for one in series if any(_is_of(one, name) for name in wanted)}
        found |= {name: method for name, method in known.items() if split_name(name)[0] in chosen}
        if any(_is_of(one, "zstd") for one in chosen):
            found["kvtc lossless"] = KvtcMethod(Codec(calibration, lossless=True))
    codecs, _ = codecs_of(calibration, methods, window_tokens, model)
    # Layers cannot be recomputed for a cache with gaps.
    last = [profile for profile in _profiles(calibration, methods) if profile != "conditional"][-1:]
    for divisor in methods.evicted:
        for (profile, ratio), codec in codecs.items():
            if profile in last:
                name = f"TOVA 1/{divisor} + {profile} {ratio:g}x"
                found[name] = EvictedKvtc(eviction=Tova(share=1 / divisor), codec=codec)
    return found | {f"{profile} {ratio:g}x": KvtcMethod(codec) for (profile, ratio), codec in codecs.items()}


def codecs_of(
    calibration: Calibration, methods: Methods, window_tokens: int, model: Any = None
) -> tuple[dict[tuple[str, float], Codec], list[dict[str, Any]]]:
    """Codecs by profile and ratio, and for each ratio that a profile cannot reach its `name`, the
    window and `why`.
    """
    found, not_reached = {}, []
    for profile in _profiles(calibration, methods):
        for ratio in methods.ratios:
            try:
                given = model if profile == "conditional" else None
                found[profile, ratio] = Codec(
                    calibration, profile, ratio=ratio, window_tokens=window_tokens, model=given
                )
            except InvalidArgument as error:
                if profile not in calibration.profiles:
                    raise
                name = f"{profile} {ratio:g}x"
                not_reached.append({"name": name, "window_tokens": window_tokens, "why": str(error)})
    return found, not_reached


def _profiles(calibration: Calibration, methods: Methods) -> Sequence[str]:
    return calibration.profiles if methods.profiles is None else methods.profiles


def _is_of(series: str, name: str) -> bool:
    """Whether a series is what was named, or a variant of it: "GEAR (rank 1)" is of "GEAR"."""
    return series == name or series.startswith(f"{name} (")


def stretches(tokenizer: Any, texts: Texts, files: Sequence[Path]) -> Iterator[Tensor]:
    """Token ids [n_tokens] of evenly spaced stretches of each file, each with the token that begins
    a text, if there is one.
    """
    first = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for index in range(texts.per_file):
            start = len(text) * index // texts.per_file
            ids = tokenizer(text[start : start + 12 * texts.n_tokens], add_special_tokens=False).input_ids
            if len(first) + len(ids) < texts.n_tokens:
                raise InvalidArgument(
                    f"{file}: stretch {index + 1} of {texts.per_file} holds {len(ids)} tokens; expected {texts.n_tokens}"
                )
            yield torch.tensor([*first, *ids][: texts.n_tokens])


def _on_texts(
    model: Any, texts: Sequence[Tensor], calibration: Calibration, profiled: Sequence[Any], sweep: Sweep
) -> dict[str, Any]:
    """Qualities and multi-turn use, window by window."""
    qualities: dict[int, list[Quality]] = {}
    not_reached: list[dict[str, Any]] = []
    turns: list[TurnRecord] = []
    for window in sweep.methods.windows:
        methods = methods_of(calibration, sweep.methods, window, profiled, model)
        not_reached += codecs_of(calibration, sweep.methods, window, model)[1]
        what = f"quality: window {window}, {len(texts)} texts of {sweep.texts.n_tokens:,} tokens"
        with task(what, len(texts) * len(methods), "caches") as advance:
            measured = [
                evaluate_continuation(model, ids, methods, sweep.texts.n_continuation, advance=advance) for ids in texts
            ]
        qualities[window] = [summarize(of_one) for of_one in zip(*measured, strict=True)]
        for turn_tokens, n_turns in sweep.turns:
            turns += _turns(model, texts, calibration, profiled, sweep, window, turn_tokens, n_turns)
    found: dict[str, Any] = {
        "qualities": [
            asdict(QualityRecord(**asdict(quality), window_tokens=window))
            for window, of_window in qualities.items()
            for quality in of_window
        ],
        "fewer_bytes": [asdict(figure) for figure in fewer_bytes(qualities)],
    }
    if not_reached:
        found["not_reached"] = not_reached
    if turns:
        found["turns"] = [asdict(turn) for turn in turns]
    return found


def _turns(
    model: Any,
    texts: Sequence[Tensor],
    calibration: Calibration,
    profiled: Sequence[Any],
    sweep: Sweep,
    window: int,
    turn_tokens: int,
    n_turns: int,
) -> list[TurnRecord]:
    """All methods that can be used again and again. A window shrinks by a turn when it is coded,
    and grows to its size again.
    """
    after = max(0, window - turn_tokens)
    methods = {
        name: method
        for name, method in methods_of(calibration, sweep.methods, after, profiled, model).items()
        if not name.startswith(("H2O", "TOVA"))
    }
    what = f"multi-turn use: window {window}, {n_turns} turns of {turn_tokens} tokens"
    with task(what, len(texts) * len(methods), "caches") as advance:
        measured: list[MultiTurn] = evaluate_turns(model, texts, methods, turn_tokens, n_turns, advance)
    return [TurnRecord(**asdict(turn), window_tokens=after) for turn in measured]


def _on_tasks(
    model: Any,
    tokenizer: Any,
    text: str,
    calibration: Calibration | None,
    profiled: Sequence[Any],
    sweep: Sweep,
) -> dict[str, Any]:
    """Scores and what follows from them, window by window."""
    scores: list[ScoreRecord] = []
    for window in sweep.methods.windows:
        methods = {} if calibration is None else methods_of(calibration, sweep.methods, window, profiled, model)
        for context in sweep.tasks.contexts:
            for name, examples in _examples(tokenizer, text, sweep.tasks, context).items():
                what = f"tasks: window {window}, {name} at {context:,} tokens"
                with task(what, len(examples) * (1 + len(methods)), "caches") as advance:
                    found: list[TaskScore] = score_task(model, tokenizer.bos_token_id, name, examples, methods, advance)
                scores += [ScoreRecord(**asdict(score), window_tokens=window) for score in found]
    return {
        "scores": [asdict(score) for score in scores],
        "within_a_point": [asdict(figure) for figure in within_a_point(scores)],
    }


def _examples(tokenizer: Any, text: str, tasks: Tasks, context: int) -> Mapping[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    if tasks.names is None or tasks.names:
        drawn = standard_tasks(tokenizer, text, context, tasks.n_contexts, tasks.n_questions)
        wanted = set(drawn if tasks.names is None else tasks.names)
        if unknown := wanted - set(drawn):
            raise InvalidArgument(f"unknown tasks: {', '.join(sorted(unknown))}; expected {', '.join(drawn)}")
        found |= {name: examples for name, examples in drawn.items() if name in wanted}
    for path in tasks.published:
        n_examples = max(1, tasks.n_contexts * tasks.n_questions // 2)
        found[path.name.partition(".")[0]] = key_value_retrieval(
            path, lambda piece: tokenizer.encode(piece, add_special_tokens=False), context - 80, n_examples
        )
    return found
