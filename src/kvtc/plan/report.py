"""A plan's results as tables and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidPlan
from ..report.charts import save_picture
from ..report.parts import Chart, Marks, Point
from ..report.table import format_bytes, format_fields, format_table
from .planning import FIGURES, Published

TITLES = dict(zip(FIGURES, ("Time to first token", "Latency of the whole answer"), strict=True))


def format_plan(result: Mapping[str, Any]) -> str:
    """What `run_plan` returned, for people."""
    blocks = [result["description"], _model(result), _times(result), _costs(result)]
    return "\n\n".join([*blocks, _numbers(result)])


def _model(result: Mapping[str, Any]) -> str:
    model = result["model"]
    fields = [
        (
            "model",
            f"{model['name']}, {model['parameters']:,} parameters, {format_bytes(model['bytes_per_token'])} of cache a token",
        ),
        ("GPU memory for caches", f"{format_bytes(model['gpu_cache_bytes'])} an engine"),
    ]
    for calibration in result["calibrations"]:
        share = f"{calibration['parameters']:,} numbers, {calibration['share_of_model']:.1%} of the model's parameters"
        fields.append((f"calibration {calibration['codec']}", f"rank {calibration['rank']:,}: {share}"))
    return format_fields(fields)


def _times(result: Mapping[str, Any]) -> str:
    header = ["policy", "TTFT s", "p50", "p95", "latency s", "p50", "p95", "hits", "requests/s"]
    rows = [
        [
            run["policy"],
            *(f"{run[name][key]:.2f}" for name in FIGURES for key in ("mean", "p50", "p95")),
            _hits(run["hit_rate"]),
            f"{run['requests_per_second']:.3g}",
        ]
        for run in result["runs"]
    ]
    return _swept_table(result, header, rows)


def _costs(result: Mapping[str, Any]) -> str:
    activities = list(result["runs"][0]["gpu_seconds_per_request"])
    names = [activity.replace("_", " ") for activity in activities]
    header = ["policy", "a conversation", "stored", *names, "busy", "provisioned", "used", "cost/1000"]
    rows = []
    for run in result["runs"]:
        spent, stored, cost = (
            run["gpu_seconds_per_request"],
            run["stored_bytes_per_conversation"],
            run["cost_per_1000_requests"],
        )
        busy, provisioned = sum(spent.values()), run["provisioned_gpu_seconds_per_request"]
        rows.append(
            [
                run["policy"],
                format_bytes(run["raw_bytes_per_conversation"]),
                format_bytes(stored) if stored else "-",
                *(f"{spent[activity]:.2f}" for activity in activities),
                f"{busy:.2f}",
                f"{provisioned:.2f}",
                f"{busy / provisioned:.0%}",
                "-" if cost is None else f"{cost:.2f}",
            ]
        )
    return "Bytes, and GPU-seconds a request by what they go into\n" + _swept_table(result, header, rows)


def _numbers(result: Mapping[str, Any]) -> str:
    rows = [[each["name"], _value(each["value"]), each["source"], each["note"]] for each in result["numbers"]]
    sources = [[each["name"], each["kind"], each["text"]] for each in result["sources"]]
    return "\n\n".join(
        [
            format_table(["number", "value", "source", "note"], rows),
            format_table(["source", "kind", "what it is"], sources),
        ]
    )


def plot_plan(result: Mapping[str, Any], published: Sequence[Published], path: str | Path) -> None:
    """Draw mean time to first token and mean latency against the sweep, a line a policy, beside
    published figures.

    Parameters:
        result: what `run_plan` returned.
        published: figures to draw as marks: filled where the plan's numbers were fitted to them,
            hollow elsewhere.
        path: the SVG file to write.

    Raises:
        InvalidPlan: if the plan has no sweep.
    """
    if not result["sweep_field"]:
        raise InvalidPlan("there is nothing to plot against: the plan has no sweep")
    charts = [_chart(result, published, figure, title) for figure, title in TITLES.items()]
    note = f"{result['description']}. Large marks: published, hollow where nothing was fitted to them."
    save_picture(path, "What becomes of a cache between two questions", note, charts)


def _chart(result: Mapping[str, Any], published: Sequence[Published], figure: str, title: str) -> Chart:
    lines: dict[str, list[Point]] = {}
    for run in result["runs"]:
        seconds = run[figure]["mean"]
        label = f"{run['policy']} at {run['value']:g}: {seconds:.3g} s"
        lines.setdefault(run["policy"], []).append((run["value"], seconds, label))
    marks = [_marks(each, fitted) for each in published if each.figure == figure for fitted in (True, False)]
    across = result["sweep_field"].replace("_", " ")
    return Chart(title, lines, across, "seconds, mean", x_log=False, x_times=False, marks=marks)


def _marks(published: Published, fitted: bool) -> Marks:
    """Of published figures those that numbers of the plan were fitted to, or the others."""
    points = [
        (value, seconds, f"{published.policy} at {value:g}, {published.source}: {seconds:g} s")
        for value, seconds in zip(published.values, published.seconds, strict=True)
        if (value in published.fitted) == fitted
    ]
    return Marks(published.policy, points, is_hollow=not fitted)


def _swept_table(result: Mapping[str, Any], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A row a run, behind the run's value of the field that is swept, if one is."""
    if not result["sweep_field"]:
        return format_table(header, rows)
    values = [f"{run['value']:g}" for run in result["runs"]]
    return format_table(
        [result["sweep_field"], *header], [[value, *row] for value, row in zip(values, rows, strict=True)]
    )


def _hits(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items()) or "none kept"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{tokens:g}:{seconds:g}" for tokens, seconds in value)
    return f"{float(value):g}"
