"""The measurement file: every number that a plan computes with, and where it comes from.

    {"description": "...",
     "sources": {"here": {"kind": "measured", "date": "...", "machine": "...", "command": "..."},
                 "paper": {"kind": "quoted", "publication": "..."},
                 "fit": {"kind": "fitted", "publication": "..."}},
     "numbers": {"engine.decode_step_seconds": {"value": 0.005, "source": "fit", "note": "how it was found"}, ...}}

`measured` here, `quoted` from a publication as it stands there, or `fitted`: computed so that the
simulation meets published figures; a fitted number says in its note which. NAMES lists what there
is, with units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InvalidPlan, MissingMeasurement
from .fields import REQUIRED, Fields, check_number, read_json, read_object

# <codec> and <tier> stand for names that a plan gives.
NAMES = {
    "engine.request_seconds": "seconds that every request spends outside of the engine: network, tokenizer, scheduler",
    "engine.prefill_seconds": "points [tokens, seconds], rising: time to prefill a prompt of so many tokens, none of them cached",
    "engine.decode_step_seconds": "seconds of one decode step, whatever is in the batch",
    "engine.decode_seconds_per_context_token": "seconds that one token of context of one running request adds to a decode step",
    "codec.<codec>.encode_bytes_per_second": "bytes of original cache that one engine encodes a second",
    "codec.<codec>.decode_bytes_per_second": "bytes of original cache that one engine decodes a second",
    "codec.<codec>.body_ratio": "original bytes of the coded tokens over all that they cost",
    "tier.<tier>.read_bytes_per_second": "bytes a second from the tier to the GPU",
    "tier.<tier>.write_bytes_per_second": "bytes a second from the GPU to the tier",
    "tier.<tier>.access_seconds": "seconds before the first byte of a read or a write",
    "price.gpu_hour": "money for one GPU for one hour",
    "price.<tier>.gib_month": "money for one GiB of a tier for 30 days",
}
SOURCES = {"measured": ("date", "machine", "command"), "quoted": ("publication",), "fitted": ("publication",)}


@dataclass(frozen=True)
class Measurement:
    """One number, or a list of points. source: one of the file's sources, by name."""

    name: str
    value: Any
    source: str
    note: str


@dataclass(frozen=True)
class Source:
    """kind: measured, quoted or fitted. text: publication, or date, machine and command."""

    name: str
    kind: str
    text: str


class Measurements:
    """A checked measurement file. `used` holds the numbers that were asked for; the report lists
    them with their sources.
    """

    def __init__(self, numbers: Mapping[str, Measurement], sources: Mapping[str, Source], where: str) -> None:
        self.numbers, self.sources, self.where = numbers, sources, where
        self.used: dict[str, Measurement] = {}

    def number(self, name: str) -> float:
        """The number of a name; `MissingMeasurement` where the file has none."""
        return float(self._find(name).value)

    def points(self, name: str) -> list[tuple[float, float]]:
        """The points of a name."""
        return list(self._find(name).value)

    def optional(self, name: str) -> float | None:
        """A number that a plan can do without, such as a price."""
        return self.number(name) if name in self.numbers else None

    def _find(self, name: str) -> Measurement:
        if name not in self.numbers:
            raise MissingMeasurement(
                f"{self.where} has no number {name} ({NAMES[_pattern(name)]}); measure it or quote it"
            )
        self.used[name] = self.numbers[name]
        return self.numbers[name]


def load_measurements(path: Path) -> Measurements:
    """Read and check a measurement file.

    Raises:
        InvalidPlan: if a number has an unknown name, no source or an impossible value.
        OSError: if the file cannot be read.
    """
    return read_measurements(read_json(path), str(path))


def read_measurements(content: Any, where: str) -> Measurements:
    """A measurement file as read from JSON."""
    return read_object(content, where, _measurements)


def _measurements(fields: Fields) -> Measurements:
    fields.text("description")
    sources = fields.named("sources", _source)
    return Measurements(fields.named("numbers", partial(_number, sources)), sources, fields.where)


def _number(sources: Mapping[str, Source], name: str, entry: Fields) -> Measurement:
    if _pattern(name) not in NAMES:
        raise InvalidPlan(f"{entry.where}: no number is called {name}; known are {', '.join(NAMES)}")
    source = entry.choice("source", sources)
    note = entry.text("note", REQUIRED if sources[source].kind == "fitted" else "")
    return Measurement(name, _value(entry, name), source, note)


def _source(name: str, fields: Fields) -> Source:
    kind = fields.choice("kind", SOURCES)
    return Source(name, kind, ", ".join(fields.text(field) for field in SOURCES[kind]))


def _value(entry: Fields, name: str) -> Any:
    where = f"{entry.where}.value"
    if name == "engine.prefill_seconds":
        return _points(entry.items("value"), where)
    value = entry.get("value")
    if name.endswith("_ratio"):
        return check_number(value, where, above=1, inclusive=True)
    return check_number(value, where, inclusive=not name.endswith("per_second"))


def _points(points: list[Any], where: str) -> list[tuple[float, float]]:
    checked: list[tuple[float, float]] = []
    for index, point in enumerate(points):
        if not isinstance(point, list) or len(point) != 2:
            raise InvalidPlan(f"{where}[{index}]: expected [tokens, seconds], found {point!r}")
        tokens, seconds = (check_number(number, f"{where}[{index}]") for number in point)
        if checked and not (tokens > checked[-1][0] and seconds > checked[-1][1]):
            raise InvalidPlan(f"{where}[{index}]: tokens and seconds must both rise from point to point")
        checked.append((tokens, seconds))
    if not checked:
        raise InvalidPlan(f"{where}: expected at least one point")
    return checked


def _pattern(name: str) -> str:
    """codec.paper.body_ratio -> codec.<codec>.body_ratio."""
    parts = name.split(".")
    if len(parts) == 3:
        parts[1] = {"codec": "<codec>", "tier": "<tier>", "price": "<tier>"}.get(parts[0], parts[1])
    return ".".join(parts)
