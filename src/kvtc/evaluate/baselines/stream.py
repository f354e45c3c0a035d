"""What the baselines share: their stream, and the methods that code every token but a window.

stream = header | exact tokens: keys, then values, 16 bits a value | body, as the method writes it

Streams are decoded where they were made: they carry no checksums, and damage is not looked for.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache import sides_of_layer
from ...codec import transformers_cache as interop
from ...errors import InvalidArgument, UnsupportedModel
from ...process.torch_state import neutral_torch_state
from ..methods import Cost

_HEADER = struct.Struct("<BHHHHII")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Shape = tuple[int, int, int, int]
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Header:
    """Shape of a cache, the dtype it is restored in, and how many of its tokens are stored as they
    are; 17 bytes.
    """

    dtype: torch.dtype
    n_layers: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    n_tokens: int
    n_exact: int

    SIZE = _HEADER.size

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, n_exact: int) -> Header:
        """keys, values [L, H, T, D] bfloat16, float16 or float32."""
        n_layers, n_kv_heads, n_tokens, key_dim = keys.shape
        if keys.dtype not in _DTYPES:
            raise InvalidArgument(f"the baselines take bfloat16, float16 and float32 caches; got {keys.dtype}")
        return cls(keys.dtype, n_layers, n_kv_heads, key_dim, values.shape[3], n_tokens, n_exact)

    @classmethod
    def read(cls, stream: bytes) -> Header:
        number, *sizes = _HEADER.unpack_from(stream)
        return cls(_DTYPES[number], *sizes)

    def write(self) -> bytes:
        number = _DTYPES.index(self.dtype)
        heads = self.n_layers, self.n_kv_heads, self.key_dim, self.value_dim
        return _HEADER.pack(number, *heads, self.n_tokens, self.n_exact)

    @property
    def stored_dtype(self) -> torch.dtype:
        """16 bits: the cache's own dtype, float16 for a float32 cache."""
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, 16 bits a value."""
        return 2 * self.n_layers * self.n_kv_heads * (self.key_dim + self.value_dim)

    @property
    def n_body(self) -> int:
        """How many tokens are not exact."""
        return self.n_tokens - self.n_exact

    @property
    def body_shapes(self) -> tuple[Shape, Shape]:
        """[L, H, T, D] of the tokens that are not exact: of their keys, and of their values."""
        return self._shapes(self.n_body)

    @property
    def exact_shapes(self) -> tuple[Shape, Shape]:
        """The same of the exact tokens."""
        return self._shapes(self.n_exact)

    def _shapes(self, n_tokens: int) -> tuple[Shape, Shape]:
        heads = self.n_layers, self.n_kv_heads, n_tokens
        return (*heads, self.key_dim), (*heads, self.value_dim)


class Reader:
    """Tensors one after the other from the bytes that `to_bytes` wrote."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor."""
        size = torch.Size(shape).numel() * dtype.itemsize
        self._at += size
        return from_bytes(self._data[self._at - size : self._at], dtype).reshape(shape)


def to_bytes(*tensors: Tensor) -> bytes:
    """Their values in order, low byte first."""
    return b"".join(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """Inverse of `to_bytes` of one tensor: [n]."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def to_float16(values: Tensor) -> Tensor:
    """float16; what lies past its range becomes its largest value."""
    return values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16)


def to_stored(values: Tensor, header: Header) -> Tensor:
    """A part of the cache at 16 bits a value."""
    return values if header.stored_dtype == values.dtype else to_float16(values)


def cache_sides(cache: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, T, D] of a transformers cache of one sequence, on the CPU.

    Raises `UnsupportedModel` unless all layers keep keys and values of the same tokens.
    """
    shapes = [
        tuple(keys.shape) if isinstance(keys := getattr(layer, "keys", None), Tensor) else None
        for layer in cache.layers
    ]
    for index, shape in enumerate(shapes):
        if shape is None or shape != shapes[0]:
            raise UnsupportedModel(
                "the baselines take caches whose layers all keep keys and values of the same tokens; "
                f"expected the shape {shapes[0]} of layer 0 in layer {index}, found {shape}"
            )
    sides = zip(*(sides_of_layer(layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
    keys, values = (torch.stack([layer.cpu() for layer in side]) for side in sides)
    return keys, values


@dataclass(frozen=True, kw_only=True)
class BodyMethod(ABC):
    """A method that codes all tokens but the last ones, which it keeps at 16 bits a number.

    Parameters:
        window_tokens: the last tokens that are kept; default 0.

    Example:
        >>> from kvtc.evaluate.baselines.stream import BodyMethod, from_bytes, to_bytes
        >>> class Halves(BodyMethod):
        ...     def encode_body(self, keys, values):
        ...         return to_bytes(keys[..., ::2], values[..., ::2])
        ...     def decode_body(self, data, header):
        ...         halves = from_bytes(data, header.dtype).reshape(2, *header.body_shape[:3], -1)
        ...         return halves.repeat_interleave(2, dim=-1)
        >>> method = Halves(window_tokens=10)
        >>> round(method.measure(method.encode(model, cache, token_ids)).body_ratio, 1)
        2.0
    """

    window_tokens: int = 0

    @abstractmethod
    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        """The body as bytes.

        Parameters:
            keys: [L, H, T, D] of the first T >= 1 tokens, as the model cached them.
            values: of the same shape and dtype.

        Returns:
            Bytes, from which `decode_body` restores both.
        """

    @abstractmethod
    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        """Inverse of `encode_body`.

        Parameters:
            data: the bytes.
            header: shape and dtype of the cache.

        Returns:
            Keys and values of `header.body_shapes` in any floating dtype.
        """

    @neutral_torch_state
    def encode(self, _model: Any, cache: Any, _token_ids: Tensor, /) -> bytes:
        """As `Method.encode`."""
        keys, values = cache_sides(cache)
        header = Header.of(keys, values, min(self.window_tokens, keys.shape[2]))
        n_body = header.n_body
        exact = [to_stored(side[:, :, n_body:], header) for side in (keys, values)]
        body = self.encode_body(keys[:, :, :n_body], values[:, :, :n_body]) if n_body else b""
        return header.write() + to_bytes(*exact) + body

    @neutral_torch_state
    def decode(self, stream: bytes, _token_ids: Tensor, /) -> Any:
        """As `Method.decode`."""
        header = Header.read(stream)
        n_body = header.n_body
        start = Header.SIZE + header.n_exact * header.token_bytes
        exact = Reader(stream[Header.SIZE : start])
        sides = [exact.take(shape, header.stored_dtype).to(header.dtype) for shape in header.exact_shapes]
        if n_body:
            body = self.decode_body(stream[start:], header)
            sides = [
                torch.cat([part.to(header.dtype), window], dim=2) for part, window in zip(body, sides, strict=True)
            ]
        return interop.to_transformers(sides[0][None], sides[1][None], range(len(sides[0])))

    def measure(self, stream: bytes, /) -> Cost:
        """As `Method.measure`."""
        header = Header.read(stream)
        n_body = header.n_body
        return Cost(
            n_tokens=header.n_tokens,
            body_tokens=n_body,
            original_bytes=header.n_tokens * header.token_bytes,
            body_original_bytes=n_body * header.token_bytes,
            body_bytes=len(stream) - header.n_exact * header.token_bytes if n_body else 0,
            total_bytes=len(stream),
        )
