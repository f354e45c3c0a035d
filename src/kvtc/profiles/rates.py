"""What a codec may spend, as types: one of them is given, so contradictory ones cannot be written."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from ..errors import InvalidArgument

DEFAULT_RATIO = 16.0


@dataclass(frozen=True)
class Rate:
    """Any of the rates. Each is checked when it is made, and raises `InvalidArgument`."""

    @property
    def key_parts(self) -> dict[str, float | str]:
        """What goes into the keys of entries: the kind of rate, and its numbers."""
        return {"rate": type(self).__name__} | {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Ratio(Rate):
    """Bits of the cache over bits of the stream's body. `paper` counts bits before lossless coding, as published."""

    ratio: float = DEFAULT_RATIO

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", checked_ratio(self.ratio))


@dataclass(frozen=True)
class FixedSize(Ratio):
    """The same, and every stream of tokens at the same positions has the same length: it is padded (`joint`, `conditional`)."""


@dataclass(frozen=True)
class Step(Rate):
    """The step that all coefficients are divided by (`joint`, `conditional`)."""

    step: float

    def __post_init__(self) -> None:
        if not (isfinite(self.step) and self.step > 0):
            raise InvalidArgument(f"a step must be positive; got {self.step}")
        object.__setattr__(self, "step", float(self.step))


@dataclass(frozen=True)
class SideRatios(Rate):
    """A ratio for keys and another one for values (`paper`)."""

    key_ratio: float
    value_ratio: float

    def __post_init__(self) -> None:
        for name in ("key_ratio", "value_ratio"):
            object.__setattr__(self, name, checked_ratio(getattr(self, name)))


@dataclass(frozen=True)
class MaxError(Rate):
    """The largest relative error of keys, and of values: Frobenius norm over the centred calibration rows (`paper`)."""

    max_error: float

    def __post_init__(self) -> None:
        if not 0 < self.max_error < 1:
            raise InvalidArgument(f"max_error is relative and must lie between 0 and 1; got {self.max_error}")
        object.__setattr__(self, "max_error", float(self.max_error))


@dataclass(frozen=True)
class Truncation(Ratio):
    """A ratio met by leading coefficients in 16 bits, without the dynamic program: the ablation of the paper's table 15."""


@dataclass(frozen=True)
class Lossless(Rate):
    """Every bit is kept: all tokens are exact, and no profile codes any."""


def checked_ratio(ratio: float) -> float:
    """The ratio as a float. Raises `InvalidArgument` unless it is finite and at least 1."""
    if not (isfinite(ratio) and ratio >= 1):
        raise InvalidArgument(f"a ratio is original over stored bytes and at least 1; got {ratio}")
    return float(ratio)
