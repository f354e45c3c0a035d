"""The neutral cache: plain tensors, no model library.

Axis letters, used everywhere: L layers, H key-value heads, T tokens, D features of a head. A head's keys may have more or fewer
features than its values. P: features of a joint row, all keys and values of one token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .coding.rope import Rope
from .container.groups import FULL_ATTENTION, LATENT, WINDOW
from .errors import GeometryMismatch, InvalidArgument, InvalidCache
from .layer_runs import describe_layers
from .process.torch_state import neutral_torch_state, plain

MAX_EXTENT = (1 << 16) - 1
"""Of layers, heads and features of a head: what a stream's header can say."""
TokenIds = npt.NDArray[np.int64]
"""[T]: token ids, or positions."""
CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


def is_latent(n_kv_heads: int, key_dim: int, value_dim: int) -> bool:
    """Whether a layer of these heads and features is taken to hold latents (MLA): one head with tensors of two widths."""
    return n_kv_heads == 1 and key_dim != value_dim


def describe_widths(key_dim: int, value_dim: int) -> str:
    """Features of a head in words, for messages."""
    return f"head_dim {key_dim}" if key_dim == value_dim else f"keys of {key_dim} and values of {value_dim} features"


def sides_of_layer(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors [..., H, T, D] that a model of transformers caches of a layer, as keys and values, or the other way round.

    Of latents it caches the latent vector first and the rotary part, the key here, second.
    """
    return (second, first) if is_latent(first.shape[-3], first.shape[-1], second.shape[-1]) else (first, second)


@dataclass(frozen=True)
class CacheExtent:
    """A part of a model's cache: some of its layers, and a range of key-value heads in each.

    Parameters:
        layers: numbers of the layers in the model, ascending.
        first_kv_head: number of the first key-value head in the model; 0 unless a tensor-parallel worker holds later
            ones.
        n_kv_heads: number of key-value heads.
        key_dim, value_dim: features of a head's key, and of its value.
    """

    layers: tuple[int, ...]
    first_kv_head: int
    n_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def extent(self) -> CacheExtent:
        """Layers and heads alone, without the rotation."""
        return CacheExtent(self.layers, self.first_kv_head, self.n_kv_heads, self.key_dim, self.value_dim)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def kind(self) -> str:
        """The kind of the group of layers that it is."""
        return LATENT if is_latent(self.n_kv_heads, *self.dims) else FULL_ATTENTION

    @property
    def dims(self) -> tuple[int, int]:
        """Features of a head's key, and of its value."""
        return self.key_dim, self.value_dim

    @property
    def head_dim(self) -> int:
        """Features of a key, and as many of a value; raises `GeometryMismatch` where these are two numbers."""
        if self.key_dim != self.value_dim:
            raise GeometryMismatch(f"{self.describe()}: expected keys and values of one width here")
        return self.key_dim

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of layers, number of key-value heads, features of a head; raises as `head_dim`."""
        return self.n_layers, self.n_kv_heads, self.head_dim

    @property
    def side_features(self) -> tuple[int, int]:
        """Features of one token's keys over all layers and heads, and of its values."""
        n_heads = self.n_layers * self.n_kv_heads
        return n_heads * self.key_dim, n_heads * self.value_dim

    @property
    def layer_features(self) -> tuple[int, int]:
        """The same of one layer."""
        return self.n_kv_heads * self.key_dim, self.n_kv_heads * self.value_dim

    @property
    def joint_features(self) -> int:
        """P: features of a joint row, one token's keys and values over all layers and heads."""
        return sum(self.side_features)

    def side_shapes(self, n_tokens: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Shapes [L, H, T, D] of keys and of values.

        Parameters:
            n_tokens: T.

        Returns:
            The two shapes.
        """
        heads = self.n_layers, self.n_kv_heads, n_tokens
        return (*heads, self.key_dim), (*heads, self.value_dim)

    def describe(self) -> str:
        """Layers and ranges in words, for messages."""
        widths = describe_widths(self.key_dim, self.value_dim)
        heads = f"kv heads {self.first_kv_head}..{self.first_kv_head + self.n_kv_heads - 1}"
        return f"layers {describe_layers(self.layers)}, {heads}, {widths}"


@dataclass(frozen=True)
class CacheGeometry(CacheExtent):
    """The part of a model's cache that a calibration covers, and how keys are rotated there.

    Parameters:
        layers, first_kv_head, n_kv_heads, key_dim, value_dim: as of `CacheExtent`.
        rope: the rotation of each layer.
        is_window: whether its layers have sliding windows; else they have full attention. Default False.

    Raises:
        InvalidArgument: there is no layer, head or feature, the layers do not ascend, a number is larger than a
            stream can hold, or the rotation is of other layers or wider than a head.

    Example:
        >>> geometry = calibration.geometry
        >>> geometry.kind, geometry.sizes, geometry.n_layers, geometry.head_dim, geometry.dims
        ('full attention', (12, 3, 32), 12, 32, (32, 32))
        >>> geometry.layer_features, geometry.side_features, geometry.joint_features
        ((96, 96), (1152, 1152), 2304)
        >>> geometry.side_shapes(600)
        ((12, 3, 600, 32), (12, 3, 600, 32))
        >>> geometry.describe() == geometry.extent.describe()
        True
    """

    rope: Rope
    is_window: bool = False

    def __post_init__(self) -> None:
        sizes = self.n_layers, self.n_kv_heads, self.key_dim, self.value_dim
        if min(sizes) < 1 or min(*self.layers, self.first_kv_head) < 0:
            raise InvalidArgument(f"a cache geometry needs at least one layer, head and feature; got {self.describe()}")
        if any(after <= before for before, after in pairwise(self.layers)):
            raise InvalidArgument(f"layers must ascend; got {self.layers}")
        largest = max(*sizes, self.layers[-1], self.first_kv_head)
        if largest > MAX_EXTENT:
            raise InvalidArgument(f"{self.describe()}: {largest} is more than the {MAX_EXTENT} that streams can say")
        if len(self.rope.layer_tables) != self.n_layers:
            raise InvalidArgument(f"{self.n_layers} layers, but rotations for {len(self.rope.layer_tables)}")
        for table in self.rope.tables:
            if table.rotated_dim > self.key_dim:
                raise InvalidArgument(f"{table.rotated_dim} rotated features in heads of {self.key_dim}")

    @property
    def kind(self) -> str:
        """The kind of the group of layers that it is."""
        return WINDOW if self.is_window else super().kind

    def behind(self, n_layers: int) -> CacheGeometry:
        """The same geometry without the first layers.

        Parameters:
            n_layers: how many layers are left out.

        Returns:
            The geometry of the layers behind them.

        Example:
            >>> calibration.geometry.behind(10).layers
            (10, 11)
        """
        return replace(self, layers=self.layers[n_layers:], rope=self.rope.of_layers(range(n_layers, self.n_layers)))

    def describe(self) -> str:
        """Layers and ranges in words, for messages."""
        return super().describe() + (" (sliding window)" if self.is_window else "")

    def check(self, cache: KVCache) -> None:
        """Refuse a cache of another part of a model.

        Parameters:
            cache: the cache.

        Raises:
            GeometryMismatch: the cache does not hold exactly these layers and heads.

        Example:
            >>> calibration.geometry.check(codec.decode_neutral(stream))
        """
        if cache.extent != self.extent:
            raise GeometryMismatch(f"the calibration covers {self.describe()}; the cache holds {cache.describe()}")


@dataclass(eq=False)
class KVCache:
    """Keys and values of one sequence, in plain tensors.

    Parameters:
        keys: [L, H, T, D], rotated as the model caches them; bfloat16, float16, float32, or an fp8 dtype. Of latents (MLA) the
            rotary part, with one head.
        values: of the same dtype and shape, but for D. Of latents the latent vector.
        positions: [T] int32 or int64, strictly increasing. None (default): 0 .. T-1.
        layers: numbers of the layers in the model, ascending. None (default): 0 .. L-1.
        first_kv_head: number of the first key-value head in the model, for tensor-parallel workers; default 0.
        rope_length: length of the sequence by which the model chose its rotation ("dynamic" and "longrope"), in
            tokens. None (default): the last position + 1.

    Example:
        >>> tiny = kvtc.KVCache(torch.zeros(3, 2, 5, 8), torch.ones(3, 2, 5, 8), layers=(4, 5, 6))
        >>> tiny.n_layers, tiny.n_kv_heads, tiny.n_tokens, tiny.key_dim, tiny.value_dim, tiny.dtype
        (3, 2, 5, 8, 8, torch.float32)
        >>> tiny.describe()
        'layers 4..6, kv heads 0..1, head_dim 8'
        >>> tiny.resolved_layers(), tiny.resolved_positions(), tiny.resolved_rope_length()
        ((4, 5, 6), tensor([0, 1, 2, 3, 4]), 5)
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    layers: tuple[int, ...] | None = None
    first_kv_head: int = 0
    rope_length: int | None = None

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return self.keys.shape[0]

    @property
    def n_kv_heads(self) -> int:
        """H, the number of key-value heads."""
        return self.keys.shape[1]

    @property
    def n_tokens(self) -> int:
        """T, the number of tokens."""
        return self.keys.shape[2]

    @property
    def key_dim(self) -> int:
        """D of keys, the features of a head."""
        return self.keys.shape[3]

    @property
    def value_dim(self) -> int:
        """D of values, the features of a head."""
        return self.values.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.keys.dtype

    @property
    def original_bits(self) -> int:
        """Bits that a number counts in the original size: 16, or 8 where the cache is fp8.

        >>> kvtc.KVCache(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).original_bits
        16
        """
        return 8 if self.dtype.itemsize == 1 else 16

    @property
    def extent(self) -> CacheExtent:
        """The part of a model's cache that it holds.

        >>> codec.decode_neutral(stream).extent == calibration.geometry.extent
        True
        """
        return CacheExtent(self.resolved_layers(), self.first_kv_head, self.n_kv_heads, self.key_dim, self.value_dim)

    def describe(self) -> str:
        """Layers and ranges in words, for messages."""
        return self.extent.describe()

    def resolved_layers(self) -> tuple[int, ...]:
        """The numbers of its layers in the model, also where `layers` is None."""
        return tuple(range(self.n_layers)) if self.layers is None else self.layers

    def span(self, start: int, stop: int) -> KVCache:
        """Some neighbouring tokens with their positions, as a view of this cache.

        Parameters:
            start: index of the first token.
            stop: index after the last token.

        Returns:
            The cache of these tokens.

        Example:
            >>> codec.decode_neutral(stream).span(10, 13).positions
            tensor([10, 11, 12])
        """
        sides = self.keys[:, :, start:stop], self.values[:, :, start:stop]
        return replace(self, keys=sides[0], values=sides[1], positions=self.resolved_positions()[start:stop])

    @neutral_torch_state
    def plain(self) -> KVCache:
        """The same cache with ordinary tensors in place of subclasses of torch.Tensor; `InvalidCache` for tensors
        without memory.

            >>> type(codec.decode_neutral(stream).plain().keys)
            <class 'torch.Tensor'>
        """
        keys, values = plain(self.keys, "keys", InvalidCache), plain(self.values, "values", InvalidCache)
        positions = None if self.positions is None else plain(self.positions, "positions", InvalidCache)
        return replace(self, keys=keys, values=values, positions=positions)

    @neutral_torch_state
    def resolved_positions(self) -> Tensor:
        """The positions [T] int64 on the CPU, also where `positions` is None."""
        if self.positions is None:
            return torch.arange(self.n_tokens, device="cpu")
        return self.positions.to(device="cpu", dtype=torch.int64)

    def resolved_rope_length(self) -> int:
        """The length, in tokens, of the sequence by which the model chose its rotation, also where `rope_length` is
        None.
        """
        if self.rope_length is not None:
            return self.rope_length
        positions = self.resolved_positions()
        return int(positions[-1]) + 1 if positions.numel() else 0

    @neutral_torch_state
    def check_axes(self) -> None:
        """Raise `InvalidCache` unless keys and values are plain tensors [L, H, T, D] of one shape but for their features.

        >>> kvtc.KVCache(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 8)).check_axes()
        """
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            plain(tensor, name, InvalidCache)
        if self.keys.dim() != 4 or self.values.dim() != 4 or self.keys.shape[:3] != self.values.shape[:3]:
            raise InvalidCache(
                "keys and values must both be [layers, kv_heads, tokens, features of a head]; "
                f"got {tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            )

    @neutral_torch_state
    def validate(self, is_finite: bool = True) -> None:
        """Refuse a cache that cannot be coded.

        Parameters:
            is_finite: whether NaN and infinities are refused; only lossless streams can hold them. Default True.

        Raises:
            InvalidCache: tensors are sparse or empty, or shapes, dtypes, positions, layers or numbers are not those
                of a cache.

        Example:
            >>> codec.decode_neutral(stream).validate()
        """
        self.check_axes()
        # An axis of no length makes the others free: a file of no values could claim any number of tokens.
        if 0 in (self.n_layers, self.n_kv_heads, self.key_dim, self.value_dim):
            shapes = f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)}"
            raise InvalidCache(f"{shapes} hold no layer, head or feature")
        if len(self.resolved_layers()) != self.n_layers:
            raise InvalidCache(
                f"{self.n_layers} layers of keys and values, named as {len(self.resolved_layers())} layers"
            )
        if self.keys.dtype != self.values.dtype or self.keys.dtype not in CACHE_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES)
            raise InvalidCache(f"keys are {self.keys.dtype}, values {self.values.dtype}; expected one dtype of {names}")
        if self.positions is not None and (
            not isinstance(self.positions, Tensor) or self.positions.dtype not in (torch.int32, torch.int64)
        ):
            found = self.positions.dtype if isinstance(self.positions, Tensor) else type(self.positions).__name__
            raise InvalidCache(f"positions must be an int64 tensor [tokens]; got {found}")
        positions = self.resolved_positions()
        if positions.shape != (self.n_tokens,):
            raise InvalidCache(f"{self.n_tokens} tokens, but positions of shape {tuple(positions.shape)}")
        if self.n_tokens and (int(positions[0]) < 0 or int(positions[-1]) >= 2**31):
            raise InvalidCache(f"positions must lie in 0 .. 2**31 - 1; got {int(positions[0])} .. {int(positions[-1])}")
        if bool((positions[1:] <= positions[:-1]).any()):
            raise InvalidCache("positions must be strictly increasing")
        if self.rope_length is not None and not 0 <= self.rope_length < 2**31:
            raise InvalidCache(f"rope_length must lie in 0 .. 2**31 - 1; got {self.rope_length}")
        for name, tensor in (("keys", self.keys), ("values", self.values)) if is_finite else ():
            for layer in range(self.n_layers):
                if not bool(tensor[layer].float().isfinite().all()):
                    raise InvalidCache(f"{name} of layer {self.resolved_layers()[layer]} hold NaN or infinite values")
