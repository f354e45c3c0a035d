"""Two pictures: what the codec spends its bits on, and what quality costs. They need matplotlib, which the demo extra installs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..calibration import Calibration
from ..codec import Codec
from ..errors import InvalidArgument, MissingDependency
from ..evaluate.quality import Quality
from ..files import SHARED, write_atomically
from ..profiles.paper.rate import allocations_for

BITS_OF_ORIGINAL = 16
INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
SERIES = ("#0f62a8", "#c4501b", "#2a7d4f", "#7a3e9d", "#8a6d00")
MARKERS = ("o", "s", "D", "^", "v")
RATIO_TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def plot_spectrum(calibration: Calibration, codec: Codec, path: str | Path, workload: str = "") -> None:
    """Variance of every coefficient, keys and values side by side, with the bits that `codec` gives each. Writes a PNG.

    Raises `MissingDependency` where matplotlib is not installed, `InvalidArgument` for a codec of another profile than `paper`.
    """
    plt = require_matplotlib()
    if codec.settings.profile != "paper":
        raise InvalidArgument(f"only the profile paper allocates bits to coefficients, not {codec.settings.profile}")
    allocations = allocations_for(codec.rate, codec.calibration, BITS_OF_ORIGINAL)
    kinds = (("Keys", calibration.key, allocations[0]), ("Values", calibration.value, allocations[1]))
    highest = max(float(kind.basis.spectrum[0]) for _, kind, _ in kinds)
    with plt.rc_context(plot_style()):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
        bits_axes = []
        for panel, (title, kind, allocation), color in zip(panels, kinds, SERIES, strict=False):
            rank = kind.basis.rank
            index = range(1, rank + 1)
            # Past the numerical rank the fit finds noise around zero: a logarithmic axis ends before it.
            panel.plot(index, kind.basis.spectrum.clamp_min(highest * 1e-7).tolist(), color=color, linewidth=2)
            panel.set(yscale="log", xlabel="Coefficient, by falling variance", xlim=(0, rank + 1))
            panel.set_ylim(highest * 1e-6, highest * 3)
            heights = allocation.bits_per_coefficient(rank)
            stored = int((heights > 0).sum())
            panel.set_title(f"{title}: {stored} of {rank} coefficients stored", loc="left", fontsize=11, color=INK)
            bits = panel.twinx()
            edges = [i + 0.5 for i in range(rank + 1)]
            bits.stairs(heights, edges, fill=True, color=INK, alpha=0.12)
            bits.stairs(heights, edges, color=INK, linewidth=1)
            bits.grid(False)
            bits_axes.append(bits)
        panels[0].set_ylabel("Variance (squared cache units)")
        top = max(float(allocation.bits_per_coefficient(kind.basis.rank).max()) for _, kind, allocation in kinds)
        for bits in bits_axes:
            bits.set_ylim(0, max(8.0, top) * 1.2)
        bits_axes[0].tick_params(labelright=False)
        bits_axes[-1].set_ylabel("Bits per coefficient, side information included")
        handles = [
            plt.Line2D([], [], color=SERIES[0], linewidth=2, label="variance of keys"),
            plt.Line2D([], [], color=SERIES[1], linewidth=2, label="variance of values"),
            plt.Rectangle((0, 0), 1, 1, facecolor=INK, alpha=0.25, label="bits (right axis)"),
        ]
        panels[1].legend(handles=handles, loc="upper right", frameon=False)
        rate = ", ".join(f"{field.name} {getattr(codec.rate, field.name):g}" for field in fields(codec.rate))
        set_title(figure, f"Few coefficients carry the cache, and only they get bits ({rate})", workload)
        save_figure(plt, figure, path)


def plot_rate_quality(
    points: Sequence[Quality] | Mapping[str, Sequence[Quality]], path: str | Path, workload: str = ""
) -> None:
    """Mean KL (log) against body_ratio (log2), a line for each series, points of the first labelled with their codec. Writes a PNG.

    points: results of one series, or several by name. workload: model, text and lengths, for the title.
    Raises `MissingDependency` where matplotlib is not installed, `InvalidArgument` where there is no point to draw.
    """
    series = points if isinstance(points, Mapping) else {"": points}
    drawn = {name: sorted(_position(quality) for quality in line) for name, line in series.items() if line}
    if not drawn:
        raise InvalidArgument("there are no points to draw")
    plt = require_matplotlib()
    with plt.rc_context(plot_style()):
        figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
        for order, (name, line) in enumerate(drawn.items()):
            style = {"color": SERIES[order % len(SERIES)], "marker": MARKERS[order % len(MARKERS)]}
            axes.plot(
                [x for x, _, _ in line], [y for _, y, _ in line], label=name, linewidth=1.8, markersize=6, **style
            )
            for x, y, label in line:
                if order:
                    # The axis says as much of the other series; labels of close points would lie on each other.
                    break
                axes.annotate(
                    label, (x, y), (-7, 6), textcoords="offset points", ha="right", fontsize=9, color=style["color"]
                )
        xs = [x for line in drawn.values() for x, _, _ in line]
        ys = [y for line in drawn.values() for _, y, _ in line]
        ticks = [tick for tick in RATIO_TICKS if min(xs) / 2 <= tick <= max(xs) * 2]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
        axes.set_xlim(min(xs) / 1.5, max(xs) * 1.3)
        axes.set_yscale("log")
        axes.set_ylim(min(ys) / 2.5, max(ys) * 3)
        axes.spines.right.set_visible(False)
        axes.set_xlabel("body_ratio: original bytes of the coded tokens over all that they cost")
        axes.set_ylabel("Mean KL(exact || restored), nats per token")
        if len(drawn) > 1:
            axes.legend(loc="upper left", frameon=False)
        set_title(figure, "What quality costs: lower is better, further right is smaller", workload)
        save_figure(plt, figure, path)


def _position(quality: Quality) -> tuple[float, float, str]:
    # Codecs that change nothing have a KL of zero, which a logarithmic axis cannot show.
    return quality.body_ratio or 1.0, max(quality.kl, 1e-8), quality.name


def set_title(figure: Any, title: str, workload: str) -> None:
    """A headline and, below it, what was measured or computed on."""
    figure.suptitle(
        title + (f"\n{workload}" if workload else ""), x=0.01, ha="left", fontsize=12, color=INK, linespacing=1.5
    )


def plot_style() -> dict[str, Any]:
    """Settings of matplotlib that all pictures share."""
    return {
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.grid": True,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "figure.facecolor": "white",
    }


def require_matplotlib() -> Any:
    """matplotlib.pyplot, drawing to files; `MissingDependency` if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency('plots need matplotlib; pip install "kvtc[demo]"') from error
    # Files only: no display is asked for, whatever the machine is configured to use.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(plt: Any, figure: Any, path: str | Path) -> None:
    """Write the figure as PNG, making its directory, and let go of it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    plt.close(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, drawn.getvalue(), SHARED)
