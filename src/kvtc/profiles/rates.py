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
        """What goes into the keys of entries: the type of rate, and its numbers.

        >>> from kvtc.profiles.rates import Ratio
        >>> Ratio(32).key_parts
        {'rate': 'Ratio', 'ratio': 32.0}
        """
        return {"rate": type(self).__name__} | {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Ratio(Rate):
    """A ratio: the size of the body in the exact cache over its size in the stream. `paper` counts bits before
    lossless coding, as published.

    Parameters:
        ratio: at least 1; default 16.

    Raises:
        InvalidArgument: the ratio is below 1 or not finite.

    Example:
        >>> from kvtc.profiles.rates import Ratio
        >>> kvtc.Codec(calibration, rate=Ratio(32)).rate == kvtc.Codec(calibration, ratio=32).rate
        True
    """

    ratio: float = DEFAULT_RATIO

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", checked_ratio(self.ratio))


@dataclass(frozen=True)
class FixedSize(Ratio):
    """A ratio at which every stream of tokens at the same positions has the same length: it is padded (`joint`,
    `conditional`).

    Parameters:
        ratio: at least 1; default 16.

    Example:
        >>> from kvtc.profiles.rates import FixedSize
        >>> kvtc.Codec(calibration, rate=FixedSize(32)).rate.key_parts
        {'rate': 'FixedSize', 'ratio': 32.0}
    """


@dataclass(frozen=True)
class Step(Rate):
    """The number by which all coefficients are divided before they are rounded (`joint`, `conditional`).

    Parameters:
        step: above 0, in units of the metric.

    Raises:
        InvalidArgument: the step is not positive.

    Example:
        >>> from kvtc.profiles.rates import Step
        >>> fine, coarse = (len(codec.with_rate(Step(step)).encode(cache)) for step in (0.1, 0.4))
        >>> fine > coarse
        True
    """

    step: float

    def __post_init__(self) -> None:
        if not (isfinite(self.step) and self.step > 0):
            raise InvalidArgument(f"a step must be positive; got {self.step}")
        object.__setattr__(self, "step", float(self.step))


@dataclass(frozen=True)
class SideRatios(Rate):
    """A ratio for keys and another one for values (`paper`).

    Parameters:
        key_ratio: at least 1.
        value_ratio: at least 1.

    Raises:
        InvalidArgument: a ratio is below 1 or not finite.

    Example:
        >>> from kvtc.profiles.rates import SideRatios
        >>> kvtc.Codec(calibration, "paper", rate=SideRatios(key_ratio=32, value_ratio=8)).rate.value_ratio
        8.0
    """

    key_ratio: float
    value_ratio: float

    def __post_init__(self) -> None:
        for name in ("key_ratio", "value_ratio"):
            object.__setattr__(self, name, checked_ratio(getattr(self, name)))


@dataclass(frozen=True)
class MaxError(Rate):
    """The largest relative error of keys, and of values: Frobenius norm over the centred calibration rows (`paper`).

    Parameters:
        max_error: above 0 and below 1.

    Raises:
        InvalidArgument: the error is out of this range.

    Example:
        >>> from kvtc.profiles.rates import MaxError
        >>> kvtc.Codec(calibration, "paper", rate=MaxError(0.1)).rate
        MaxError(max_error=0.1)
    """

    max_error: float

    def __post_init__(self) -> None:
        if not 0 < self.max_error < 1:
            raise InvalidArgument(f"max_error is relative and must lie between 0 and 1; got {self.max_error}")
        object.__setattr__(self, "max_error", float(self.max_error))


@dataclass(frozen=True)
class Truncation(Ratio):
    """A ratio met by leading coefficients in 16 bits, without the dynamic program: the ablation of the paper's table
    15.

    Parameters:
        ratio: at least 1; default 16.

    Example:
        >>> from kvtc.profiles.rates import Truncation
        >>> kvtc.Codec(calibration, "paper", rate=Truncation(8)).rate
        Truncation(ratio=8.0)
    """


@dataclass(frozen=True)
class Lossless(Rate):
    """Every bit is kept: all tokens are exact, and no profile codes any.

    Example:
        >>> from kvtc.profiles.rates import Lossless
        >>> kvtc.Codec(rate=Lossless()).is_lossless
        True
    """


def checked_ratio(ratio: float) -> float:
    """The ratio as a float. Raises `InvalidArgument` unless it is finite and at least 1."""
    if not (isfinite(ratio) and ratio >= 1):
        raise InvalidArgument(f"a ratio is original over stored bytes and at least 1; got {ratio}")
    return float(ratio)
