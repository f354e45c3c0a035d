"""One self-contained HTML page of results: tables and charts, light and dark, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .schema import ResultFile
from .sections import Chart, Section, Table, sections_of
from .svg import draw, legend

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f27; --muted: #5b6472; --line: #dde1e7; --fine: #eceff3; --ground: #ffffff;
  --panel: #f7f8fa; --low: #b3400a; --heat: 200 70 20;
  --own0: #2f6fb5; --own1: #0b7a75; --own2: #7b2d8b;
  --c0: #b4532a; --c1: #7d7a1f; --c2: #5d6b7c; --c3: #a63d63; --c4: #3b4cc0; --c5: #8a6d3b; --c6: #2f7d4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --muted: #9aa4b2; --line: #353c47; --fine: #262c35;
  --ground: #14171c; --panel: #1b1f26; --low: #ff9b66; --heat: 255 140 80;
  --own0: #74b3f5; --own1: #4fd1c5; --own2: #d79bea;
  --c0: #f2935f; --c1: #d3cf6a; --c2: #aab6c5; --c3: #f08ab5; --c4: #9aa8ff; --c5: #d8b988; --c6: #6fcf97; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--ground);
  max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0 .8rem; max-width: 48rem; }
p.note, nav, footer, figcaption, caption, dl { color: var(--muted); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: .8rem 0; }
dt { color: var(--ink); }
dd { margin: 0; }
nav ol { padding-left: 1.2rem; columns: 2; column-gap: 2rem; } nav a { color: inherit; }
figcaption span { display: inline-block; margin-left: 1.1em; font-weight: 600; }
figure { margin: 1rem 0 1.2rem; } figcaption { margin-bottom: .35rem; }
figcaption b, caption { color: var(--ink); font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; white-space: normal; min-width: 3.5rem; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; padding-left: 0; }
tbody tr:hover td { background: var(--panel); } td.low { color: var(--low); font-weight: 600; }
td.shade { background: rgb(var(--heat) / calc(var(--s) * .55)); }
summary { cursor: pointer; font-size: .9rem; font-weight: 600; margin: .8rem 0 .2rem; }
svg { width: 100%; height: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
svg text { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--muted); }
svg text.own { font-weight: 700; }
svg .grid { stroke: var(--line); } svg .fine { stroke: var(--fine); } svg .hair { stroke-width: .8; opacity: .6; }
footer ul { padding-left: 1.1rem; } code { overflow-wrap: anywhere; }
@media (max-width: 40rem) { nav ol { columns: 1; } }
@media print { details > * { display: block; } body { max-width: none; } }
"""

TERMS = (
    ("body_ratio", "original bytes of the coded tokens over everything they cost"),
    ("total_ratio", "original bytes of all tokens over all bytes stored, exact first and last tokens included"),
    ("window", "the last tokens, kept exactly; 0 where pages are stored"),
    ("KL", "mean divergence of the next-token distributions from those of the exact cache, in nats"),
)


def render_page(title: str, files: Sequence[ResultFile]) -> str:
    """The page of some result files."""
    sections = [section for file in files for section in sections_of(file)]
    contents = "".join(f'<li><a href="#s{n}">{escape(section.title)}</a></li>' for n, section in enumerate(sections))
    terms = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in TERMS)
    stamps = "".join(f"<li><b>{escape(file.name)}</b>: {_stamp(file.provenance)}</li>" for file in files)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n"
        '<p class="note">What caches cost, every stored byte counted against 16 bits a value, and what that does to the model, '
        f"compared with the exact cache in the same run.</p>\n<dl>{terms}</dl>\n<nav><ol>{contents}</ol></nav>\n"
        + "\n".join(_section(n, section) for n, section in enumerate(sections))
        + f"\n<footer><h2>Where the numbers come from</h2><ul>{stamps}</ul></footer>\n</body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    parts = "".join(_figure(part) if isinstance(part, Chart) else _table(part) for part in section.parts)
    return f'<section id="s{number}"><h2>{escape(section.title)}</h2>{note}{parts}</section>'


def _figure(chart: Chart) -> str:
    drawn = draw(chart)
    families = "".join(f'<span style="color:{color}">{escape(name)}</span>' for name, color in legend(chart))
    return f"<figure><figcaption><b>{escape(chart.caption)}</b>{families}</figcaption>{drawn}</figure>" if drawn else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        f"<tr>{''.join(_cell(table, row, column, cell) for column, cell in enumerate(cells))}</tr>"
        for row, cells in enumerate(table.rows)
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption and not table.is_long else ""
    whole = f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if not table.is_long:
        return whole
    summary = table.caption or "All figures"
    return f"<details><summary>{escape(summary)} ({len(table.rows)} row{'s' * (len(table.rows) != 1)})</summary>{whole}</details>"


def _cell(table: Table, row: int, column: int, text: str) -> str:
    shade = (table.shades or {}).get((row, column))
    if shade is not None:
        return f'<td class="shade" style="--s:{shade:.2f}">{escape(text)}</td>'
    return f'<td class="low">{escape(text)}</td>' if (row, column) in table.low else f"<td>{escape(text)}</td>"


def _stamp(provenance: Mapping[str, Any]) -> str:
    return (
        f"{escape(provenance['date'])}, commit {escape(str(provenance['commit']))}, {escape(provenance['machine'])}, "
        f"{provenance['n_threads']} of {provenance['n_cores']} cores, <code>{escape(provenance['command'])}</code>"
    )
