"""Sections of what is measured on tasks: scores, how small a cache may get, accuracy by place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..evaluate.derived import MEAN_OF_TASKS, ONE_POINT, WithinAPoint, share, within_a_point
from ..evaluate.schema import ScoreRecord
from ..evaluate.scoring import EXACT, N_DEPTHS
from .parts import Chart, Result, Section, Table, by_series, grouped, percent, ratio

UNKNOWN_WINDOW = -1
LEAST_SOLVED = 0.1
"""Share of questions that the exact cache must answer right for a task to count: guessing answers hardly any."""


def scores(result: Result) -> Iterator[Section]:
    """A section a window: a row a method, a column a task, contexts one after the other."""
    records = [_record(score, result.get("window_tokens", UNKNOWN_WINDOW)) for score in result["scores"]]
    for window, chosen in grouped(records, lambda record: record.window_tokens).items():
        lengths = _contexts(chosen)
        parts: list[Table | Chart] = []
        for length, of_length in lengths.items():
            table = _score_table(of_length, f"Answers right, %, contexts of up to {length:,} tokens")
            parts += [_accuracy_chart(of_length, length, field) for field in ("body_ratio", "total_ratio")] + [table]
            parts += _agreement_table(of_length, length)
            parts.append(_depth_table(of_length, length))
        parts += _within(within_a_point(chosen))
        where = "" if window == UNKNOWN_WINDOW else f", window {window}"
        note = (
            "Whole answers for look-ups, tokens for copying. Marked: more than a point below the exact cache. The mean leaves out "
            "tasks that the exact cache never solves."
        )
        yield Section(f"tasks{where}", note, [part for part in parts if not isinstance(part, Chart) or part.lines])


def phases(result: Result) -> Iterator[Section]:
    """Accuracy by where the answer lies in the context, and by its place on the grid of chunks."""
    points = result["points"]
    parts: list[Table | Chart] = []
    for field, title, is_share in (
        ("depth", "depth of the answer in the context, %", True),
        ("phase", "phase, tokens", False),
    ):
        places = sorted({point[field] for point in points if point.get(field) is not None})
        if len(places) > 1:
            names = list(dict.fromkeys(point["name"] for point in points))
            means = {(name, place): _mean_at(points, name, field, place) for name in names for place in places}
            lines = {
                name: [
                    (100 * place if is_share else float(place), found, f"{name}: {100 * found:.1f} %")
                    for place in places
                    if (found := means[name, place]) is not None
                ]
                for name in names
            }
            parts.append(
                Chart(f"Answers right by {field}", lines, title, "answers right, %", x_log=False, y_log=False, x_times=False,
                      y_percent=True)
            )  # fmt: skip
            labels = [f"{100 * place:.0f} %" if is_share else f"{place:g}" for place in places]
            rows = [[name, *(percent(means[name, place]) for place in places)] for name in names]
            parts.append(Table([title, *labels], rows, is_long=len(places) > 12))
    note = f"{sum(point['n_questions'] for point in points):,} questions in all."
    yield Section("accuracy by place", note, parts)


def _record(score: Result, window: Any) -> ScoreRecord:
    values = {field.name: score.get(field.name) for field in fields(ScoreRecord)}
    return ScoreRecord(**{**values, "window_tokens": score.get("window_tokens", window)})


def _contexts(records: Sequence[ScoreRecord]) -> dict[int, list[ScoreRecord]]:
    """Scores by the length that was asked for: the contexts of one run differ by some tokens from
    task to task.
    """
    found: dict[int, list[ScoreRecord]] = {}
    for record in sorted(records, key=lambda record: -record.context):
        length = next((known for known in found if record.context >= 0.7 * known), record.context)
        found.setdefault(length, []).append(record)
    order = {id(record): place for place, record in enumerate(records)}
    return {length: sorted(found[length], key=lambda record: order[id(record)]) for length in sorted(found)}


def _score_table(records: Sequence[ScoreRecord], caption: str) -> Table:
    tasks = list(dict.fromkeys(record.task for record in records))
    found = {(record.codec, record.task): record for record in records}
    exact = {task: share(found[EXACT, task]) for task in tasks if (EXACT, task) in found}
    rows, low = [], set()
    for row, codec in enumerate(dict.fromkeys(record.codec for record in records)):
        of_codec = [found[codec, task] for task in tasks if (codec, task) in found]
        body, total = _ratios(of_codec)
        cells = [percent(share(found[codec, task])) if (codec, task) in found else "" for task in tasks]
        rows.append([codec, ratio(body), ratio(total), percent(_mean(of_codec, exact)), *cells])
        for column, task in enumerate(tasks, start=4):
            if (codec, task) in found and share(found[codec, task]) < exact.get(task, 0.0) - ONE_POINT - 1e-9:
                low.add((row, column))
        mean, wanted = (_mean(of_one, exact) for of_one in (of_codec, [found[EXACT, task] for task in exact]))
        if mean is not None and wanted is not None and mean < wanted - ONE_POINT - 1e-9:
            low.add((row, 3))
    return Table(
        ["method", "body_ratio", "total_ratio", "mean", *tasks],
        rows,
        caption,
        low=frozenset(low),
        is_long=len(rows) > 16,
    )


def _agreement_table(records: Sequence[ScoreRecord], length: int) -> list[Table]:
    """What changes against the exact cache, over all questions of tasks that it solves; none for results without it."""
    solved = {record.task for record in records if record.codec == EXACT and record.exact >= LEAST_SOLVED}
    rows = []
    for codec, of_codec in grouped(records, lambda record: record.codec).items():
        chosen = [record for record in of_codec if record.task in solved]
        known = [
            (record.n_questions, record.same, record.change_low, record.change_high)
            for record in chosen
            if record.same is not None and record.change_low is not None and record.change_high is not None
        ]
        if codec == EXACT or not known or len(known) < len(chosen):
            continue
        n = sum(n_questions for n_questions, *_ in known)
        same = sum(k * its_same for k, its_same, _, _ in known) / n
        change = sum(k * (low + high) / 2 for k, _, low, high in known) / n
        spread = sum((k * (high - low) / 2) ** 2 for k, _, low, high in known) ** 0.5 / n
        body, total = _ratios(chosen)
        interval = f"{100 * change:+.1f} ({100 * (change - spread):+.1f} to {100 * (change + spread):+.1f})"
        rows.append([codec, ratio(body), ratio(total), str(n), percent(same), interval])
    header = [
        "method",
        "body_ratio",
        "total_ratio",
        "questions",
        "same answers, %",
        "answers right, change in points (95 %)",
    ]
    caption = f"Against the exact cache's answers, tasks that it solves, contexts of up to {length:,} tokens"
    return [Table(header, rows, caption, is_long=len(rows) > 16)] if rows else []


def _accuracy_chart(records: Sequence[ScoreRecord], length: int, field: str) -> Chart:
    exact = {record.task: share(record) for record in records if record.codec == EXACT}
    points = []
    for codec, of_codec in grouped(records, lambda record: record.codec).items():
        mean, at = _mean(of_codec, exact), _ratios(of_codec)[field == "total_ratio"]
        if mean is not None and (at is not None or codec == EXACT):
            points.append((codec, (at or 1.0, mean, f"{codec}: {100 * mean:.1f} % at {at or 1:.1f}x")))
    lines = by_series(points)
    return Chart(
        f"Mean of tasks against {field}, contexts of up to {length:,} tokens", lines if len(lines) > 1 else {},
        field, "answers right, mean of tasks, %", y_log=False, y_percent=True,
    )  # fmt: skip


def _depth_table(records: Sequence[ScoreRecord], length: int) -> Table:
    rows = []
    for codec, of_codec in grouped(records, lambda record: record.codec).items():
        depths = [record.by_depth for record in of_codec if record.by_depth]
        quarters = [[value for depth in depths if (value := depth[n]) is not None] for n in range(N_DEPTHS)]
        rows.append([codec, *(percent(sum(found) / len(found)) if found else "" for found in quarters)])
    header = ["method", *(f"{quarter + 1}. quarter" for quarter in range(N_DEPTHS))]
    return Table(
        header, rows, f"Whole answers right, %, by where they lie, contexts of up to {length:,} tokens", is_long=True
    )


def _within(figures: Sequence[WithinAPoint]) -> list[Table]:
    """How small a cache may get: a row a series, body and total ratio over the mean of tasks, then
    the total ratio task by task.
    """
    if not figures:
        return []
    tasks = list(dict.fromkeys(figure.task for figure in figures if figure.task != MEAN_OF_TASKS))
    found = {(figure.series, figure.task): figure for figure in figures}
    rows = []
    for series in dict.fromkeys(figure.series for figure in figures):
        mean = found[series, MEAN_OF_TASKS]
        of_tasks = [_reached(found[series, task], "total_ratio") for task in tasks]
        rows.append([series, _reached(mean, "body_ratio"), _reached(mean, "total_ratio"), *of_tasks])
    caption = (
        "Highest measured ratio within a point of the exact cache, as all lower ones are; by task, the total_ratio"
    )
    return [Table(["method", "mean, body", "mean, total", *tasks], rows, caption)]


def _reached(figure: WithinAPoint, field: str) -> str:
    value = getattr(figure, field)
    if value is None:
        return "-"
    return f"{'≥ ' if figure.is_bound else ''}{value:.1f}x"


def _mean(records: Sequence[ScoreRecord], exact: Mapping[str, float]) -> float | None:
    shares = [share(record) for record in records if exact.get(record.task)]
    return sum(shares) / len(shares) if shares else None


def _ratios(records: Sequence[ScoreRecord]) -> tuple[float | None, float | None]:
    """Body and total ratio over all tasks, bytes over bytes."""
    body = [record.body_ratio for record in records if record.body_ratio]
    total = [record.total_ratio for record in records if record.total_ratio]
    return (
        len(body) / sum(1 / value for value in body) if body else None,
        len(total) / sum(1 / value for value in total) if total else None,
    )


def _mean_at(points: Sequence[Result], name: str, field: str, place: float) -> float | None:
    found = [point for point in points if point["name"] == name and point.get(field) == place]
    n = sum(point["n_questions"] for point in found)
    return sum(point["exact"] * point["n_questions"] for point in found) / n if n else None
