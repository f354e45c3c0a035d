"""Placing on a GPU: rows of one layer, as the inverse transform leaves them, into a cache or an engine's pages in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...coding.rope import Turn
from ...errors import InvalidArgument
from ..interface import Target
from .place_kernels import place_rows

_TOKENS = 16
# What the kernel rounds itself: the integers it is stored as, bits of mantissa, bias of the exponent.
_ROUNDED = {
    torch.bfloat16: (torch.uint16, 7, 127),
    torch.float8_e4m3fn: (torch.uint8, 3, 7),
    torch.float8_e5m2: (torch.uint8, 2, 15),
}


def place(keys: Tensor, values: Tensor, turn: Turn | None, targets: tuple[Target, Target]) -> None:
    """Rows [T, H, D] of keys before rotation and of values, float32 or of 16 bits -> turned, saturated, written where targets say.

    Places outside of a target's data are not written.
    """
    n_tokens, n_heads, n_features = keys.shape
    value_features = values.shape[2]
    dtype = targets[0].data.dtype
    if keys.shape[:2] != values.shape[:2] or targets[1].data.dtype != dtype:
        raise InvalidArgument(
            f"keys {tuple(keys.shape)} to {dtype} and values {tuple(values.shape)} to {targets[1].data.dtype}; expected the same"
        )
    if any(target.token_offsets.shape != (n_tokens,) for target in targets):
        raise InvalidArgument(f"a target has places for other than the {n_tokens} tokens of the rows")
    if not n_tokens:
        return
    # Nothing is read of these where there is no rotation.
    cos, sin = (turn.cos.contiguous(), turn.sin.contiguous()) if turn is not None else (keys, keys)
    n_pairs = cos.shape[1] if turn is not None else 0
    if 2 * n_pairs > n_features:
        raise InvalidArgument(f"{n_pairs} pairs of features are turned; a head has {n_features} features")
    keys, values = (side if side.stride(2) == 1 else side.contiguous() for side in (keys, values))
    stored, mantissa, bias = _ROUNDED.get(dtype, (dtype, 0, 0))
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        place_rows[(-(-n_tokens // _TOKENS), n_heads, 2)](
            keys, keys.stride(0), keys.stride(1), cos, sin, cos.stride(0), n_pairs,
            values, values.stride(0), values.stride(1),
            *_arguments(targets[0], stored), *_arguments(targets[1], stored),
            n_tokens, n_features, value_features,
            TURNED=turn is not None,
            INTERLEAVED=turn is not None and turn.interleaved,
            LIMIT=torch.finfo(dtype).max,
            MANTISSA=mantissa,
            BIAS=bias,
            TOKENS=_TOKENS,
            FEATURES=1 << (max(n_features, value_features) - 1).bit_length(),
            num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def _arguments(target: Target, stored: torch.dtype) -> tuple[Tensor, int, Tensor, int, int]:
    data = target.data.view(stored)
    return data, data.numel(), target.token_offsets.contiguous(), target.head_stride, target.feature_stride
