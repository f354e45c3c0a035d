"""Gathering on a GPU: a cache to the joint rows that the transform takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...coding.rope import Turn
from ...errors import InvalidArgument
from .gather_kernels import gather_rows

_TOKENS = 16
_FP8_MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


@dataclass(frozen=True, eq=False)
class _Turns:
    """Rotations of layers as the kernel takes them."""

    cos: Tensor
    sin: Tensor
    fields: Tensor

    @classmethod
    def of(cls, turns: Sequence[Turn | None], n_tokens: int, n_features: int, device: torch.device) -> _Turns:
        """turns: of each layer; those that layers share are taken once."""
        distinct = list({id(turn): turn for turn in turns if turn is not None}.values())
        for turn in distinct:
            if len(turn.cos) != n_tokens or 2 * turn.cos.shape[1] > n_features:
                raise InvalidArgument(
                    f"a rotation of {turn.cos.shape[1]} pairs at {len(turn.cos)} positions; "
                    f"expected {n_tokens} positions and at most {n_features // 2} pairs"
                )
        begins = np.cumsum([0, *(turn.cos.numel() for turn in distinct)]).tolist()
        place = {id(turn): begin for turn, begin in zip(distinct, begins, strict=False)}
        fields = [
            (0, 0, 0) if turn is None else (place[id(turn)], turn.cos.shape[1], int(turn.interleaved)) for turn in turns
        ]
        nothing = torch.zeros(1, dtype=torch.float32, device=device)
        cos, sin = (
            torch.cat([nothing[:0], *(side.reshape(-1) for side in sides)]) if distinct else nothing
            for sides in ([turn.cos for turn in distinct], [turn.sin for turn in distinct])
        )
        return cls(cos, sin, torch.tensor(fields, dtype=torch.int64).to(device))


def gather(keys: Tensor, values: Tensor, turns: Sequence[Turn | None]) -> Tensor:
    """Keys and values [L, H, n, D] of any strides, as cached -> joint rows [n, P] float32, keys first, turned back."""
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype or len(turns) != len(keys):
        raise InvalidArgument(
            f"keys {keys.dtype} {tuple(keys.shape)}, values {values.dtype} {tuple(values.shape)} and {len(turns)} rotations; "
            "expected the same of both but for features, and a rotation a layer"
        )
    n_layers, n_heads, n_tokens, key_features = keys.shape
    n_features = n_layers * n_heads * (key_features + values.shape[3])
    rows = torch.empty(n_tokens, n_features, dtype=torch.float32, device=keys.device)
    if rows.numel():
        _launch(keys, values, _Turns.of(turns, n_tokens, key_features, keys.device), rows)
    return rows


def _stored(data: Tensor) -> Tensor:
    """fp8 as bytes: the kernel reads them itself."""
    return data.view(torch.uint8) if data.dtype in _FP8_MANTISSA else data


def _launch(keys: Tensor, values: Tensor, turns: _Turns, rows: Tensor) -> None:
    n_layers, n_heads, n_tokens, key_features = keys.shape
    widest = max(key_features, values.shape[3])
    sides = []
    for side in (keys, values):
        layers, heads, tokens, features = side.stride()
        sides += [_stored(side), tokens, layers, heads, features]
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        gather_rows[(-(-n_tokens // _TOKENS), n_layers * n_heads, 2)](
            *sides,
            turns.cos, turns.sin, turns.fields, rows, rows.stride(0), n_layers * n_heads * key_features,
            n_tokens, n_heads, key_features, values.shape[3],
            MANTISSA=_FP8_MANTISSA.get(keys.dtype, 0),
            TOKENS=_TOKENS,
            FEATURES=1 << (widest - 1).bit_length(),
            num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
