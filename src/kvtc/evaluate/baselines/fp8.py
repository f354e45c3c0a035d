"""FP8: every value as e4m3, what serving engines offer as an 8-bit cache.

Settings: one float32 scale for the keys and one for the values of each layer and head, so that the
largest value becomes 448; all tokens are coded. Engines differ in where the scale comes from (1,
one a layer, calibrated): here it is that of the cache itself, which favours the baseline.
Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .stream import BodyMethod, Header, Reader, Shape, to_bytes

E4M3_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class Fp8(BodyMethod):
    """FP8 (e4m3) with a scale for each layer, head and kind.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.

    Example:
        >>> from kvtc.evaluate.baselines import Fp8
        >>> method = Fp8()
        >>> round(method.measure(method.encode(model, cache, token_ids)).body_ratio, 1)
        2.0
    """

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        return _encode(keys.float()) + _encode(values.float())

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        keys, values = (_decode(reader, shape) for shape in header.body_shapes)
        return keys, values


def _encode(side: Tensor) -> bytes:
    """[L, H, T, D] -> scales [L, H] float32, then the symbols."""
    scale = (side.abs().amax(dim=(2, 3)) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    symbols = (side / scale[:, :, None, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return to_bytes(scale, symbols)


def _decode(reader: Reader, shape: Shape) -> Tensor:
    scale = reader.take(shape[:2], torch.float32)
    return reader.take(shape, torch.float8_e4m3fn).float() * scale[:, :, None, None]
