"""What a codec is told, checked: every argument that can never work is refused here, before a cache is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Backend
from ..calibration.artifact import Calibration
from ..coding.lossless import require_coder
from ..container import MAX_CHUNK_TOKENS, PROFILES
from ..errors import InvalidArgument
from ..process.torch_state import neutral_torch_state, plain
from ..profiles import BodyCoder, JointCoder, PaperCoder
from ..profiles.joint.step_search import FINER_WINDOW, StepRate
from ..profiles.paper.rate import DEFAULT_RATIO, RateTarget
from .opened_stream import TokenIds
from .sealed_stream import StreamSettings

SINK_FORMATS = ("exact", "fp8")
WINDOW_FORMATS = ("exact", "coded")
_LARGEST_ID = 2**63 - 1
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_calibration(calibration: Calibration) -> None:
    """Raise `InvalidArgument` for anything but a calibration."""
    if not isinstance(calibration, Calibration):
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
    profile: str, chunk_tokens: int, lossless: str, sink_format: str, window_format: str, fixed_size: bool
) -> StreamSettings:
    """What holds for every stream of a codec."""
    if profile not in PROFILES:
        raise InvalidArgument(f"profile {profile!r} is unknown; expected one of {', '.join(PROFILES)}")
    if not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise InvalidArgument(f"chunk_tokens must lie in 1 .. {MAX_CHUNK_TOKENS}; got {chunk_tokens}")
    if sink_format not in SINK_FORMATS:
        raise InvalidArgument(f"sink_format must be exact or fp8; got {sink_format!r}")
    if window_format not in WINDOW_FORMATS:
        raise InvalidArgument(f"window_format must be exact or coded; got {window_format!r}")
    if window_format == "coded" and profile == "paper":
        raise InvalidArgument("the profile paper keeps its window exactly: use joint or conditional to code it")
    if fixed_size and profile == "paper":
        raise InvalidArgument("the profile paper cannot keep to a fixed size: use joint or conditional")
    require_coder(lossless)
    return StreamSettings(profile, chunk_tokens, lossless, sink_format == "fp8", fixed_size, window_format == "coded")


def coder_and_rate(
    calibration: Calibration,
    backend: Backend,
    product: torch.dtype,
    settings: StreamSettings,
    ratio: float | None,
    step: float | None,
    kl: float | None,
    of_paper: tuple[float | None, float | None, float | None, str],
) -> tuple[BodyCoder, RateTarget | StepRate]:
    """The coder of a profile and what it may spend. of_paper: key_ratio, value_ratio, max_error, allocation."""
    profile = settings.profile
    if profile == "paper":
        if step is not None or kl is not None:
            raise InvalidArgument("the profile paper has no step, which step and kl decide; give a ratio")
        target = RateTarget(calibration, ratio, *of_paper)
        return PaperCoder(calibration, backend, product, target), target
    if asks_for_paper(of_paper):
        raise InvalidArgument(
            f"key_ratio, value_ratio, max_error and allocation are of the profile paper, not {profile}"
        )
    if sum(given is not None for given in (ratio, step, kl)) > 1:
        raise InvalidArgument("give either a ratio or a step or a kl, not several")
    if settings.fixed_size and (step is not None or kl is not None):
        raise InvalidArgument("a fixed size needs a ratio: at one step the bytes follow from the cache")
    step = step if kl is None else _step_for(calibration, profile, kl)
    finer_window = FINER_WINDOW if settings.coded_window else None
    rate = StepRate(DEFAULT_RATIO if ratio is None else ratio, step, finer_window)
    return JointCoder(calibration, backend, product, profile == "conditional", rate), rate


def asks_for_paper(of_paper: tuple[float | None, float | None, float | None, str]) -> bool:
    """Whether an option is given that only the profile paper has: key_ratio, value_ratio, max_error, allocation."""
    return of_paper != (None, None, None, "dynamic")


def _step_for(calibration: Calibration, profile: str, kl: float) -> float:
    """The step that is expected to make predictions diverge by kl nats."""
    if profile not in calibration.quality:
        raise InvalidArgument(
            f"this calibration has no measured quality of the profile {profile}, so kl cannot be given; "
            "kvtc.measure_quality adds it"
        )
    return calibration.quality[profile].step_for(kl)


def decoder(calibration: Calibration, backend: Backend, product: torch.dtype, profile: str) -> BodyCoder:
    """A coder of a profile that only decodes."""
    if profile == "paper":
        return PaperCoder(calibration, backend, product)
    return JointCoder(calibration, backend, product, profile == "conditional")


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
