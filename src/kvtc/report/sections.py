"""Results as sections of tables and charts, one function a kind: what the page and the command line
show.

Every part of a result is shown: what no function here knows is listed as plain tables, never
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..evaluate import schema
from . import task_sections, text_sections
from .parts import Result, Section, Table
from .table import format_table


def sections_of(file: schema.ResultFile) -> list[Section]:
    """The sections of one result file; their titles begin with its name."""
    result = dict(file.result)
    kind = result.pop("kind", None)
    found: list[Section] = []
    makers: dict[str, Callable[[Result], Iterator[Section]]] = {
        "bits_per_byte": text_sections.bits_per_byte,
        "qualities": text_sections.qualities,
        "turns": text_sections.turns,
        "scores": task_sections.scores,
        "studies": text_sections.studies,
        "points": task_sections.phases if kind == schema.PHASE_SWEEP else text_sections.recompute,
        "cells": text_sections.domain_shift,
    }
    for name, maker in makers.items():
        known, others = _sorted_out(result.pop(name, None), name, kind)
        if known:
            found += maker({**result, name: known})
        if others:
            found += unknown({name: others})
    for derived in ("fewer_bytes", "within_a_point", "window_tokens"):
        # The first two are made again from what they follow from; a window is in the titles.
        if found:
            result.pop(derived, None)
    rest = list(unknown(result, str(kind or "other figures")))
    if found and rest:
        # What is left beside known parts are settings and the like: they are folded away under the last of them.
        last = found.pop()
        tables = (part for part in rest[0].parts if isinstance(part, Table))
        folded = [replace(table, is_long=True, caption=table.caption or "also recorded") for table in tables]
        rest = [replace(last, parts=[*last.parts, *folded])]
    found += rest
    return [Section(f"{file.name}: {section.title}", section.note, section.parts) for section in found]


def _sorted_out(part: Any, name: str, kind: object) -> tuple[Any, Any]:
    """Of a part of a result: what is as `schema` says, and what can only be listed."""
    if name == "bits_per_byte" and isinstance(part, dict):
        return part, None
    record = schema.record_kind(name, kind)
    if not isinstance(part, list) or (record is None and name != "studies"):
        return None, part
    is_known = schema.is_study if record is None else partial(schema.is_whole, kind=record)
    return [one for one in part if is_known(one)], [one for one in part if not is_known(one)]


def render_text(sections: Sequence[Section]) -> str:
    """The tables of sections, as plain text; charts are for the page."""
    blocks = []
    for section in sections:
        tables = [part for part in section.parts if isinstance(part, Table)]
        if tables:
            texts = [
                (f"{table.caption}\n" if table.caption else "") + format_table(table.header, table.rows, indent="  ")
                for table in tables
            ]
            blocks.append("\n".join([section.title, *texts]))
    return "\n\n".join(blocks)


def unknown(result: Result, title: str = "other figures") -> Iterator[Section]:
    """Whatever a result holds: single figures in one table, lists of records in one each."""
    tables: list[Table] = []
    single = _flat(result)
    if single:
        tables.append(Table(["field", "value"], [[name, _cell(value)] for name, value in single.items()]))
    for name, value in _lists(result):
        columns = list(dict.fromkeys(column for record in value for column in _flat(record)))
        rows = [[_cell(_flat(record).get(column)) for column in columns] for record in value]
        tables.append(Table(columns, rows, name, is_long=len(rows) > 20))
    if tables:
        yield Section(title, "", tables)


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Names and values of a record without its lists of records; nested names are joined by dots."""
    found: dict[str, Any] = {}
    for name, value in record.items() if isinstance(record, Mapping) else [("value", record)]:
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif not _is_records(value):
            found[prefix + str(name)] = value
    return found


def _lists(result: Result, prefix: str = "") -> Iterator[tuple[str, Sequence[Result]]]:
    for name, value in result.items():
        if _is_records(value):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{name}.")


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(record, Mapping) for record in value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)
