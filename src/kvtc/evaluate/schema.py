"""The one form that results have, whichever program measured them: `save_result` writes it,
`kvtc report` shows it.

A result file is JSON:

    {"schema": 1, "provenance": {...}, "result": {"kind": "...", ...}}

`kind` says what was measured; the page shows those named here in their own way, any other as plain
tables. What a kind holds:

    evaluation     model, n_layers, cache_dtype; any of
                   qualities: [QualityRecord], scores: [ScoreRecord], turns: [TurnRecord], bits_per_byte: {domain: figure},
                   not_reached: [{"name", "window_tokens", "why"}], ratios that a profile cannot reach,
                   and figures derived from them: fewer_bytes, within_a_point (`derived`)
    ablations      studies: [{"title", "note", "qualities": [Quality]}]
    phase_sweep    points: [PhasePoint]
    domain_shift   cells: [ShiftCell]
    recompute      points: [RecomputePoint]

A method is named "<series> <setting>": the setting is the last word if it holds a digit ("paper
16x", "KIVI 2-bit", "H2O 1/8"), so that `split_name` finds which points lie on one curve. Ratios are
original bytes over stored bytes, the original at 16 bits a value; KL is in nats, shares lie in 0 ..
1, times are in seconds, None (null) stands for what there is not. Fields may be added to a record
without a new version; a field that changes its meaning is one.

`read_result` checks what it reads: numbers are finite, and the fields of records named here have
the type and the range they are given here. Records that lack what tables and charts are computed
from are listed as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import InvalidArgument
from ..strict_json import MAX_MAGNITUDE, MIN_MAGNITUDE, loads
from .multi_turn import MultiTurn
from .provenance import SCHEMA_VERSION, Provenance
from .quality import Quality
from .scoring import N_DEPTHS, TaskScore

EVALUATION = "evaluation"
ABLATIONS = "ablations"
PHASE_SWEEP = "phase_sweep"
DOMAIN_SHIFT = "domain_shift"
RECOMPUTE = "recompute"


@dataclass(frozen=True, kw_only=True)
class QualityRecord(Quality):
    """`Quality` of a method in a sweep; `window_tokens` are the last tokens that methods with a
    window keep exactly.
    """

    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class ScoreRecord(TaskScore):
    """`TaskScore` in a sweep. window_tokens as in `QualityRecord`."""

    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class TurnRecord(MultiTurn):
    """`MultiTurn` of a method in a sweep.

    `window_tokens` are the last tokens that are kept exactly after coding; then the window grows by
    a turn.
    """

    window_tokens: int


@dataclass(frozen=True)
class PhasePoint:
    """Look-ups whose answers lie at one place of the grid of chunks.

    Parameters:
        name: the name of the method, or "exact cache".
        phase: tokens by which the context is shifted against the grid.
        depth: where in the context the answers lie, 0 .. 1; None: everywhere.
        exact: share of answers that are right, 0 .. 1.
        kl: as in `TaskScore`.
    """

    name: str
    phase: int
    depth: float | None
    n_questions: int
    exact: float
    kl: float | None
    body_ratio: float | None
    total_ratio: float | None


@dataclass(frozen=True)
class ShiftCell:
    """A method calibrated on one domain, measured on another. The other fields are as in `Quality`."""

    name: str
    calibrated_on: str
    text: str
    kl: float
    top1_agreement: float
    perplexity: float
    perplexity_exact: float
    body_ratio: float | None
    total_ratio: float


@dataclass(frozen=True)
class RecomputePoint:
    """What it costs to have the cache of `n_tokens` tokens again: computed again, or decoded.

    `original_bytes` and `total_bytes` are those of the cache and of its stream.
    """

    name: str
    n_tokens: int
    prefill_seconds: float
    encode_seconds: float | None
    decode_seconds: float
    original_bytes: int
    total_bytes: int


_COMPUTED_FROM = {
    QualityRecord: ("name", "total_ratio", "kl", "top1_agreement", "perplexity", "perplexity_exact"),
    TurnRecord: (
        "name", "turn_tokens", "n_codings", "window_tokens", "kl", "kl_once", "kl_by_turn", "top1_agreement", "perplexity",
        "perplexity_exact", "total_ratio",
    ),
    ScoreRecord: ("task", "codec", "context", "exact", "tokens"),
    PhasePoint: ("name", "n_questions", "exact"),
    RecomputePoint: ("name", "n_tokens", "prefill_seconds", "decode_seconds", "original_bytes", "total_bytes"),
    ShiftCell: ("name", "calibrated_on", "text", "kl"),
}  # fmt: skip
_CHANGES = ("change_low", "change_high")
_SHARES = ("top1_agreement", "exact", "tokens", "same", "depth", "by_depth")
_ABOVE_ZERO = ("perplexity", "perplexity_exact", "context", "turn_tokens")
_LENGTHS = {"by_depth": range(N_DEPTHS, N_DEPTHS + 1), "kl_by_turn": range(1, 1_000_000)}
_LEAST_KL = -1e-3
"""A mean over float32 may come out a little below 0."""


@dataclass(frozen=True)
class _WholeResult:
    """Fields of a result that stand beside its records."""

    window_tokens: int | None
    bits_per_byte: dict[str, float] | None


@dataclass(frozen=True)
class ResultFile:
    """A result file, read and checked.

    Parameters:
        name: of the file, without its suffix.
        provenance: date, commit, machine and command of the measurement.
        result: what was measured.

    Example:
        >>> from kvtc.evaluate.schema import ResultFile
        >>> ResultFile("figures", {}, {"kind": "recompute", "points": []}).kind
        'recompute'
    """

    name: str
    provenance: dict[str, Any]
    result: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """What was measured; None where the file does not say."""
        kind = self.result.get("kind")
        return kind if isinstance(kind, str) else None


def record_kind(part: str, kind: object) -> type | None:
    """What the records of a part of a result are, for a result of some kind; None where nobody
    knows.
    """
    if part == "points":
        return {PHASE_SWEEP: PhasePoint, RECOMPUTE: RecomputePoint}.get(str(kind))
    if part == "cells":
        return ShiftCell if kind == DOMAIN_SHIFT else None
    return {"qualities": QualityRecord, "turns": TurnRecord, "scores": ScoreRecord}.get(part)


def is_whole(record: object, kind: type) -> bool:
    """Whether a record holds all that tables and charts are computed from."""
    return isinstance(record, Mapping) and all(_is_there(record.get(name)) for name in _COMPUTED_FROM[kind])


def _is_there(value: object) -> bool:
    return value is not None and not (isinstance(value, list) and None in value)


def is_study(study: object) -> bool:
    """The same of one of `studies`."""
    if not isinstance(study, Mapping) or not isinstance(study.get("qualities"), list):
        return False
    are_texts = isinstance(study.get("title"), str) and isinstance(study.get("note", ""), str)
    return are_texts and all(is_whole(record, QualityRecord) for record in study["qualities"])


def read_result(path: Path) -> ResultFile:
    """Read and check a result file.

    Parameters:
        path: the file, as `kvtc evaluate` or `kvtc.evaluate.provenance.save_result` writes it.

    Returns:
        What it holds.

    Raises:
        InvalidArgument: it is not a result file, has impossible values or is of a later schema.
        OSError: it cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.evaluate.provenance import save_result
        >>> from kvtc.evaluate.schema import read_result
        >>> path = save_result("figures", {"kind": "recompute", "points": []}, Path.cwd())
        >>> read_result(path).result["points"]
        []
    """
    try:
        found = loads(path.read_bytes())
    except ValueError as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in ("provenance", "result")):
        raise InvalidArgument(f"{path} is no result file: expected the fields provenance and result")
    version = found.get("schema", SCHEMA_VERSION)
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise InvalidArgument(f"{path} has the schema {version!r}; this kvtc reads schemas 1 to {SCHEMA_VERSION}")
    _check(found["provenance"], Provenance, f"{path}: provenance")
    _check(found["result"], _WholeResult, f"{path}: result")
    for where, kind, record in _records(found["result"]):
        _check(record, kind, f"{path}: {where}")
    return ResultFile(path.stem, found["provenance"], found["result"])


def _records(result: Mapping[str, Any]) -> Iterator[tuple[str, type, Mapping[str, Any]]]:
    """Where it stands, what it is and the record itself, of all that something is computed from."""
    parts = {part: (record_kind(part, result.get("kind")), records) for part, records in result.items()}
    studies = result.get("studies")
    for index, study in enumerate(studies if isinstance(studies, list) else []):
        if is_study(study):
            parts[f"studies[{index}].qualities"] = QualityRecord, study["qualities"]
    for part, (kind, records) in parts.items():
        if kind is not None and isinstance(records, list):
            for index, record in enumerate(records):
                if is_whole(record, kind):
                    yield f"{part}[{index}]", kind, record


def _check(record: Mapping[str, Any], kind: type, where: str) -> None:
    """Raise `InvalidArgument` for a field that has not the type of the record's, or lies out of its
    range.
    """
    for name, (container, scalar) in _types(kind).items():
        value = record.get(name)
        if value is None:
            continue
        low, high = _range(kind, name)
        if not all(_is_right(one, scalar, low, high) for one in _values(value, container, name)):
            wanted = (
                "text" if scalar is str else f"{'whole numbers' if scalar is int else 'numbers'} of {low:g} to {high:g}"
            )
            raise InvalidArgument(f"{where}.{name}: expected {wanted}, found {str(value)[:60]}")


def _values(value: Any, container: Any, name: str) -> list[Any]:
    """What is in a field; None, which is nothing right, where it holds something else than it
    should.
    """
    if container is None:
        return [value]
    if not isinstance(value, container) or len(value) not in _LENGTHS.get(name, range(2**31)):
        return [None]
    # A quarter of a context in which nothing was asked has no share.
    return list(value.values()) if isinstance(value, dict) else [one for one in value if one is not None]


def _is_right(value: object, scalar: type, low: float, high: float) -> bool:
    if scalar is str:
        return isinstance(value, str)
    allowed = (int,) if scalar is int else (int, float)
    return isinstance(value, allowed) and not isinstance(value, bool) and low <= value <= high


def _range(kind: type, name: str) -> tuple[float, float]:
    if name in _CHANGES:
        return -1, 1
    if name in _SHARES:
        return 0.0, 1.0
    if name.startswith("kl"):
        return _LEAST_KL, MAX_MAGNITUDE
    is_positive = (
        name.endswith("_ratio") or name in _ABOVE_ZERO or (kind is RecomputePoint and name != "encode_seconds")
    )
    return (MIN_MAGNITUDE if is_positive else 0.0), MAX_MAGNITUDE


@cache
def _types(kind: type) -> dict[str, tuple[type | None, type]]:
    """Of the fields of a record: list, dict or None, and the type of what is in it."""
    return {name: _type_of(hint) for name, hint in get_type_hints(kind).items()}


def _type_of(hint: Any) -> tuple[type | None, type]:
    if isinstance(hint, UnionType):
        return _type_of(next(part for part in get_args(hint) if part is not NoneType))
    container = get_origin(hint)
    return (container, _type_of(get_args(hint)[-1])[1]) if container else (None, hint)
