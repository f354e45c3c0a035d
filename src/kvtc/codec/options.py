"""The arguments of a codec, checked: every argument that can never work is refused here, before a cache is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import TokenIds
from ..calibration.artifact import Calibration
from ..coding.lossless import require_coder
from ..coding.states.rounding import ROUNDED_BITS
from ..container.tables import LOSSLESS, MAX_CHUNK_TOKENS, PROFILES
from ..errors import InvalidArgument
from ..process.torch_state import neutral_torch_state, plain
from ..profiles.rates import DEFAULT_RATIO, FixedSize, Lossless, MaxError, Rate, Ratio, SideRatios, Step, Truncation
from .exact_groups import LOSSLESS_STATES
from .sealed_stream import StreamSettings

SINK_FORMATS = ("exact", "fp8")
WINDOW_FORMATS = ("exact", "coded")
STATE_FORMATS = (LOSSLESS_STATES, *ROUNDED_BITS)
DEFAULT_STATES = "int8"
"""Of codecs that are not lossless: its effect is small beside that of their rates (docs/benchmarks.md)."""
_LARGEST_ID = 2**63 - 1
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_is_calibration(calibration: Calibration | None, is_lossless: bool) -> None:
    """Raise `InvalidArgument` for anything but a calibration, or nothing where every token is kept exactly."""
    if calibration is None and not is_lossless:
        raise InvalidArgument("a codec needs a calibration (kvtc.load_calibration), unless it is lossless")
    if calibration is not None and not isinstance(calibration, Calibration):
        raise InvalidArgument(f"expected a kvtc.Calibration (kvtc.load_calibration), got {type(calibration).__name__}")


def check_regions(sink_tokens: int, window_tokens: int) -> None:
    """Raise `InvalidArgument` for negative counts."""
    if sink_tokens < 0 or window_tokens < 0:
        raise InvalidArgument(f"sink_tokens {sink_tokens} and window_tokens {window_tokens} must not be negative")


def check_limit(max_tokens: int) -> None:
    """Raise `InvalidArgument` unless it is a number of tokens."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InvalidArgument(f"max_tokens must be a whole number of at least 1; got {max_tokens!r}")


def stream_settings(
    profile: str, chunk_tokens: int, coder: str, sink_format: str, window_format: str, states: str | None, rate: Rate
) -> StreamSettings:
    """What holds for every stream of a codec."""
    is_lossless = isinstance(rate, Lossless)
    if profile not in PROFILES and not is_lossless:
        raise InvalidArgument(f"profile {profile!r} is unknown; expected one of {', '.join(PROFILES)}")
    if not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise InvalidArgument(f"chunk_tokens must lie in 1 .. {MAX_CHUNK_TOKENS}; got {chunk_tokens}")
    if sink_format not in SINK_FORMATS:
        raise InvalidArgument(f"sink_format must be exact or fp8; got {sink_format!r}")
    if window_format not in WINDOW_FORMATS:
        raise InvalidArgument(f"window_format must be exact or coded; got {window_format!r}")
    if is_lossless and (sink_format, window_format) != ("exact", "exact"):
        raise InvalidArgument("lossless keeps every token exactly: sink_format and window_format must be exact")
    states = states or (LOSSLESS_STATES if is_lossless else DEFAULT_STATES)
    if states not in STATE_FORMATS:
        raise InvalidArgument(f"states must be one of {', '.join(STATE_FORMATS)}; got {states!r}")
    require_coder(coder)
    is_fixed = isinstance(rate, FixedSize)
    return StreamSettings(
        profile, chunk_tokens, coder, sink_format == "fp8", is_fixed, window_format == "coded", states
    )


