"""NVFP4: every value in 4 bits (e2m1), with an 8-bit scale (e4m3) for each block of 16.

NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference" (2025). It is the
format of the 4-bit cache of TensorRT-LLM, whose cold pages are quantized to it, and of vLLM and
SGLang. Settings: blocks of 16 consecutive features of a head and token; one float32 scale for the
keys and one for the values of each layer, so that the largest value becomes 448 * 6, the largest
scale of a block times the largest e2m1 value; all tokens are coded; keys keep their rotation.

Differences: engines take the float32 scale from a calibration, here it is that of the cache itself,
which favours the baseline. A last block of fewer than 16 features has a scale of its own.
TensorRT-LLM can leave out a part of each key (`skip_rope_quantization`), which costs more bytes and
is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...coding.bitpack import pack, packed_bytes, unpack
from ...coding.float_formats import E4M3_MAX
from .stream import BodyMethod, Header, Reader, Shape, to_bytes

BLOCK = 16
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The values of e2m1 without sign, by their bit pattern."""
E2M1_MAX = 6.0
_SIGN = 8


@dataclass(frozen=True, kw_only=True)
class Nvfp4(BodyMethod):
    """NVFP4 (e2m1) with a scale for each block of 16 features, and one for each layer and kind.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.

    Example:
        >>> from kvtc.evaluate.baselines import Nvfp4
        >>> method = Nvfp4()
        >>> round(method.measure(method.encode(model, cache, token_ids)).body_ratio, 1)
        3.6
    """

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        return _encode(keys.float()) + _encode(values.float())

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        keys, values = (_decode(reader, shape) for shape in header.body_shapes)
        return keys, values


def e2m1_symbols(values: Tensor) -> Tensor:
    """float32 -> bit patterns 0 .. 15 (uint8) of the nearest e2m1 value; ties go to the even
    pattern, and what lies beyond 6 becomes 6.
    """
    magnitudes = values.abs()
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    # A tie between patterns n and n + 1 belongs to n where n is even.
    up, down = torch.bucketize(magnitudes, middles, right=True), torch.bucketize(magnitudes, middles)
    found = torch.where(up % 2 == 0, up, down)
    return (found + _SIGN * torch.signbit(values)).to(torch.uint8)


def e2m1_values(symbols: Tensor) -> Tensor:
    """Inverse of `e2m1_symbols`: float32."""
    magnitudes = MAGNITUDES[(symbols % _SIGN).long()]
    return torch.where(symbols < _SIGN, magnitudes, -magnitudes)


def _encode(side: Tensor) -> bytes:
    """[L, H, T, D] -> float32 scales [L], e4m3 scales [L, H, T, blocks], then packed symbols."""
    dim = side.shape[-1]
    blocks = pad(side, (0, -dim % BLOCK)).reshape(*side.shape[:-1], -1, BLOCK)
    tiny = torch.finfo(torch.float32).tiny
    scale = (side.abs().amax(dim=(1, 2, 3)) / (E4M3_MAX * E2M1_MAX)).clamp_min(tiny)
    of_layer = scale[:, None, None, None]
    block_scale = (blocks.abs().amax(dim=-1) / E2M1_MAX / of_layer).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    step = (block_scale.float() * of_layer)[..., None]
    # A block whose scale is 0 holds nothing but zeros.
    scaled = torch.where(step > 0, blocks / step.clamp_min(tiny), torch.zeros_like(blocks))
    symbols = e2m1_symbols(scaled).flatten(-2)[..., :dim]
    return to_bytes(scale, block_scale, pack(symbols, 4))


def _decode(reader: Reader, shape: Shape) -> Tensor:
    *leading, dim = shape
    scale = reader.take(shape[:1], torch.float32)
    block_scale = reader.take((*leading, -(-dim // BLOCK)), torch.float8_e4m3fn).float()
    n_symbols = torch.Size(shape).numel()
    symbols = unpack(reader.take((packed_bytes(n_symbols, 4),), torch.uint8), n_symbols, 4)
    steps = (block_scale * scale[:, None, None, None]).repeat_interleave(BLOCK, dim=-1)[..., :dim]
    return e2m1_values(symbols.reshape(shape)) * steps
