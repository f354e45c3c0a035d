"""The one interface that evaluation has to kvtc and to its baselines: a cache becomes bytes, and
these become a cache again.

Nothing but the bytes passes from one side to the other, so a method cannot forget to count what it
needs to restore a cache. What is made once for a model (a calibration, a rotation, frequency
tables) belongs to the method and is not counted, as for kvtc.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..codec import Codec
from ..codec.inspection import inspect

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """What a stream costs, counted as in `kvtc.StreamInfo`.

    Parameters:
        n_tokens: tokens of the cache.
        body_tokens: tokens that are not kept exactly on purpose, as sinks and window are.
        original_bytes: size of all tokens at 16 bits a number.
        body_original_bytes: size of the body in the layers that the method codes, at 16 bits a
            number.
        body_bytes: all bytes of the stream but the numbers of exact tokens; 0: there is no
            body.
        total_bytes: length of the stream.

    Example:
        >>> from kvtc.evaluate.methods import Cost
        >>> cost = Cost(100, 90, original_bytes=1000, body_original_bytes=900, body_bytes=60, total_bytes=160)
        >>> cost.body_ratio, cost.total_ratio
        (15.0, 6.25)
    """

    n_tokens: int
    body_tokens: int
    original_bytes: int
    body_original_bytes: float
    body_bytes: int
    total_bytes: int

    @property
    def body_ratio(self) -> float | None:
        """Original bytes of the body over its bytes; None without a body."""
        return self.body_original_bytes / self.body_bytes if self.body_tokens else None

    @property
    def total_ratio(self) -> float:
        """Original bytes over all bytes."""
        return self.original_bytes / self.total_bytes


class Method(Protocol):
    """A way to store a cache. The order of the calls is `encode`, then `decode` and `measure`, of
    one stream.
    """

    def encode(self, model: Any, cache: Any, token_ids: Tensor, /) -> bytes:
        """A cache as a stream of bytes; the cache is left as it was.

        Parameters:
            model: the transformers model that made the cache.
            cache: a transformers cache of one sequence.
            token_ids: [T] integers, the ids of its tokens.

        Returns:
            The stream.
        """
        ...

    def decode(self, stream: bytes, token_ids: Tensor, /) -> Any:
        """A stream of this method as a cache.

        Parameters:
            stream: as `encode` gave it.
            token_ids: [T] integers, the ids of its tokens.

        Returns:
            A transformers `DynamicCache`. It holds fewer than T tokens where tokens are
            evicted.
        """
        ...

    def measure(self, stream: bytes, /) -> Cost:
        """What a stream of this method costs.

        Parameters:
            stream: as `encode` gave it.

        Returns:
            The cost.
        """
        ...


@dataclass(frozen=True)
class KvtcMethod:
    """A codec of kvtc as a method.

    Parameters:
        codec: the codec.

    Example:
        >>> from kvtc.evaluate.methods import KvtcMethod
        >>> method = KvtcMethod(codec)
        >>> coded = method.encode(model, cache, token_ids)
        >>> method.decode(coded, token_ids).get_seq_length(), method.measure(coded).body_tokens
        (600, 468)
    """

    codec: Codec

    def encode(self, _model: Any, cache: Any, token_ids: Tensor, /) -> bytes:
        """As `Method.encode`. Nothing that was recomputed before is used, so that the time is that
        of a first writer.
        """
        self.codec.forget_prefix()
        return self.codec.encode(cache, token_ids)

    def decode(self, stream: bytes, token_ids: Tensor, /) -> Any:
        # So that its time is that of a reader which has computed nothing yet.
        """As `Method.decode`. Nothing that was recomputed before is used, so that the time is that
        of a first reader.
        """
        self.codec.forget_prefix()
        return self.codec.decode(stream, token_ids)

    def measure(self, stream: bytes, /) -> Cost:
        """As `Method.measure`."""
        info = inspect(stream)
        of_coded = sum(group.original_bytes for group in info.groups if group.is_coded)
        body_original = of_coded / max(1, info.n_tokens) * info.body_tokens
        return Cost(
            info.n_tokens, info.body_tokens, info.original_bytes, body_original, info.body_bytes, info.total_bytes
        )


def as_method(method: Method | Codec) -> Method:
    """A codec as a method; a method as it is."""
    return KvtcMethod(method) if isinstance(method, Codec) else method


@dataclass(frozen=True)
class Restored:
    """A cache that went through a method; the model continues from it at position `cost.n_tokens`.
    Times are medians, in seconds.
    """

    cache: Any
    cost: Cost
    encode_seconds: float
    decode_seconds: float


def restore(method: Method, model: Any, cache: Any, token_ids: Tensor, repeats: int = 1) -> Restored:
    """Encode the cache of token_ids [T] and decode it from the bytes, both timed over `repeats`
    runs.
    """
    stream, encode_seconds = timed(lambda: method.encode(model, cache, token_ids), repeats)
    restored, decode_seconds = timed(lambda: method.decode(stream, token_ids), repeats)
    return Restored(restored, method.measure(stream), encode_seconds, decode_seconds)


def timed(function: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """What a function returns, and the median time of `repeats` runs in seconds. From 2 runs on
    there is a warm-up run.
    """
    if repeats > 1:
        function()
    runs = []
    for _ in range(repeats):
        _synchronize()
        started = time.perf_counter()
        result = function()
        _synchronize()
        runs.append(time.perf_counter() - started)
    return result, statistics.median(runs)


def _synchronize() -> None:
    """GPU work is queued: without waiting for it a timer measures the queueing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
