"""The one form that results have, whichever program measured them: `save_result` writes it, `kvtc report` shows it.

A result file is JSON:

    {"schema": 1, "provenance": {...}, "result": {"kind": "...", ...}}

`kind` says what was measured; the page shows those named here in their own way, any other as plain tables. What a kind holds:

    evaluation     model, n_layers, cache_dtype; any of
                   qualities: [QualityRecord], scores: [ScoreRecord], turns: [TurnRecord], bits_per_byte: {domain: figure},
                   and figures derived from them: fewer_bytes, within_a_point (`derived`)
    ablations      studies: [{"title", "note", "qualities": [Quality]}]
    phase_sweep    points: [PhasePoint]
    domain_shift   cells: [ShiftCell]
    recompute      points: [RecomputePoint]

A method is named "<series> <setting>": the setting is the last word if it holds a digit ("paper 16x", "KIVI 2-bit", "H2O 1/8"), so
that `split_name` finds which points lie on one curve. Ratios are original bytes over stored bytes, the original at 16 bits a value;
KL is in nats, shares lie in 0 .. 1, times are in seconds, None (null) stands for what there is not. Fields may be added to a record
without a new version; a field that changes its meaning is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument
from .multi_turn import MultiTurn
from .provenance import SCHEMA_VERSION
from .quality import Quality
from .scoring import TaskScore

EVALUATION = "evaluation"
ABLATIONS = "ablations"
PHASE_SWEEP = "phase_sweep"
DOMAIN_SHIFT = "domain_shift"
RECOMPUTE = "recompute"


@dataclass(frozen=True, kw_only=True)
class QualityRecord(Quality):
    """`Quality` of a method in a sweep. window_tokens: last tokens kept exactly by methods that keep a window."""

    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class ScoreRecord(TaskScore):
    """`TaskScore` in a sweep. window_tokens as in `QualityRecord`."""

    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class TurnRecord(MultiTurn):
    """`MultiTurn` in a sweep. window_tokens: last tokens kept exactly after coding; then the window grows by a turn."""

    window_tokens: int


@dataclass(frozen=True)
class PhasePoint:
    """Look-ups whose answers lie at one place of the grid of chunks.

    name: of the method, or "exact cache". phase: tokens by which the context is shifted against the grid. depth: where in the
    context the answers lie, 0 .. 1; None: everywhere. exact: share of answers that are right; kl as in `TaskScore`.
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
    """What it costs to have the cache of n_tokens back: computed again, or decoded. original_bytes, total_bytes: of the cache."""

    name: str
    n_tokens: int
    prefill_seconds: float
    encode_seconds: float | None
    decode_seconds: float
    original_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class ResultFile:
    """A result as read. name: of the file, without its suffix."""

    name: str
    provenance: dict[str, Any]
    result: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """What was measured; None where the file does not say."""
        kind = self.result.get("kind")
        return kind if isinstance(kind, str) else None


def split_name(name: str) -> tuple[str, str]:
    """Of a method: series and setting; "paper 16x" -> ("paper", "16x"), "FP8" -> ("FP8", "")."""
    series, _, setting = name.rpartition(" ")
    return (series.rstrip(","), setting) if series and any(map(str.isdigit, setting)) else (name, "")


def read_result(path: Path) -> ResultFile:
    """A result file. Raises `InvalidArgument` for one that is none, or of a later schema; `OSError` where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in ("provenance", "result")):
        raise InvalidArgument(f"{path} is no result file: expected the fields provenance and result")
    version = found.get("schema", SCHEMA_VERSION)
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise InvalidArgument(f"{path} has the schema {version!r}; this kvtc reads schemas 1 to {SCHEMA_VERSION}")
    return ResultFile(path.stem, found["provenance"], found["result"])
