"""JSON objects whose fields are asked for by name: what is missing, of the wrong kind or unknown is
an error that says where.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .. import strict_json
from ..errors import InvalidPlan

T = TypeVar("T")
REQUIRED: Any = object()
LARGEST_WHOLE = 1 << 53
"""Of whole numbers: float64 has all of them up to this one."""
_SHOWN_CHARACTERS = 80
_LARGEST = sys.float_info.max


def read_json(path: Path) -> Any:
    """A JSON file; `InvalidPlan` where it is none. OSError where it cannot be read."""
    try:
        return strict_json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidPlan(f"{path} is not JSON: {error}") from error


class Fields:
    """One JSON object. `where` names it in messages: a file, and the way to the object in it."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise InvalidPlan(f"{where}: expected an object, found {_kind(value)}")
        self.where = where
        self._value: Mapping[str, Any] = value
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        self._asked.add(name)
        return self._value.get(name) is not None

    def override(self, values: Mapping[str, Any]) -> None:
        """Take these values in place of those of the plan."""
        self._value = {**self._value, **values}

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """A field as it is; null counts as missing."""
        self._asked.add(name)
        value = self._value.get(name)
        if value is None:
            if default is REQUIRED:
                raise InvalidPlan(f"{self.where}: the field {name} is missing")
            return default
        return value

    def number(self, name: str, default: Any = REQUIRED, above: float = 0, inclusive: bool = False) -> Any:
        """A finite number above a bound."""
        value = self.get(name, default)
        if name not in self:
            return value
        return check_number(value, f"{self.where}.{name}", above, inclusive)

    def whole(self, name: str, default: Any = REQUIRED, low: int = 1) -> Any:
        """A whole number of at least `low`."""
        value = self.get(name, default)
        if name not in self:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LARGEST_WHOLE:
            raise InvalidPlan(
                f"{self.where}.{name}: expected a whole number of at least {low} and at most 2**53, found {_shown(value)}"
            )
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string that says something."""
        value = self.get(name, default)
        if name in self and not (isinstance(value, str) and value.strip()):
            raise InvalidPlan(f"{self.where}.{name}: expected text, found {value!r}")
        return value

    def choice(self, name: str, choices: Iterable[str], default: Any = REQUIRED) -> str:
        """One of some words."""
        value = self.get(name, default)
        if value not in (choices := list(choices)):
            raise InvalidPlan(f"{self.where}.{name}: expected one of {', '.join(choices)}; found {value!r}")
        return str(value)

    def truth(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InvalidPlan(f"{self.where}.{name}: expected true or false, found {value!r}")
        return value

    def items(self, name: str, default: Any = REQUIRED) -> list[Any]:
        """A list."""
        value = self.get(name, default)
        if not isinstance(value, list):
            raise InvalidPlan(f"{self.where}.{name}: expected a list, found {_kind(value)}")
        return value

    def inside(self, name: str, read: Callable[[Fields], T]) -> T:
        """What is read from an object."""
        return read_object(self.get(name), f"{self.where}.{name}", read)

    def each(self, name: str, read: Callable[[Fields], T], default: Any = REQUIRED) -> list[T]:
        """What is read from each object of a list."""
        return [
            read_object(value, f"{self.where}.{name}[{index}]", read)
            for index, value in enumerate(self.items(name, default))
        ]

    def named(self, name: str, read: Callable[[str, Fields], T]) -> dict[str, T]:
        """What is read from each object of an object, by name."""
        where = f"{self.where}.{name}"
        return {
            each: read_object(value, f"{where}.{each}", partial(read, each))
            for each, value in Fields(self.get(name), where)._value.items()
        }

    def finish(self) -> None:
        """Raise for a field that nobody asked for: a misspelt option is never silently ignored."""
        if unknown := sorted(self._value.keys() - self._asked):
            raise InvalidPlan(f"{self.where}: unknown field {unknown[0]}; known are {', '.join(sorted(self._asked))}")


def read_object(value: Any, where: str, read: Callable[[Fields], T]) -> T:
    """What is read from an object of a plan; a field that was not asked for raises `InvalidPlan`."""
    fields = Fields(value, where)
    found = read(fields)
    fields.finish()
    return found


def check_number(value: Any, where: str, above: float = 0, inclusive: bool = False) -> float:
    """A finite number above a bound, or at it if `inclusive`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
    if not is_number or not (value > above or (inclusive and value == above)):
        raise InvalidPlan(
            f"{where}: expected a number {'of at least' if inclusive else 'above'} {above:g}, found {_shown(value)}"
        )
    return float(value)


def _shown(value: Any) -> str:
    """A value as messages show it: the beginning of what may be long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " .."


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
