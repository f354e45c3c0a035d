"""One self-contained HTML page of results: tables and charts, light and dark, no script, nothing
fetched.

Foreign text becomes text by `markup`; that nothing runs and nothing is fetched the page also asks
of the browser (`POLICY`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluate.schema import ResultFile
from . import charts
from .markup import Content, Markup, element, join
from .parts import Chart, Section, Table
from .sections import sections_of

LAYOUT = """
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--ground);
  max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--grid); }
p { margin: .4rem 0 .8rem; max-width: 48rem; }
p.note, nav, footer, figcaption, dl { color: var(--muted); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: .8rem 0; }
dt { color: var(--ink); }
dd { margin: 0; }
nav ol { padding-left: 1.2rem; columns: 2; column-gap: 2rem; } nav a { color: inherit; }
figcaption span { display: inline-block; margin-left: 1.1em; font-weight: 600; }
figure { margin: 1rem 0 1.2rem; } figcaption { margin-bottom: .35rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; white-space: normal; min-width: 3.5rem; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; padding-left: 0; }
tbody tr:hover td { background: var(--panel); } td.low { color: var(--low); font-weight: 600; }
td.shade { background: rgb(var(--heat) / calc(var(--s) * .55)); }
summary { cursor: pointer; font-size: .9rem; font-weight: 600; margin: .8rem 0 .2rem; }
svg { width: 100%; min-width: 38rem; height: auto; background: var(--panel); border: 1px solid var(--grid); border-radius: 6px; }
footer ul { padding-left: 1.1rem; } code { overflow-wrap: anywhere; }
@media (max-width: 40rem) { nav ol { columns: 1; } }
@media print { details > * { display: block; } body { max-width: none; } }
"""
PAGE_COLORS = {"ground": ("#ffffff", "#14171c"), "low": ("#b3400a", "#ff9b66"), "heat": ("200 70 20", "255 140 80")}
LIGHT, DARK = (
    "; ".join(f"--{name}: {pair[which]}" for name, pair in {**charts.COLORS, **PAGE_COLORS}.items()) for which in (0, 1)
)
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT}; }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK}; }} }}
{charts.STYLE}{LAYOUT}"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Of all that a page may do: its own style."""

TERMS = (
    ("body_ratio", "original bytes of the coded tokens over everything they cost"),
    ("total_ratio", "original bytes of all tokens over all bytes stored, exact first and last tokens included"),
    ("window", "the last tokens, kept exactly; 0 where pages are stored"),
    ("KL", "mean divergence of the next-token distributions from those of the exact cache, in nats"),
)


def render_page(title: str, files: Sequence[ResultFile]) -> str:
    """The page of some result files."""
    sections = [section for file in files for section in sections_of(file)]
    note = (
        "What caches cost, every stored byte counted against 16 bits a value, and what that does to the model, compared with the "
        "exact cache in the same run."
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("style", Markup(STYLE)),
    )
    body = element(
        "body",
        "\n",
        element("h1", title),
        element("p", note, class_="note"),
        element("dl", *(part for word, meaning in TERMS for part in (element("dt", word), element("dd", meaning)))),
        element("nav", element("ol", *(_entry(number, section) for number, section in enumerate(sections)))),
        *(part for number, section in enumerate(sections) for part in ("\n", _section(number, section))),
        "\n",
        element("footer", element("h2", "Where the numbers come from"), element("ul", *map(_stamp, files))),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en').source}\n"


def _entry(number: int, section: Section) -> Markup:
    return element("li", element("a", section.title, href=f"#s{number}"))


def _section(number: int, section: Section) -> Markup:
    note = [element("p", section.note, class_="note")] if section.note else []
    parts = [_figure(part) if isinstance(part, Chart) else _table(part) for part in section.parts]
    return element("section", element("h2", section.title), *note, *parts, id=f"s{number}")


def _figure(chart: Chart) -> Markup:
    drawn = charts.draw(chart)
    if drawn is None:
        return join()
    families = (element("span", name, class_=color) for name, color in charts.legend(chart))
    # A narrow screen scrolls a chart, as it does a table: shrunk, its words would be too small to read.
    return element("figure", element("figcaption", element("b", chart.caption), *families), _scrolling(drawn))


def _scrolling(content: Markup) -> Markup:
    return element("div", content, class_="wide")


def _table(table: Table) -> Markup:
    head = element("tr", *(element("th", cell) for cell in table.header))
    rows = (
        element("tr", *(_cell(table, row, column, cell) for column, cell in enumerate(cells)))
        for row, cells in enumerate(table.rows)
    )
    wide = _scrolling(element("table", element("thead", head), element("tbody", *rows)))
    if not table.is_long:
        caption = [element("figcaption", element("b", table.caption))] if table.caption else []
        return element("figure", *caption, wide)
    n_rows = f"{len(table.rows)} row{'s' * (len(table.rows) != 1)}"
    return element("details", element("summary", f"{table.caption or 'All figures'} ({n_rows})"), wide)


def _cell(table: Table, row: int, column: int, text: Content) -> Markup:
    shade = (table.shades or {}).get((row, column))
    if shade is not None:
        return element("td", text, class_="shade", style=f"--s:{shade:.2f}")
    return element("td", text, class_="low" if (row, column) in table.low else None)


def _stamp(file: ResultFile) -> Markup:
    def fact(name: str) -> str:
        return str(file.provenance.get(name) or "?")

    cores = f"{fact('n_threads')} of {fact('n_cores')} cores"
    facts = f": {fact('date')}, commit {fact('commit')}, {fact('machine')}, {cores}, "
    return element("li", element("b", file.name), facts, element("code", fact("command")))
