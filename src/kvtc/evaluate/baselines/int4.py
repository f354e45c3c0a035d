"""INT4: 4 bits a value with a scale and a zero point for each head and token, as serving engines
offer it.

Settings: asymmetric round to nearest; up to 64 consecutive features of a head and token share a
zero point and a scale of 16 bits each; keys and values alike, all tokens; keys keep their rotation.
The quantized cache of transformers uses groups of 64; LMDeploy has one group a head and token,
which is the same for heads of 64 features and coarser for heads of 128. Here the finer one is taken,
which favours the baseline's quality.

Differences: transformers keeps the last 128 tokens exactly, LMDeploy none; none is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .kivi import read_groups, write_groups
from .stream import BodyMethod, Header, Reader

BITS = 4


@dataclass(frozen=True, kw_only=True)
class Int4(BodyMethod):
    """INT4 with a scale and a zero point for each group of features.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.
        group_size: features of a head and token that share a zero point and a scale; default
            64.

    Example:
        >>> from kvtc.evaluate.baselines import Int4
        >>> method = Int4(group_size=32)
        >>> round(method.measure(method.encode(model, cache, token_ids)).body_ratio, 1)
        3.2
    """

    group_size: int = 64

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        return b"".join(write_groups(side.float(), self.group_size, BITS) for side in (keys, values))

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        keys, values = (read_groups(reader, shape, self.group_size, BITS) for shape in header.body_shapes)
        return keys, values
