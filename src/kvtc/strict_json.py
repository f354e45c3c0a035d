"""JSON of files that anyone may have written: what Python reads and JSON or good sense does not know is a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 32
"""Of objects and lists in one another."""


MAX_MAGNITUDE, MIN_MAGNITUDE = 1e30, 1e-30
"""Of numbers that are not 0: none that kvtc writes comes near, and arithmetic with these does not overflow."""


def loads(text: str | bytes) -> Any:
    """What a text holds; ValueError for what is no JSON, for NaN and numbers out of all range, a name twice in an object, and
    endless nesting."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
    _check_depth(value, MAX_DEPTH)
    return value


def dumps(value: Any) -> str:
    """A value as indented JSON in ASCII; numbers that are not finite become null, for JSON has none."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


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
    """A value as messages show it: not all of it."""
    return repr(value)[:80] if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


def _refuse(name: str) -> float:
    raise ValueError(f"the number {name} is not finite, or out of all range")


def _float(text: str) -> float:
    number = float(text)
    if number and not MIN_MAGNITUDE <= abs(number) <= MAX_MAGNITUDE:
        raise ValueError(f"the number {text[:40]} is not finite, or out of all range")
    return number


def _int(text: str) -> int:
    if len(text) > len(str(int(MAX_MAGNITUDE))):
        raise ValueError(f"the number {text[:40]} is out of all range")
    return int(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


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
