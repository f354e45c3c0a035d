"""Rotary position embedding on cached keys: remove it before the transform, apply it after.

A rotated key hides the redundancy between positions, so keys are coded as they were before rotation (paper, section 1.1).
Rotation is orthogonal up to one scalar, so removing it costs nothing: for a pair (a, b) at position t and frequency w,

    rotated   = s * (a cos tw - b sin tw,  a sin tw + b cos tw)
    unrotated = (a' cos tw + b' sin tw,  b' cos tw - a' sin tw) / s

Pairs are either halves of the rotated part (`half-split`: feature i with i + n/2) or neighbours (`interleaved`: 2i with 2i + 1).
Features past the rotated part are left alone (partial rotation), and a layer may have no rotation at all (NoPE).
Frequencies may depend on the length of the sequence the model saw (`dynamic`, `longrope`); that length travels with the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import strict_json
from ..errors import InvalidArgument
from .threads import in_threads

NO_ROTATION = -1
LARGEST_FREQUENCY = 2.0**20
LARGEST_SCALING = 2.0**20
LARGEST_LENGTH = 1 << 31
_TURN_OPERATIONS = 64
"""Of one number, about, as `in_threads` counts them."""


@dataclass(frozen=True)
class DynamicScaling:
    """NTK scaling that grows with the sequence: `base * (factor * n / max_length - (factor - 1)) ** (d / (d - 2))`."""

    base: float
    factor: float
    max_length: int

    def __post_init__(self) -> None:
        if not (1 <= self.base < math.inf and 0 < self.factor <= LARGEST_SCALING):
            raise InvalidArgument(
                f"dynamic scaling by a factor of {self.factor} on a base of {self.base}: expected a base of at least 1, and a "
                f"factor above 0 and at most {LARGEST_SCALING:g}"
            )
        if not 1 <= self.max_length <= LARGEST_LENGTH:
            raise InvalidArgument(f"a max_length of {self.max_length}; expected 1 .. {LARGEST_LENGTH}")


@dataclass(frozen=True)
class LongScaling:
    """A second set of frequencies for sequences longer than `original_length` tokens (longrope)."""

    inverse_frequencies: tuple[float, ...]
    original_length: int

    def __post_init__(self) -> None:
        _check_frequencies(self.inverse_frequencies)
        if not 0 <= self.original_length <= LARGEST_LENGTH:
            raise InvalidArgument(f"an original_length of {self.original_length}; expected 0 .. {LARGEST_LENGTH}")


@dataclass(frozen=True)
class RopeTable:
    """One rotation: inverse frequencies (float32 values, one per pair), the factor on cos and sin, and how pairs are laid out."""

    inverse_frequencies: tuple[float, ...]
    attention_scaling: float = 1.0
    interleaved: bool = False
    scaling: DynamicScaling | LongScaling | None = None

    def __post_init__(self) -> None:
        _check_frequencies(self.inverse_frequencies)
        if not 1 / LARGEST_SCALING <= self.attention_scaling <= LARGEST_SCALING:
            raise InvalidArgument(
                f"cosines and sines times {self.attention_scaling}; expected {1 / LARGEST_SCALING:g} .. {LARGEST_SCALING:g}"
            )
        if isinstance(self.scaling, DynamicScaling) and self.rotated_dim < 4:
            raise InvalidArgument(f"dynamic scaling of {self.rotated_dim} rotated features; expected 4 or more")
        if isinstance(self.scaling, LongScaling):
            n_long = len(self.scaling.inverse_frequencies)
            if n_long != len(self.inverse_frequencies):
                raise InvalidArgument(f"{len(self.inverse_frequencies)} frequencies, but {n_long} for long sequences")

    @property
    def rotated_dim(self) -> int:
        """Features of a head that are rotated."""
        return 2 * len(self.inverse_frequencies)

    def frequencies(self, length: int) -> Tensor:
        """Inverse frequencies the model uses for a sequence of `length` tokens: [rotated_dim / 2] float32."""
        scaling = self.scaling
        if isinstance(scaling, LongScaling) and length > scaling.original_length:
            return torch.tensor(scaling.inverse_frequencies, dtype=torch.float32)
        if isinstance(scaling, DynamicScaling) and length > scaling.max_length:
            dim = self.rotated_dim
            # Rounded to float32 where the model rounds, for one unit in the last place shows at large positions; powers are taken
            # in float64, where a library's last digit has no say.
            growth = _float32(_float32(_float32(scaling.factor * length) / scaling.max_length) - (scaling.factor - 1))
            base = _float32(scaling.base * _float32(growth ** (dim / (dim - 2))))
            powers = torch.tensor(
                [base ** _float32(feature / dim) for feature in range(0, dim, 2)], dtype=torch.float32
            )
            return 1.0 / powers
        return torch.tensor(self.inverse_frequencies, dtype=torch.float32)

    def cos_sin(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Unscaled cosines and sines at `positions` [T]: two float32 tensors [T, rotated_dim / 2]."""
        # One float32 product per angle, as the models themselves compute it: the same rounding at large positions.
        angles = positions.to(torch.float32)[:, None] * self.frequencies(length).to(positions.device)[None, :]
        if angles.device.type != "cpu":
            return angles.cos(), angles.sin()
        from .rope_kernels import turn_angles

        cosines, sines = torch.empty_like(angles), torch.empty_like(angles)
        turn_angles(angles.view(-1).numpy(), cosines.view(-1).numpy(), sines.view(-1).numpy())
        return cosines, sines

    def turn(self, positions: Tensor, length: int, inverse: bool) -> Turn:
        """The rotation at `positions` [T], on their device."""
        cos, sin = self.cos_sin(positions, length)
        if inverse:
            return Turn(cos / self.attention_scaling, -sin / self.attention_scaling, self.interleaved)
        return Turn(cos * self.attention_scaling, sin * self.attention_scaling, self.interleaved)


