"""Lossless coding of blocks on a CUDA device by NVIDIA nvCOMP (package nvidia-nvcomp-cu12 or -cu13), all of them in one batch.

Not part of any codec yet, and it has not run on a device: it was written against the documented Python interface (4.2 to 6.0) and
is tested on a stand-in of it. `deflate_blocks` and `inflate_blocks` do what `coding.lossless` does to the blocks of a section:
raw DEFLATE (RFC 1951), one stream a block, so that zlib reads what nvCOMP writes and the other way around.

What a codec would still need: blocks of all sections handed over at once, where `container.stream` codes section after section; and
a bound on what a block may decode to that holds before nvCOMP asks for memory, for raw DEFLATE does not say its length.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CorruptStream, MissingDependency

ALIGNMENT = 16
"""Of each block in device memory, in bytes; what nvCOMP asks for at most."""


class BlockCoder:
    """One algorithm of nvCOMP on blocks as they are, without headers of its own. For one thread, on the device's current stream.

    algorithm: "Deflate", "GDeflate", "Zstd", "ANS", ... options: what nvCOMP takes beside, such as algorithm_type=4 for a slower
    and closer DEFLATE. Raises `MissingDependency` where nvCOMP is not installed.
    """

    def __init__(self, algorithm: str, device: torch.device, **options: Any) -> None:
        self._nvcomp = require_nvcomp()
        self._device = device
        self._stream = _current_stream(device)
        self._codec = self._nvcomp.Codec(
            algorithm=algorithm,
            device_id=device.index or 0,
            cuda_stream=self._stream,
            bitstream_kind=self._nvcomp.BitstreamKind.RAW,
            **options,
        )

    def upload(self, blocks: Sequence[bytes]) -> Any:
        """Blocks, none of them empty, -> a batch on the device, by one copy."""
        places, size = [], 0
        for block in blocks:
            places.append(slice(size, size + len(block)))
            size += -(-len(block) // ALIGNMENT) * ALIGNMENT
        joined = torch.zeros(size, dtype=torch.uint8)
        for place, block in zip(places, blocks, strict=True):
            joined[place] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        there = joined.to(self._device)
        return self._nvcomp.as_arrays([there[place] for place in places], cuda_stream=self._stream)

    def encode(self, batch: Any) -> Any:
        """A batch of blocks -> a batch of coded ones, on the device."""
        return self._codec.encode(batch)

    def decode(self, batch: Any) -> Any:
        """Inverse of `encode`."""
        return self._codec.decode(batch)

    def download(self, batch: Iterable[Any]) -> list[bytes]:
        """A batch -> its blocks, by one copy."""
        arrays = list(batch)
        parts: list[Tensor] = [torch.utils.dlpack.from_dlpack(array).view(torch.uint8) for array in arrays]
        joined = torch.cat(parts).cpu().numpy().tobytes()
        blocks, first = [], 0
        for part in parts:
            blocks.append(joined[first : first + len(part)])
            first += len(part)
        return blocks


def require_nvcomp() -> Any:
    """The module nvidia.nvcomp, or `MissingDependency`."""
    try:
        return importlib.import_module("nvidia.nvcomp")
    except ImportError as error:
        raise MissingDependency(
            "lossless coding on a CUDA device needs nvCOMP; pip install nvidia-nvcomp-cu12 (or -cu13)"
        ) from error


def deflate_blocks(blocks: Sequence[bytes], device: torch.device) -> list[bytes]:
    """Blocks -> raw DEFLATE, a stream each."""
    if not blocks:
        return []
    coder = BlockCoder("Deflate", device)
    return coder.download(coder.encode(coder.upload(blocks)))


def inflate_blocks(blocks: Sequence[bytes], sizes: Sequence[int], device: torch.device) -> list[bytes]:
    """Inverse of `deflate_blocks`; sizes: bytes of each decoded block. Raises `CorruptStream` where they differ."""
    if not blocks:
        return []
    coder = BlockCoder("Deflate", device)
    try:
        decoded = coder.download(coder.decode(coder.upload(blocks)))
    except (RuntimeError, ValueError) as error:
        raise CorruptStream(f"a DEFLATE block does not decode: {error}") from error
    for index, (block, size) in enumerate(zip(decoded, sizes, strict=True)):
        if len(block) != size:
            raise CorruptStream(f"block {index} decodes to {len(block)} bytes, {size} expected")
    return decoded


def _current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)