@dataclass(frozen=True)
class RateArguments:
    """The arguments of `Codec` that say what may be spent, as they are given: one of them at most, but for pairs."""

    ratio: float | None = None
    step: float | None = None
    kl: float | None = None
    key_ratio: float | None = None
    value_ratio: float | None = None
    max_error: float | None = None
    fixed_size: bool = False
    rate: Rate | None = None
    lossless: bool = False

    @property
    def profile(self) -> str | None:
        """The only profile that serves them, if there is only one; of lossless streams what their headers call it."""
        if self.lossless or isinstance(self.rate, Lossless):
            return LOSSLESS
        of_paper = (self.key_ratio, self.value_ratio, self.max_error) != (None, None, None)
        return "paper" if of_paper or isinstance(self.rate, SideRatios | MaxError | Truncation) else None

    def resolve(self, profile: str, calibration: Calibration | None) -> Rate:
        """The rate. Raises `InvalidArgument` for arguments that contradict one another, or the profile."""
        sides = self.key_ratio, self.value_ratio
        if self.profile == LOSSLESS != profile:
            raise InvalidArgument(f"lossless streams are not of the profile {profile}: give no profile")
        if self.profile == "paper" != profile:
            raise InvalidArgument(
                f"key_ratio, value_ratio, max_error and their rates are of the profile paper, not {profile}"
            )
        # A ratio beside the ratio of one side is that of the other side.
        one_ratio = self.ratio if sides == (None, None) else True
        given = [one_ratio, self.step, self.kl, self.max_error, self.rate, self.lossless or None]
        if sum(value is not None for value in given) > 1:
            raise InvalidArgument("give either a ratio or a step or a kl or a max_error or lossless, not several")
        if self.fixed_size and any(value is not None for value in given[1:]):
            raise InvalidArgument("a fixed size needs a ratio: at one step the bytes follow from the cache")
        default = DEFAULT_RATIO if self.ratio is None else self.ratio
        if self.lossless:
            return Lossless()
        if self.rate is not None:
            return self.rate
        if self.step is not None:
            return Step(self.step)
        if self.kl is not None:
            return _rate_for(calibration, profile, self.kl)
        if self.max_error is not None:
            return MaxError(self.max_error)
        if sides != (None, None):
            key_ratio, value_ratio = (default if side is None else side for side in sides)
            return SideRatios(key_ratio, value_ratio)
        return FixedSize(default) if self.fixed_size else Ratio(default)


def _rate_for(calibration: Calibration | None, profile: str, kl: float) -> Rate:
    """The step at which predictions diverge by kl nats at most, or no loss where none was measured to be as good."""
    if profile == "paper":
        raise InvalidArgument("the profile paper has no step, which step and kl decide; give a ratio")
    if calibration is None or profile not in calibration.quality:
        raise InvalidArgument(
            f"this calibration has no measured quality of the profile {profile}, so kl cannot be given; "
            "kvtc.measure_quality adds it"
        )
    curve = calibration.quality[profile]
    return Lossless() if 0 <= kl < curve.kl[0] else Step(curve.step_for(kl))


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of what the transforms multiply."""
    if precision != "auto" and precision not in PRECISIONS:
        raise InvalidArgument(f"precision is {precision!r}; expected one of auto, {', '.join(PRECISIONS)}")
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return PRECISIONS[precision]


def as_ids(values: Any) -> TokenIds | None:
    """Token ids or positions in any integer form, None for None. Raises as `as_token_ids`."""
    return None if values is None else as_token_ids(values)


@neutral_torch_state
def as_token_ids(values: Any) -> TokenIds:
    """Token ids or positions in any integer form, a batch of one too -> int64 [T].

    Raises `InvalidArgument` for other numbers, and for those above int64, which would wrap.
    """
    array = plain(values, "token ids").cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise InvalidArgument(
            f"token ids and positions are integers [tokens]; got {array.dtype} of shape {array.shape}"
        )
    if array.size and int(array.max()) > _LARGEST_ID:
        raise InvalidArgument(f"token ids and positions are at most {_LARGEST_ID}; got {array.max()}")
    return array.astype(np.int64)


def as_tensor(values: Any, name: str) -> Tensor:
    """Numbers in any form -> an ordinary tensor, which may be the caller's. name: for messages."""
    return plain(values, name) if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
