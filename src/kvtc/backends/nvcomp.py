"""nvCOMP for the lossless stage: DEFLATE blocks on a CUDA device, as zlib reads and writes them.

Written after the Python interface of nvCOMP 6.0; it has not run on a device yet. `check` compares it with zlib on one.

By default it codes streams and does not decode them: nvCOMP says of its decoder that corrupt data leads to undefined behaviour,
accesses out of bounds included, and streams may come from anywhere. Where all of them are one's own, it decodes as well:

    codec.backend.block_coder = NvcompBlockCoder(device, trusts_streams=True)

Then what a block decodes to is checked by its length, but no device says where in a block its DEFLATE stream ended.

zstd stays the host's: its frames here do not name their size, which nvCOMP asks for, and are smaller. GDeflate, Zstd and ANS are
there to be compared (`Algorithm`); no stream holds them.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..coding.lossless import BLOCK_BYTES, compress, compress_all, decompress, decompress_all
from ..errors import BackendUnavailable, CorruptStream, InvalidArgument

ALGORITHMS = ("Deflate", "GDeflate", "Zstd", "ANS")
_ALGORITHM_TYPE = 4
"""Of Deflate and GDeflate, 0 .. 5: the fastest that its makers put ahead of level 6 of zlib, the host's, by ratio."""
_ALIGNMENT = 16
"""What nvCOMP advises for blocks in one buffer; no algorithm asks for more."""
_BATCH_BLOCKS = 4096
"""At most 256 MiB of raw bytes are on the device at once."""
_LEAST_BYTES = 1 << 20
"""From how many raw bytes the way to the device and back is taken; a guess, not measured yet."""
_MOST_EXPANSION = 1032
"""A DEFLATE stream spends at least two bits on at most 258 bytes."""


def obstacle(device: torch.device) -> str | None:
    """Why nvCOMP cannot be used on a device; None where it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device; this one is of type {device.type}"
    try:
        version = _version(_module())
    except ModuleNotFoundError:
        return 'it is not installed (pip install "kvtc[nvcomp]")'
    except (ImportError, OSError) as error:
        return f"it cannot be loaded: {error}"
    if version < 6:
        return f"version 6 is needed; version {version} is installed"
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def check(device: torch.device) -> None:
    """Raise `BackendUnavailable` unless nvCOMP and zlib read one another's blocks on a device."""
    reason = obstacle(device)
    if reason is not None:
        raise BackendUnavailable(f"nvCOMP cannot be used on {device}: {reason}")
    raw = bytes(BLOCK_BYTES) + np.random.default_rng(0).integers(0, 16, 2 * BLOCK_BYTES + 7, np.uint8).tobytes()
    coder = NvcompBlockCoder(device, trusts_streams=True)
    (coded,) = compress_all([raw], "deflate", coder)
    try:
        is_same = decompress(coded, len(raw), "deflate") == raw
        is_same &= decompress_all([(compress(raw, "deflate"), len(raw))], "deflate", coder) == [raw]
    except CorruptStream as error:
        raise BackendUnavailable(f"nvCOMP on {device} and zlib do not read one another's blocks: {error}") from error
    if not is_same:
        raise BackendUnavailable(f"nvCOMP on {device} and zlib decode a block to different bytes")


