"""Lossless coders over blocks of 64 KiB, so that blocks of a section decode in parallel, on a CPU or a GPU.

Coded bytes: one uint32 (little-endian) of stored length per block, then the blocks. `none` stores the bytes as they are.
DEFLATE is raw (RFC 1951), one stream a block, as GPU decoders take it. An id names a format, not a program.
"""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from ..errors import CorruptStream, InvalidArgument, MissingDependency

BLOCK_BYTES = 1 << 16
CODER_IDS = {"none": 0, "deflate": 1, "zstd": 2, "lz4": 3}
FLOATS = "floats"
"""The coder of few exact tokens (`coding.exact.floats`), which is not one of blocks."""
CHANNELS = "channels"
"""The coder of many (`coding.exact.channels`), which is not either."""
ROUNDED = "rounded"
"""The coder of recurrent states (`coding.states.rounding`), which is not lossless."""
PROFILE = "profile"
"""The coder of rows that a profile codes of another group than the first, which is not lossless either."""
CODER_NAMES = {number: name for name, number in CODER_IDS.items()} | {4: FLOATS, 5: ROUNDED, 6: CHANNELS, 7: PROFILE}
LOSSLESS_NUMBERS = tuple(number for number, name in CODER_NAMES.items() if name not in (ROUNDED, PROFILE))
_DEFLATE_LEVEL = 6
_ZSTD_LEVEL = 19


class BlockCoder(Protocol):
    """Codes the blocks of many sections in one call, on a device; what it does not take is coded here.

    Safe to share between threads.
    coder: of `CODER_IDS`; n_bytes: before coding.
    """

    def writes(self, coder: str, n_bytes: int) -> bool:
        """Whether it is to code so many bytes."""
        ...

    def reads(self, coder: str, n_bytes: int) -> bool:
        """Whether it is to decode them."""
        ...

    def compress_blocks(self, blocks: Sequence[bytes], coder: str) -> list[bytes]:
        """Each block, of 1 .. BLOCK_BYTES bytes, as docs/format.md has it."""
        ...

    def decompress_blocks(self, blocks: Sequence[bytes], sizes: Sequence[int], coder: str) -> list[bytes]:
        """Blocks of exactly these sizes, or `CorruptStream`."""
        ...


def require_coder(name: str) -> None:
    """Raise `InvalidArgument` for an unknown coder and `MissingDependency` where its package is absent."""
    if name not in CODER_IDS:
        raise InvalidArgument(f"coder {name!r} is unknown; expected one of {', '.join(CODER_IDS)}")
    if name == "zstd":
        _optional("zstandard")
    elif name == "lz4":
        _optional("lz4.block")


def compress(data: bytes, coder: str) -> bytes:
    """Code `data` block by block; the result of `none` is `data` itself."""
    if coder == "none":
        return data
    return _joined([_compress_block(block, coder) for block in _cut(data)])


def compress_all(parts: Sequence[bytes], coder: str, block_coder: BlockCoder) -> list[bytes]:
    """`compress` of each part, the blocks of all of them in one call of a block coder."""
    cut = [_cut(part) for part in parts]
    coded = iter(block_coder.compress_blocks([block for blocks in cut for block in blocks], coder))
    return [_joined([next(coded) for _ in blocks]) for blocks in cut]


def decompress(stored: bytes | memoryview, raw_bytes: int, coder: str) -> bytes:
    """Decode to exactly `raw_bytes` bytes, or raise `CorruptStream`.

    Memory grows with what is really decoded, one block at a time; a claimed length alone allocates nothing.
    """
    if coder == "none":
        if len(stored) != raw_bytes:
            raise CorruptStream(f"{raw_bytes} bytes expected, {len(stored)} stored without a coder")
        return bytes(stored)
    parts = []
    for index, (block, expected) in enumerate(zip(*_split(stored, raw_bytes), strict=True)):
        part = _decompress_block(block, expected, coder)
        if len(part) != expected:
            raise CorruptStream(f"block {index} decodes to {len(part)} bytes, {expected} expected")
        parts.append(part)
    return b"".join(parts)


def decompress_all(parts: Sequence[tuple[bytes | memoryview, int]], coder: str, block_coder: BlockCoder) -> list[bytes]:
    """`decompress` of parts (stored, raw bytes), the blocks of all of them in one call of a block coder."""
    split = [_split(stored, raw_bytes) for stored, raw_bytes in parts]
    blocks, sizes = [block for part in split for block in part[0]], [size for part in split for size in part[1]]
    decoded = iter(block_coder.decompress_blocks(blocks, sizes, coder))
    return [b"".join([next(decoded) for _ in part[0]]) for part in split]


def _cut(data: bytes) -> list[bytes]:
    return [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]


def _joined(blocks: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(blocks)}I", *map(len, blocks)) + b"".join(blocks)


def _split(stored: bytes | memoryview, raw_bytes: int) -> tuple[list[bytes], list[int]]:
    """The coded blocks of a section, and what each decodes to."""
    n_blocks = -(-raw_bytes // BLOCK_BYTES)
    if 4 * n_blocks > len(stored):
        raise CorruptStream(f"{n_blocks} coded blocks are claimed in {len(stored)} bytes")
    lengths = struct.unpack_from(f"<{n_blocks}I", stored)
    if 4 * n_blocks + sum(lengths) != len(stored):
        raise CorruptStream(f"coded blocks of {sum(lengths)} bytes in a section of {len(stored)}")
    stops = list(accumulate(lengths, initial=4 * n_blocks))
    blocks = [bytes(stored[start:stop]) for start, stop in pairwise(stops)]
    return blocks, [min(BLOCK_BYTES, raw_bytes - start) for start in range(0, raw_bytes, BLOCK_BYTES)]


def _compress_block(block: bytes, coder: str) -> bytes:
    if coder == "deflate":
        deflate = zlib.compressobj(_DEFLATE_LEVEL, zlib.DEFLATED, -15)
        return deflate.compress(block) + deflate.flush()
    if coder == "zstd":
        return bytes(_optional("zstandard").ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=False).compress(block))
    return bytes(_optional("lz4.block").compress(block, mode="high_compression", store_size=False))


def _decompress_block(block: bytes, expected: int, coder: str) -> bytes:
    if coder == "deflate":
        inflate = zlib.decompressobj(-15)
        try:
            part = inflate.decompress(block, expected + 1)
        except zlib.error as error:
            raise CorruptStream(f"a DEFLATE block does not decode: {error}") from error
        if not inflate.eof or inflate.unused_data:
            raise CorruptStream("a DEFLATE block does not end where its section says")
        return part
    if coder == "zstd":
        zstandard = _optional("zstandard")
        try:
            # Both bounds matter: a frame that names its size is decoded into a buffer of that size, whatever is asked for.
            if zstandard.frame_content_size(block) > expected:
                raise CorruptStream(f"a zstd block claims more than its {expected} bytes")
            inflate = zstandard.ZstdDecompressor(max_window_size=1 << 24)
            return bytes(inflate.decompress(block, max_output_size=expected, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise CorruptStream(f"a zstd block does not decode: {error}") from error
    lz4 = _optional("lz4.block")
    try:
        return bytes(lz4.decompress(block, uncompressed_size=expected))
    except lz4.LZ4BlockError as error:
        raise CorruptStream(f"an LZ4 block does not decode: {error}") from error


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(f'the coder needs the package {module}; pip install "kvtc[coders]"') from error
