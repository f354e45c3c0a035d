"""The programs of benchmarks/: each says how it is called, and the commands of the documentation name those that there are."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python -m (benchmarks[\w.]*)")
PROGRAMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program_says_how_it_is_called(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    for imported in (name, f"{name}.__main__"):
        monkeypatch.delitem(sys.modules, imported, raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert f"python -m {name}" in capsys.readouterr().out


def test_the_documentation_names_every_program_and_no_other():
    texts = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for path in texts for name in COMMAND.findall(path.read_text(encoding="utf-8"))}
    assert named == PROGRAMS