@dataclass(frozen=True, eq=False)
class Turn:
    """One rotation at the positions of some tokens, or its inverse: cos and sin [T, m] float32, their factor in them.

    Pairs are (i, i + m), or (2 i, 2 i + 1) where interleaved; features from 2 m on stay as they are.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def part(self, tokens: slice) -> Turn:
        """Of some of the tokens."""
        return Turn(self.cos[tokens], self.sin[tokens], self.interleaved)


@dataclass(frozen=True)
class Rope:
    """The rotations of a model: the distinct tables, and for each layer the index of its table (`NO_ROTATION`: none).

    is_known: false where nobody could tell how the model rotates keys; they are then coded as they are cached, without tables.
    """

    tables: tuple[RopeTable, ...]
    layer_tables: tuple[int, ...]
    is_known: bool = True

    def __post_init__(self) -> None:
        if self.tables and not self.is_known:
            raise InvalidArgument(f"a rotation that is not known has {len(self.tables)} tables; expected none")
        for layer, index in enumerate(self.layer_tables):
            if not NO_ROTATION <= index < len(self.tables):
                raise InvalidArgument(f"layer {layer} names rotation table {index}; there are {len(self.tables)}")

    @property
    def depends_on_length(self) -> bool:
        """Whether any frequency changes with the length of the sequence."""
        return any(table.scaling is not None for table in self.tables)

    def of_layers(self, layers: Iterable[int]) -> Rope:
        """The rotations of some of the layers alone, in their order."""
        chosen = [self.layer_tables[layer] for layer in layers]
        used = sorted({table for table in chosen if table != NO_ROTATION})
        tables = tuple(self.tables[table] for table in used)
        indexes = tuple(NO_ROTATION if table == NO_ROTATION else used.index(table) for table in chosen)
        return Rope(tables, indexes, self.is_known)

    def unrotate(self, keys: Tensor, positions: Tensor, length: int) -> Tensor:
        """Keys [L, H, T, D] as cached -> float32 [L, H, T, D] as before rotation; `positions` [T], `length` the sequence's."""
        return self._turn(keys, positions, length, inverse=True)

    def rotate(self, keys: Tensor, positions: Tensor, length: int) -> Tensor:
        """Keys [L, H, T, D] before rotation -> float32 [L, H, T, D] as the model caches them at `positions`."""
        return self._turn(keys, positions, length, inverse=False)

    def turns(self, positions: Tensor, length: int, inverse: bool = False) -> list[Turn | None]:
        """The rotation of each layer at `positions` [T], on their device; None where there is none. Layers share them."""
        made = [table.turn(positions, length, inverse) for table in self.tables]
        return [None if index == NO_ROTATION else made[index] for index in self.layer_tables]

    def _turn(self, keys: Tensor, positions: Tensor, length: int, inverse: bool) -> Tensor:
        if keys.shape[0] != len(self.layer_tables):
            raise InvalidArgument(f"keys have {keys.shape[0]} layers, the rotation describes {len(self.layer_tables)}")
        turned = keys.to(torch.float32, copy=True)
        for layer, turn in zip(turned, self.turns(positions.to(keys.device), length, inverse), strict=True):
            if turn is not None:
                turn_in_place(layer, turn)
        return turned

    def turn_layer(self, layer: int, keys: Tensor, positions: Tensor, length: int, inverse: bool = False) -> Tensor:
        """Rotate the keys [H, T, D] of one layer, or un-rotate them; for work layer by layer."""
        turned = keys.to(torch.float32, copy=True)
        index = self.layer_tables[layer]
        if index != NO_ROTATION:
            turn_in_place(turned, self.tables[index].turn(positions.to(keys.device), length, inverse))
        return turned

    def to_json(self) -> dict[str, Any]:
        """Plain values for the calibration file; float32 frequencies survive exactly as JSON doubles."""
        return {
            "layer_tables": list(self.layer_tables),
            "tables": [_table_to_json(table) for table in self.tables],
        } | ({} if self.is_known else {"is_known": False})

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Rope:
        """Inverse of `to_json`; KeyError, ValueError or `InvalidArgument` for anything else."""
        tables = tuple(_table_from_json(table) for table in strict_json.items(fields["tables"], "tables"))
        layers = strict_json.items(fields["layer_tables"], "layer_tables")
        indexes = tuple(strict_json.whole(i, "layer_tables", NO_ROTATION, len(tables)) for i in layers)
        if fields.get("is_known", False) is not False:
            raise InvalidArgument("is_known is there where it is false alone")
        return cls(tables, indexes, "is_known" not in fields)


