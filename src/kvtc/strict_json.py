"""JSON of files that anyone may have written: what Python reads and JSON or good sense does not know is a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 32
"""Of objects and lists in one another."""


def loads(text: str) -> Any:
    """What a text holds; ValueError for what is no JSON, for NaN, infinities, a name twice in an object, and endless nesting."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
    _check_depth(value, MAX_DEPTH)
    return value


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number, low .. high; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number of {low} .. {high}; found {_shown(value)}")
    return value


def number(value: Any, name: str, low: float, high: float) -> float:
    """A number, low .. high; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number of {low:g} .. {high:g}; found {_shown(value)}")
    return float(value)


def items(value: Any, name: str) -> list[Any]:
    """A list; ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list; found {_shown(value)}")
    return value


def fields(value: Any, name: str) -> dict[str, Any]:
    """An object; ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object; found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value as messages show it: not all of it, and no number of thousands of digits, which Python refuses to write."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:80] if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"its lists and objects are nested more than {MAX_DEPTH} deep")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)