class Algorithm:
    """One of `ALGORITHMS` on a device, over blocks of at most 64 KiB, without a header of nvCOMP's.

    options: of `nvidia.nvcomp.Codec` for that algorithm. Safe to share between threads.
    """

    def __init__(self, device: torch.device, name: str, **options: Any) -> None:
        if name not in ALGORITHMS:
            raise InvalidArgument(f"algorithm {name!r} is unknown; expected one of {', '.join(ALGORITHMS)}")
        self.device = device
        self.name = name
        self.options = options
        self._local = threading.local()

    def compress(self, blocks: Sequence[bytes]) -> list[bytes]:
        """Each block, coded by itself."""
        batches = range(0, len(blocks), _BATCH_BLOCKS)
        return [coded for first in batches for coded in self._compress(blocks[first : first + _BATCH_BLOCKS])]

    def decompress(self, blocks: Sequence[bytes], sizes: Sequence[int]) -> list[bytes]:
        """Blocks that `compress` made of so many bytes; `CorruptStream` where nvCOMP fails or another length comes out.

        Of blocks that are corrupt nvCOMP promises nothing, not even that.
        """
        decoded = []
        for first in range(0, len(blocks), _BATCH_BLOCKS):
            here = slice(first, first + _BATCH_BLOCKS)
            decoded += self._decompress(blocks[here], sizes[here])
        return decoded

    def _compress(self, blocks: Sequence[bytes]) -> list[bytes]:
        codec, stream = self._own()
        with torch.cuda.stream(stream):
            source = self._upload(blocks, stream)
            largest = max(range(len(blocks)), key=lambda index: len(blocks[index]))
            room = codec.get_max_comp_buffer_size(source[largest])
            target, offsets = self._room([room] * len(blocks))
            out = _carve(target, offsets, [room] * len(blocks), stream)
            coded = codec.encode(source, out=out)
            return _download(target, offsets, coded.buffer_sizes)

    def _decompress(self, blocks: Sequence[bytes], sizes: Sequence[int]) -> list[bytes]:
        codec, stream = self._own()
        with torch.cuda.stream(stream):
            source = self._upload(blocks, stream)
            target, offsets = self._room(sizes)
            # Whatever a block claims: it is decoded into its place or not at all.
            out = _carve(target, offsets, sizes, stream)
            try:
                found = list(codec.decode(source, out=out).buffer_sizes)
            except (RuntimeError, ValueError) as error:
                raise CorruptStream(f"nvCOMP does not decode a {self.name} block: {error}") from error
            for index, (size, expected) in enumerate(zip(found, sizes, strict=True)):
                if size != expected:
                    raise CorruptStream(f"block {index} decodes to {size} bytes, {expected} expected")
            return _download(target, offsets, sizes)

    def _own(self) -> tuple[Any, Any]:
        """Codec and CUDA stream of this thread; nvCOMP shares no codec between threads."""
        if not hasattr(self._local, "codec"):
            nvcomp, place, stream = _module(), {}, None
            if self.device.type == "cuda":
                stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                index = self.device.index
                device_id = torch.cuda.current_device() if index is None else index
                place = {"device_id": device_id, "cuda_stream": stream.cuda_stream}
            raw = nvcomp.BitstreamKind.RAW
            self._local.codec = nvcomp.Codec(algorithm=self.name, bitstream_kind=raw, **place, **self.options)
            self._local.stream = stream
        return self._local.codec, self._local.stream

    def _upload(self, blocks: Sequence[bytes], stream: Any) -> Any:
        padded = bytearray().join(block + bytes(-len(block) % _ALIGNMENT) for block in blocks)
        sizes = [len(block) for block in blocks]
        return _carve(torch.frombuffer(padded, dtype=torch.uint8).to(self.device), _offsets(sizes)[:-1], sizes, stream)

    def _room(self, sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
        """A buffer on the device with room for so many bytes at each of the offsets."""
        *offsets, n_bytes = _offsets(sizes)
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device), offsets


class NvcompBlockCoder:
    """The DEFLATE blocks of streams on a CUDA device (`BlockCoder`).

    trusts_streams: decode as well, which only streams of one's own may be. least_bytes: fewer are left to the host.
    """

    def __init__(self, device: torch.device, trusts_streams: bool = False, least_bytes: int = _LEAST_BYTES) -> None:
        self.trusts_streams = trusts_streams
        self._least_bytes = least_bytes
        self._deflate = Algorithm(device, "Deflate", algorithm_type=_ALGORITHM_TYPE)

    def writes(self, coder: str, n_bytes: int) -> bool:
        return coder == "deflate" and n_bytes >= self._least_bytes

    def reads(self, coder: str, n_bytes: int) -> bool:
        return self.trusts_streams and self.writes(coder, n_bytes)

    def compress_blocks(self, blocks: Sequence[bytes], coder: str) -> list[bytes]:
        _require_deflate(coder)
        return self._deflate.compress(blocks)

    def decompress_blocks(self, blocks: Sequence[bytes], sizes: Sequence[int], coder: str) -> list[bytes]:
        _require_deflate(coder)
        for index, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            # Before memory is asked for: a claim must be within what its bytes can decode to.
            if size > _MOST_EXPANSION * len(block):
                raise CorruptStream(f"block {index} has {len(block)} bytes, too few for the {size} expected")
        return self._deflate.decompress(blocks, sizes)


def _require_deflate(coder: str) -> None:
    if coder != "deflate":
        raise InvalidArgument(f"nvCOMP codes deflate in streams, not {coder}")


def _module() -> Any:
    return importlib.import_module("nvidia.nvcomp")


def _version(nvcomp: Any) -> int:
    return int(nvcomp.__version__.split(".")[0])


def _carve(buffer: Tensor, offsets: Sequence[int], sizes: Sequence[int], stream: Any) -> Any:
    """Parts of a buffer as a batch of nvCOMP's, ordered after what the stream does with it."""
    cuda_stream = 0 if stream is None else stream.cuda_stream
    return _module().as_arrays(buffer, list(offsets), list(sizes), cuda_stream=cuda_stream)


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where blocks start in one buffer, and where it ends."""
    return list(accumulate((size + -size % _ALIGNMENT for size in sizes), initial=0))


def _download(buffer: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    parts = [buffer[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    data = torch.cat(parts).cpu().numpy().tobytes()
    stops = accumulate(sizes)
    return [data[stop - size : stop] for stop, size in zip(stops, sizes, strict=True)]
