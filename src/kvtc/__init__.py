"""kvtc: transform coding for LLM key-value caches.

Calibrate once per model; then any cache of that model becomes few bytes, and back:

    calibration = kvtc.calibrate(model, token_sequences)
    codec = kvtc.Codec(calibration, ratio=16)
    stream = codec.encode(cache, token_ids)
    cache = codec.decode(stream, token_ids)

The same with the model and the calibration that come with kvtc. All examples in docstrings go on from these lines:

    >>> import kvtc, torch
    >>> model, tokenizer = kvtc.reference_model("bfloat16")
    >>> text = " ".join(str(number) for number in range(400))
    >>> token_ids = torch.tensor(tokenizer(text).input_ids[:600])
    >>> with torch.no_grad():
    ...     cache = model(token_ids[None]).past_key_values
    >>> calibration = kvtc.reference_calibration()
    >>> codec = kvtc.Codec(calibration, ratio=16)
    >>> stream = codec.encode(cache, token_ids)
    >>> codec.decode(stream, token_ids).get_seq_length()
    600

Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors
from .process import forks  # noqa: F401  what a forked child inherits is noted from here on

if TYPE_CHECKING:
    from .cache import CacheGeometry as CacheGeometry
    from .cache import KVCache as KVCache
    from .calibration import Calibration as Calibration
    from .calibration import load_calibration as load_calibration
    from .codec import Codec as Codec
    from .codec.inspection import StreamInfo as StreamInfo
    from .codec.inspection import inspect as inspect
    from .codec.resume_points import ResumePoints as ResumePoints
    from .container.parts import join_streams as join_streams
    from .container.parts import split_stream as split_stream
    from .huggingface.calibrate import calibrate as calibrate
    from .huggingface.measure_quality import measure_quality as measure_quality
    from .huggingface.model_identity import model_identity as model_identity
    from .huggingface.prefill import prefill as prefill
    from .huggingface.support import Support as Support
    from .huggingface.support import supported as supported
    from .prefix_cache import PrefixCache as PrefixCache
    from .reference import reference_calibration as reference_calibration
    from .reference import reference_model as reference_model
    from .store import open_store as open_store

__version__ = "0.1.0"

_HOME = {
    "CacheGeometry": "cache",
    "Calibration": "calibration",
    "Codec": "codec",
    "KVCache": "cache",
    "PrefixCache": "prefix_cache",
    "ResumePoints": "codec.resume_points",
    "StreamInfo": "codec.inspection",
    "Support": "huggingface.support",
    "calibrate": "huggingface.calibrate",
    "inspect": "codec.inspection",
    "join_streams": "container.parts",
    "load_calibration": "calibration",
    "measure_quality": "huggingface.measure_quality",
    "model_identity": "huggingface.model_identity",
    "open_store": "store",
    "prefill": "huggingface.prefill",
    "reference_calibration": "reference",
    "reference_model": "reference",
    "split_stream": "container.parts",
    "supported": "huggingface.support",
}

__all__ = ["errors", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvtc' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
