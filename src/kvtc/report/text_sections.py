"""Sections of what is measured on text: rate and distortion, multi-turn use, ablations, domain
shift, recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

from ..container.tables import PROFILES
from ..evaluate.derived import FewerBytes, fewer_bytes
from ..evaluate.method_names import split_name
from ..evaluate.quality import Quality
from .parts import Chart, Result, Section, Table, by_series, grouped, percent, ratio

BODY, TOTAL = "body_ratio", "total_ratio"
FACTORS = ("body_factor", "total_factor")
PAPER = "paper"
Columns = dict[str, Callable[[Result], str]]
QUALITY: Columns = {
    "method": lambda record: record["name"],
    BODY: lambda record: ratio(record.get(BODY)),
    TOTAL: lambda record: ratio(record[TOTAL]),
    "KL, nats": lambda record: f"{record['kl']:.5f}",
    "top-1, %": lambda record: percent(record["top1_agreement"]),
    "perplexity": lambda record: f"{record['perplexity']:.2f}",
    "exact cache's": lambda record: f"{record['perplexity_exact']:.2f}",
}
TURNS: Columns = {
    "KL coded once": lambda record: f"{record['kl_once']:.5f}",
    "KL first turn": lambda record: f"{record['kl_by_turn'][0]:.5f}",
    "KL last turn": lambda record: f"{record['kl_by_turn'][-1]:.5f}",
}
RECOMPUTE: Columns = {
    "method": lambda point: point["name"],
    "tokens": lambda point: f"{point['n_tokens']:,}",
    "prefill, s": lambda point: f"{point['prefill_seconds']:.3g}",
    "encode, s": lambda point: "" if point.get("encode_seconds") is None else f"{point['encode_seconds']:.3g}",
    "decode, s": lambda point: f"{point['decode_seconds']:.3g}",
    "prefill over decode": lambda point: f"{point['prefill_seconds'] / point['decode_seconds']:.1f}x",
    TOTAL: lambda point: ratio(point["original_bytes"] / point["total_bytes"]),
}


def bits_per_byte(result: Result) -> Iterator[Section]:
    """The model itself, on text."""
    rows = [[domain, f"{bits:.3f}"] for domain, bits in result["bits_per_byte"].items()]
    yield Section(
        "the model on text", "Bits per byte of held-out text, nothing coded.", [Table(["text", "bits per byte"], rows)]
    )


def qualities(result: Result) -> Iterator[Section]:
    """Rate and distortion, a section a window."""
    groups = grouped(result["qualities"], lambda record: record.get("window_tokens", result.get("window_tokens")))
    for window, records in groups.items():
        ordered = sorted(records, key=lambda record: record[TOTAL])
        parts: list[Table | Chart] = [rate_distortion(records, field) for field in (BODY, TOTAL)]
        parts += _fewer(fewer_bytes({0: [_quality(record) for record in records]}))
        parts.append(quality_table(ordered, is_long=len(ordered) > 12))
        first = records[0]
        note = (
            f"Texts: {first.get('n_documents', '?')}; predictions: {first.get('n_continuation', '?')}. Lower is better, "
            "further right is smaller; a method that changes nothing has no place on a logarithmic axis."
        )
        yield Section(f"rate and distortion{_window(window)}", note, parts)


def quality_table(records: Sequence[Result], is_long: bool = False) -> Table:
    """One row a record."""
    return _table(records, QUALITY, is_long=is_long)


def turns(result: Result) -> Iterator[Section]:
    """Multi-turn use: a section a turn length, with the KL of turn after turn."""
    groups = grouped(result["turns"], lambda record: (record["turn_tokens"], record.get("window_tokens")))
    for (turn_tokens, window), records in groups.items():
        first = records[0]
        lines = {
            record["name"]: [
                (float(turn), kl, f"turn {turn}: KL {kl:.5f}") for turn, kl in enumerate(record["kl_by_turn"], start=1)
            ]
            for record in _spread(records)
        }
        chart = Chart("KL by turn", lines, "turn", "KL, nats", x_log=False, x_times=False)
        note = (
            f"The whole cache is coded again after every {turn_tokens} tokens, {first['n_codings']} times in all: the worst case, "
            "for a method could also code a token once and keep its bytes. Coded once: the same predictions where only the "
            f"prefix was coded, once. The window of {window} tokens grows to {window + turn_tokens} between two codings."
        )
        yield Section(
            f"multi-turn use, every {turn_tokens} tokens{_window(window)}",
            note,
            [chart, _table(records, QUALITY | TURNS)],
        )


def studies(result: Result) -> Iterator[Section]:
    """Ablations: a section each."""
    for study in result["studies"]:
        records = study["qualities"]
        parts: list[Table | Chart] = [rate_distortion(records, BODY)] if len(records) > 2 else []
        yield Section(study["title"], study.get("note", ""), [*parts, quality_table(records)])


def domain_shift(result: Result) -> Iterator[Section]:
    """A matrix a method: calibrated on (row), measured on (column)."""
    for name, cells in grouped(result["cells"], lambda cell: cell["name"]).items():
        texts = list(dict.fromkeys(cell["text"] for cell in cells))
        sources = list(dict.fromkeys(cell["calibrated_on"] for cell in cells))
        found = {(cell["calibrated_on"], cell["text"]): cell for cell in cells}
        parts = []
        for title in ("KL, nats", BODY):
            shown = {place: QUALITY[title](cell) for place, cell in found.items()}
            rows = [[source, *(shown.get((source, text), "") for text in texts)] for source in sources]
            shades = _shades(found, sources, texts) if title != BODY else None
            parts.append(Table(["calibrated on", *texts], rows, f"{title}, by the text measured on", shades=shades))
        yield Section(f"domain shift, {name}", "Darker is worse than the best calibration for that text.", parts)


def recompute(result: Result) -> Iterator[Section]:
    """Seconds to have a cache back: computed again or decoded."""
    points = result["points"]
    by_name = grouped(points, lambda point: point["name"])
    prefills = {float(point["n_tokens"]): point["prefill_seconds"] for point in reversed(points)}
    lines = {
        "prefill": [
            (n, seconds, f"prefill of {n:,.0f} tokens: {seconds:.3g} s") for n, seconds in sorted(prefills.items())
        ]
    }
    for name, of_name in by_name.items():
        lines[f"decode {name}" if len(by_name) > 1 else "decode"] = [
            (float(n), seconds, f"decoding {n:,} tokens: {seconds:.3g} s")
            for n, seconds in ((point["n_tokens"], point["decode_seconds"]) for point in of_name)
        ]
    chart = Chart("Seconds until the cache is there", lines, "tokens", "seconds", x_times=False)
    yield Section("computing again or decoding", "", [chart, _table(points, RECOMPUTE)])


def rate_distortion(records: Sequence[Result], field: str) -> Chart:
    """The KL of records against a ratio, a line a series; records that lose nothing, or have no
    such ratio, are left out.
    """
    points = []
    for record in records:
        if record.get(field) and record["kl"] > 0:
            label = f"{record['name']}: {record[field]:.1f}x, KL {record['kl']:.5f}"
            points.append((record["name"], (float(record[field]), float(record["kl"]), label)))
    return Chart(f"KL against {field}", by_series(points), field, "KL, nats")


def _table(records: Sequence[Result], columns: Columns, *, is_long: bool = False) -> Table:
    rows = [[show(record) for show in columns.values()] for record in records]
    return Table(list(columns), rows, is_long=is_long)


def _quality(record: Result) -> Quality:
    """A record as a `Quality`; a number that it does not hold is zero, and what it knows of no text is
    empty.
    """
    of_texts = ("kl_by_text", "body_bytes_by_text")
    values = {field.name: record.get(field.name, 0) for field in fields(Quality) if field.name not in of_texts}
    values |= {name: list(record.get(name) or []) for name in of_texts}
    return Quality(**values)


def _fewer(figures: Sequence[FewerBytes]) -> list[Table]:
    """Two tables: at the KL of each point of `paper`, and of the baselines. A pair of columns a
    series: body, all bytes.
    """
    found = {(figure.at, figure.series): figure for figure in figures}
    points = dict.fromkeys((figure.at, figure.kl) for figure in figures)
    groups = {
        f"the profile {PAPER}": [(at, kl) for at, kl in points if split_name(at)[0] == PAPER],
        "the others": [(at, kl) for at, kl in points if split_name(at)[0] not in PROFILES],
    }
    tables = []
    for whose, chosen in groups.items():
        series = [name for name in PROFILES if any((at, name) in found for at, _ in chosen)]
        header = [f"{name}, {what}" for name in series for what in ("body", "total")]
        rows = [
            [at, f"{kl:.5f}", *(_factor(found.get((at, name)), field) for name in series for field in FACTORS)]
            for at, kl in chosen
        ]
        if rows:
            caption = f"Times fewer bytes at the KL of each point of {whose} (95 % interval over texts)"
            tables.append(Table(["at the KL of", "KL, nats", *header], rows, caption, is_long=len(rows) > 12))
    return tables


def _factor(figure: FewerBytes | None, field: str) -> str:
    if figure is None:
        return ""
    value = getattr(figure, field)
    if value is None:
        return "not reached"
    if field == "body_factor" and figure.body_low is not None and figure.body_high is not None:
        return f"{value:.1f}x ({figure.body_low:.1f} to {figure.body_high:.1f})"
    return f"{'≥ ' if figure.is_bound else ''}{value:.1f}x"


def _window(window: int | None) -> str:
    return "" if window is None else f", window {window}"


def _spread(records: Sequence[Result]) -> list[Result]:
    """Of every series the middle setting: curves over turns differ little between neighbouring
    settings.
    """
    series = grouped(records, lambda record: split_name(record["name"])[0])
    return [of_one[len(of_one) // 2] for of_one in series.values()]


def _shades(
    found: Mapping[tuple[str, str], Result], sources: Sequence[str], texts: Sequence[str]
) -> dict[tuple[int, int], float]:
    """How far a cell's KL lies above the least of its column: full at four times."""
    shades = {}
    for column, text in enumerate(texts, start=1):
        least = min(found[source, text]["kl"] for source in sources if (source, text) in found)
        for row, source in enumerate(sources):
            if (source, text) in found and least > 0:
                shades[row, column] = min(1.0, (found[source, text]["kl"] / least - 1) / 3)
    return shades