def turn_in_place(keys: Tensor, turn: Turn) -> None:
    """Turn keys [H, T, D] in place."""
    n_pairs = turn.cos.shape[1]
    if turn.interleaved:
        first, second = keys[..., 0 : 2 * n_pairs : 2], keys[..., 1 : 2 * n_pairs : 2]
    else:
        first, second = keys[..., :n_pairs], keys[..., n_pairs : 2 * n_pairs]
    turned_first = first * turn.cos - second * turn.sin
    turned_second = second * turn.cos + first * turn.sin
    first.copy_(turned_first)
    second.copy_(turned_second)


def turn_to_bfloat16(rows: Tensor, turn: Turn | None, there: Tensor, data: Tensor) -> None:
    """Rows [T, H, D] on the CPU, turned and saturated -> `there`, bfloat16 [H, T, D], in one pass over them.

    Features of a head lie side by side there. data: all of the memory that it is in.
    """
    from . import rope_kernels

    none = torch.empty(len(rows), 0, dtype=torch.float32, device="cpu")
    turn = turn or Turn(none, none, interleaved=False)
    rows = rows.float() if rows.stride(2) == 1 else rows.float().contiguous()
    operands = (
        rows.as_strided((rows.untyped_storage().nbytes() // rows.element_size(),), (1,), 0).numpy(),
        (rows.storage_offset(), rows.stride(0), rows.stride(1)),
        (turn.cos.numpy(), turn.sin.numpy(), turn.interleaved),
        np.float32(torch.finfo(torch.bfloat16).max),
        data.detach().view(torch.int16).numpy().view(np.uint16),
        (there.storage_offset(), there.stride(1), there.stride(0)),
        (rows.shape[1], rows.shape[2]),
    )
    in_threads(
        lambda *tokens: rope_kernels.turn_to_bfloat16(*operands, *tokens), len(rows), _TURN_OPERATIONS * rows.numel()
    )


def _float32(value: float) -> float:
    return float(np.float32(value))


def _table_to_json(table: RopeTable) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "inverse_frequencies": list(table.inverse_frequencies),
        "attention_scaling": table.attention_scaling,
        "interleaved": table.interleaved,
    }
    if isinstance(table.scaling, DynamicScaling):
        fields["dynamic"] = vars(table.scaling)
    elif isinstance(table.scaling, LongScaling):
        fields["long"] = {
            "inverse_frequencies": list(table.scaling.inverse_frequencies),
            "original_length": table.scaling.original_length,
        }
    return fields


def _table_from_json(value: Any) -> RopeTable:
    fields = strict_json.fields(value, "a rotation table")
    scaling: DynamicScaling | LongScaling | None = None
    if "dynamic" in fields:
        dynamic = strict_json.fields(fields["dynamic"], "dynamic")
        length = strict_json.whole(dynamic["max_length"], "max_length", 1, LARGEST_LENGTH)
        scaling = DynamicScaling(_number(dynamic, "base"), _number(dynamic, "factor"), length)
    elif "long" in fields:
        long = strict_json.fields(fields["long"], "long")
        length = strict_json.whole(long["original_length"], "original_length", 0, LARGEST_LENGTH)
        scaling = LongScaling(_frequencies(long), length)
    if not isinstance(fields["interleaved"], bool):
        raise InvalidArgument("interleaved must be true or false")
    return RopeTable(_frequencies(fields), _number(fields, "attention_scaling"), fields["interleaved"], scaling)


def _number(fields: dict[str, Any], name: str) -> float:
    return strict_json.number(fields[name], name, -math.inf, math.inf)


def _frequencies(fields: dict[str, Any]) -> tuple[float, ...]:
    name = "inverse_frequencies"
    found = strict_json.items(fields[name], name)
    return tuple(strict_json.number(value, name, -LARGEST_FREQUENCY, LARGEST_FREQUENCY) for value in found)


def _check_frequencies(values: tuple[float, ...]) -> None:
    if not all(abs(value) <= LARGEST_FREQUENCY for value in values):
        raise InvalidArgument(f"an inverse frequency is not finite, or larger than {LARGEST_FREQUENCY:g}")
