"""A plan's results as tables and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidPlan
from ..report.table import format_bytes, format_fields, format_table
from .planning import FIGURES, Published

TITLES = dict(zip(FIGURES, ("Time to first token, seconds", "Latency of the whole answer, seconds"), strict=True))


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
    swept = _swept(result)
    header = [*swept, "policy", "TTFT s", "p50", "p95", "latency s", "p50", "p95", "hits", "requests/s"]
    rows = [
        [
            *_sweep_cells(swept, run),
            run["policy"],
            *(f"{run[name][key]:.2f}" for name in FIGURES for key in ("mean", "p50", "p95")),
            _hits(run["hit_rate"]),
            f"{run['requests_per_second']:.3g}",
        ]
        for run in result["runs"]
    ]
    return format_table(header, rows)


def _costs(result: Mapping[str, Any]) -> str:
    swept = _swept(result)
    activities = list(result["runs"][0]["gpu_seconds_per_request"])
    header = [
        *swept,
        "policy",
        "a conversation",
        "stored",
        *(activity.replace("_", " ") for activity in activities),
        "busy",
        "provisioned",
        "used",
        "cost/1000",
    ]
    rows = []
    for run in result["runs"]:
        spent, stored, cost = (
            run["gpu_seconds_per_request"],
            run["stored_bytes_per_conversation"],
            run["cost_per_1000_requests"],
        )
        rows.append(
            [
                *_sweep_cells(swept, run),
                run["policy"],
                format_bytes(run["raw_bytes_per_conversation"]),
                format_bytes(stored) if stored else "-",
                *(f"{spent[activity]:.2f}" for activity in activities),
                f"{sum(spent.values()):.2f}",
                f"{run['provisioned_gpu_seconds_per_request']:.2f}",
                f"{sum(spent.values()) / run['provisioned_gpu_seconds_per_request']:.0%}",
                "-" if cost is None else f"{cost:.2f}",
            ]
        )
    return "Bytes, and GPU-seconds a request by what they go into\n" + format_table(header, rows)


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
    """Mean time to first token and mean latency against the sweep, a line a policy, and published figures. Writes a PNG.

    Raises `InvalidPlan` for a plan without a sweep, `MissingDependency` where matplotlib is not installed.
    """
    from ..report.plots import MARKERS, SERIES, plot_style, require_matplotlib, save_figure, set_title

    if not result["sweep_field"]:
        raise InvalidPlan("there is nothing to plot against: the plan has no sweep")
    plt = require_matplotlib()
    policies = list(dict.fromkeys(run["policy"] for run in result["runs"]))
    with plt.rc_context(plot_style()):
        figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
        for panel, (name, title) in zip(panels, TITLES.items(), strict=True):
            for order, policy in enumerate(policies):
                runs = [run for run in result["runs"] if run["policy"] == policy]
                # Where policies come to the same, the earlier one still shows around the later.
                width, color = max(1.6, 5 - 1.2 * order), SERIES[order % len(SERIES)]
                points = [run["value"] for run in runs], [run[name]["mean"] for run in runs]
                panel.plot(*points, color=color, linewidth=width, solid_capstyle="round", label=policy)
                marker = {"color": color, "marker": MARKERS[order % len(MARKERS)], "markersize": 9, "linestyle": "none"}
                for figures in (each for each in published if (each.policy, each.figure) == (policy, name)):
                    _marks(panel, figures, marker)
            panel.set(yscale="log", xlabel=result["sweep_field"].replace("_", " "))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_title(title, loc="left", fontsize=11)
            panel.spines.right.set_visible(False)
        handles = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
        set_title(figure, "What becomes of a cache between two questions", result["description"])
        save_figure(plt, figure, path)


def _marks(panel: Any, figures: Published, marker: Mapping[str, Any]) -> None:
    """Published figures: filled where the plan's numbers were fitted to them, hollow where it predicts them."""
    for fitted, label, fill in ((True, "published, fitted to", None), (False, "published", "white")):
        points = [p for p in zip(figures.values, figures.seconds, strict=True) if (p[0] in figures.fitted) == fitted]
        if points:
            style = {**marker, **({"markerfacecolor": fill} if fill else {}), "zorder": 5}
            panel.plot(*zip(*points, strict=True), label=f"{figures.policy}, {label}", **style)


def _swept(result: Mapping[str, Any]) -> list[str]:
    return [result["sweep_field"]] if result["sweep_field"] else []


def _sweep_cells(swept: Sequence[str], run: Mapping[str, Any]) -> list[str]:
    return [f"{run['value']:g}"] if swept else []


def _hits(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items()) or "none kept"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{tokens:g}:{seconds:g}" for tokens, seconds in value)
    return f"{float(value):g}"
