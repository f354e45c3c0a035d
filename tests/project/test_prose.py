"""The pages say what is there: paths, modules, commands and words of the code; and their lines are short."""

from __future__ import annotations

import re
from argparse import PARSER
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kvtc"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_LINE = 100
FOLDERS = sorted(
    path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "demo_output"))
)
ROOTS = (ROOT, PACKAGE, PACKAGE / "engines", PACKAGE / "evaluate")
"""Where a path in prose may begin."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_fences(text: str) -> str:
    """The text with the lines of code blocks left empty, so that line numbers stay."""
    return re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(params=PAGES, ids=name_of)
def page(request) -> Path:
    return request.param


def anchors(path: Path) -> set[str]:
    """The names of a page's headings in links."""
    headings = re.findall(r"^#+ (.+)$", without_fences(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_lines_of_prose_are_short(page):
    lines = without_fences(page.read_text(encoding="utf-8")).splitlines()
    # Tables, indented commands and single links cannot be wrapped.
    long = [n for n, line in enumerate(lines, 1) if len(line) > LONGEST_LINE and not re.match(r" *\||    |\S+$", line)]
    assert long == []


def test_tables_are_tables(page):
    """Every row has as many cells as the head, and no row was wrapped into the text."""
    text = re.sub(r"`[^`\n]*`", "", without_fences(page.read_text(encoding="utf-8")))
    wrong, n_cells = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        is_row = re.fullmatch(r" *\|.*\|", line) is not None
        n_cells = (n_cells or line.count("|")) if is_row else 0
        if line.count("|") != n_cells and (is_row or (" | " in line and not line.startswith("    "))):
            wrong.append(number)
    assert wrong == []


def test_links_lead_somewhere(page):
    text = without_fences(page.read_text(encoding="utf-8"))
    wrong = []
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            wrong.append(target)
    assert wrong == []


def test_paths_in_prose_are_there(page):
    """In backticks: `docs/stores.md`, `coding/rope.py`, `container/`. Files that a reader makes have no folder in front."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*/(?:[\w.-]+\.\w+)?)`", text))
    named |= set(re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|sh|md|json|toml))", text))
    relative = (*ROOTS, page.parent)
    assert sorted(path for path in named if not any((root / path).exists() for root in relative)) == []


def test_modules_in_prose_are_there(page):
    """`kvtc.engines.vllm.tier`, `python -m kvtc.evaluate.harness`: a package or a module, or a name in it."""
    wrong = []
    for dotted in set(re.findall(r"\bkvtc((?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        first, *rest = dotted[1:].split(".")
        if not rest or not (PACKAGE / first).is_dir():
            continue  # names of the package, and the options of engines
        path = PACKAGE / first
        while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").is_file()):
            path = path / rest.pop(0)
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if rest and not re.search(rf"\b{rest[0]}\b", source.read_text(encoding="utf-8")):
            wrong.append(f"kvtc{dotted}")
    assert wrong == []


def test_commands_in_prose_parse(page):
    """Options of `kvtc <subcommand>`, and targets of `make`."""
    from kvtc.cli import _parser

    def subcommands(parser):
        """The parsers of its subcommands by name."""
        return next((action.choices for action in parser._actions if action.nargs == PARSER), {})

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join([*blocks, *re.findall(r"^    (.+)$", text, flags=re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)])
    for subcommand, options in re.findall(r"(?:^|&& )kvtc ([a-z]+)([^&|\n]*)", code, flags=re.MULTILINE):
        parser, words = subcommands(_parser())[subcommand], options.split()
        if inner := subcommands(parser) if words else {}:
            parser = inner[words[0]]
        known = parser._option_string_actions
        assert [option for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", options) if option not in known] == []
    for target in re.findall(r"^make ([\w-]+)", code, flags=re.MULTILINE):
        assert target in targets, target


def test_the_table_of_words_names_what_the_code_has():
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Words\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", section, flags=re.MULTILINE)
    words = [word.strip() for cells in rows for word in cells[0].split(",") if not cells[0].startswith(("word", "-"))]
    assert len(words) == len(set(words)) > 50
    code = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))))
    names = {name for *_, cell in rows for name in re.findall(r"`([^`]+)`", cell)}
    paths = {name for name in names if "/" in name or name.endswith(".py")}
    assert sorted(path for path in paths if not (PACKAGE / path).exists()) == []
    assert sorted(name for name in names - paths if name.split(".")[-1] not in code) == []


def test_every_word_of_the_first_table_is_explained_above_it():
    before, table = (ROOT / "README.md").read_text(encoding="utf-8").split("\n| | body_ratio", 1)
    header, _, *rows = ("body_ratio" + table.split("\n\n")[0]).splitlines()
    labels = [row.strip("| ").split(" |")[0] for row in rows]
    words = [cell.strip().removesuffix(", nats") for cell in header.split("|") if cell.strip()]
    words += ["exact cache" if label == "exact cache" else label.split()[0] for label in labels]
    explained = set(re.findall(r"\*\*`?([^*`]+)`?\*\*", before))
    assert set(words) - explained == set()
    # The second words: ratios from 8x to 128x, bits and shares.
    assert {"`8x`", "`128x`", "2 bits", "3 bits", "quarter"} <= set(
        re.findall(r"`8x`|`128x`|[23] bits|quarter", before)
    )
