"""Foreign text on a terminal and in a log: it says what it says and does nothing."""

from __future__ import annotations

import logging
import pickle

import pytest

from kvtc import errors
from kvtc.display import shown, shown_lines, without_credentials
from kvtc.errors import KvtcError, StoreUnavailable
from kvtc.process.progress import note, reporting, task
from kvtc.report.table import format_fields, format_table

HOSTILE = "a\x1b[31mb\rc\nd\x07\u202ee\x9bf\udcff"
VISIBLE = "a\\x1b[31mb\\rc\\nd\\x07\\u202ee\\x9bf\\udcff"


def test_what_steers_a_terminal_is_written_out():
    assert shown(HOSTILE) == VISIBLE
    assert shown("größer ≥ 漢字 🙂") == "größer ≥ 漢字 🙂"
    assert shown_lines("a\n\tb\x1bc\r\n") == "a\n\tb\\x1bc\\r\n"


def test_tables_and_fields_show_no_foreign_text_raw():
    table = format_table(["x", HOSTILE], [[HOSTILE, 1]])
    assert table.splitlines()[0].split() == ["x", VISIBLE]
    assert len(table.splitlines()) == 3
    fields = format_fields([("name", HOSTILE), (HOSTILE, 2)])
    assert fields.splitlines()[0].endswith(VISIBLE)
    assert len(fields.splitlines()) == 2
    assert table.isascii()
    assert table.replace("\n", "").isprintable()
    assert fields.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KvtcError)]
)
def test_every_error_shows_what_it_quotes_as_text(kind, caplog):
    error = kind("cannot read \x1b[2J\u202e of redis://user:se@cret@host:1/0?x=1")
    wanted = "cannot read \\x1b[2J\\u202e of redis://host:1/0?x=1"
    assert str(error) == wanted
    assert str(pickle.loads(pickle.dumps(error))) == wanted  # noqa: S301  our own bytes
    with caplog.at_level(logging.WARNING):
        logging.getLogger("kvtc").warning("not stored: %s", error)
    assert wanted in caplog.text


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("s3://key:secret@bucket/a/b", "s3://bucket/a/b"),
        ("redis://:p%40ss@h:6379/0", "redis://h:6379/0"),
        ("https://h/users/a@b", "https://h/users/a@b"),
        ("a://u:p@h b://v:q@i", "a://h b://i"),
        ("mail a@b.c", "mail a@b.c"),
    ],
)
def test_passwords_of_addresses_are_cut(address, wanted):
    assert without_credentials(address) == wanted
    assert str(StoreUnavailable(f"{address} does not answer")) == f"{wanted} does not answer"


def test_progress_shows_names_as_text(capsys):
    with reporting(), task(HOSTILE):
        note(HOSTILE)
    assert capsys.readouterr().err == f"{VISIBLE}\n{VISIBLE}\n"
