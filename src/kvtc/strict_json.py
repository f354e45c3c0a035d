"""JSON as the standard has it: finite numbers that a computer can count with, and no deeper than anyone writes by hand."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 32
MAX_MAGNITUDE, MIN_MAGNITUDE = 1e30, 1e-30
"""Of numbers that are not 0: none that kvtc writes comes near, and arithmetic with these does not overflow."""


def loads(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError for one that is none, is nested too deeply or holds numbers out of all range."""
    try:
        value = json.loads(text, parse_constant=_float, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def dumps(value: Any) -> str:
    """A value as indented JSON in ASCII; numbers that are not finite become null, for JSON has none."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _float(text: str) -> float:
    number = float(text)
    if number and not MIN_MAGNITUDE <= abs(number) <= MAX_MAGNITUDE:
        raise ValueError(f"the number {text[:40]} is not finite, or out of all range")
    return number


def _int(text: str) -> int:
    if len(text) > len(str(int(MAX_MAGNITUDE))):
        raise ValueError(f"the number {text[:40]} is out of all range")
    return int(text)
