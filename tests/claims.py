"""Streams of few bytes that claim much, every checksum right: what parsing and decoding must bound before they work."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import lz4.block
import numpy as np
import zstandard

from kvtc.calibration import Calibration
from kvtc.coding.lossless import BLOCK_BYTES, CODER_IDS
from kvtc.container.tables import STREAM_WIDE, SectionType

CHUNK = np.dtype("<u4, <u2, <u2, <u2, <u2, <u8")
SECTION = np.dtype("u1, u1, <u2, <u4, <u4, <u4, <u4")
PAPER, JOINT = 1, 2

BLOCKS: dict[str, Callable[[bytes], bytes]] = {
    "deflate": lambda raw: zlib.compress(raw, 9, wbits=-15),
    "zstd": lambda raw: zstandard.ZstdCompressor(level=3, write_content_size=False).compress(raw),
    "lz4": lambda raw: lz4.block.compress(raw, mode="high_compression", store_size=False),
}


def zeros(n_bytes: int, coder: str) -> bytes:
    """So many zeros as a lossless coder stores them: a few bytes for each block of 64 KiB."""
    if coder == "none":
        return bytes(n_bytes)
    sizes = [min(BLOCK_BYTES, n_bytes - start) for start in range(0, n_bytes, BLOCK_BYTES)]
    coded = {size: BLOCKS[coder](bytes(size)) for size in set(sizes)}
    blocks = [coded[size] for size in sizes]
    return struct.pack(f"<{len(blocks)}I", *map(len, blocks)) + b"".join(blocks)


def whole_stream(
    calibration: Calibration,
    profile: int,
    rate: tuple[str, bytes, int],
    counts: tuple[int, int],
    sections: list[tuple[int, str, bytes, int]],
    regions: tuple[int, int, int] | None = None,
    flags: int = 0,
) -> bytes:
    """A stream of equal chunks, written without the library.

    rate: coder, stored bytes, raw bytes. counts: chunks, and tokens in each. sections of every chunk: type, coder, stored bytes,
    raw bytes. regions: sink, body and window tokens of every chunk; all body by default. flags: of every chunk.
    """
    geometry, (n_chunks, n_tokens) = calibration.geometry, counts
    head = struct.pack(
        "<4sBBBB16sIII", b"KVTC", 3, profile, 4 if flags & 1 else 0, 1, calibration.fingerprint,
        n_tokens, n_chunks, 1 + n_chunks * len(sections),
    )  # fmt: skip
    group = struct.pack(
        "<BBHHHHHHHIHH", 1, 1, 1, 1, geometry.first_kv_head, geometry.n_kv_heads, geometry.head_dim, geometry.head_dim, 0, 0,
        geometry.layers[0], geometry.n_layers,
    )  # fmt: skip
    chunks = np.zeros(n_chunks, CHUNK)
    chunks["f0"] = np.arange(n_chunks, dtype=np.int64) * n_tokens
    chunks["f1"], chunks["f2"], chunks["f3"] = (0, n_tokens, 0) if regions is None else regions
    chunks["f4"] = flags
    table = np.zeros((n_chunks, len(sections)), SECTION)
    table["f3"] = np.arange(n_chunks)[:, None]
    for column, (kind, coder, stored, raw_bytes) in enumerate(sections):
        for name, value in zip(
            ("f0", "f1", "f4", "f5", "f6"),
            (kind, CODER_IDS[coder], raw_bytes, len(stored), zlib.crc32(stored)),
            strict=True,
        ):
            table[name][:, column] = value
    coder, stored, raw_bytes = rate
    first = struct.pack("<BBHIIII", 1, CODER_IDS[coder], 0, STREAM_WIDE, raw_bytes, len(stored), zlib.crc32(stored))
    tables = group + chunks.tobytes() + first + table.tobytes()
    checksum = struct.pack("<I", zlib.crc32(tables, zlib.crc32(head)))
    return b"".join([head, checksum, tables, stored, b"".join(section[2] for section in sections) * n_chunks])


def one_coefficient(bits: int = 16) -> bytes:
    """The rate of `paper` that codes one coefficient of the values, and nothing of the keys."""
    return struct.pack("<HHIHHB", 0, 1, 0, 1, 1, bits)


def inflated_rate(calibration: Calibration, n_bytes: int, coder: str = "deflate", profile: int = PAPER) -> bytes:
    """A rate of so many zeros in a few hundredths of the bytes."""
    rate = coder, zeros(n_bytes, coder), n_bytes
    return whole_stream(calibration, profile, rate, (1, 1), [(SectionType.BODY, "none", bytes(2), 2)])


def many_tokens(calibration: Calibration, n_chunks: int, n_tokens: int = 32768, coder: str = "deflate") -> bytes:
    """Chunks of `paper` that are sound: one coefficient of every token is stored, and all of them are zero."""
    rate, raw_bytes = one_coefficient(), 2 * n_tokens
    body = SectionType.BODY, coder, zeros(raw_bytes, coder), raw_bytes
    return whole_stream(calibration, PAPER, ("none", rate, len(rate)), (n_chunks, n_tokens), [body])


def many_chunks(calibration: Calibration, n_chunks: int, profile: int = PAPER) -> bytes:
    """Chunks of one token."""
    rate = one_coefficient() if profile == PAPER else struct.pack("<f", largest_step(calibration))
    body = (SectionType.BODY, "none", bytes(2), 2) if profile == PAPER else (SectionType.BODY, "none", bytes(5), 5)
    return whole_stream(calibration, profile, ("none", rate, len(rate)), (n_chunks, 1), [body])


def large_rate_of_many_parts(calibration: Calibration, n_chunks: int, n_bytes: int) -> bytes:
    """Each of its parts would repeat the rate."""
    body = SectionType.BODY, "none", b"x", 1
    return whole_stream(calibration, PAPER, ("none", bytes(n_bytes), n_bytes), (n_chunks, 1), [body])


def largest_step(calibration: Calibration) -> float:
    """The largest step of `joint` that a stream may have."""
    return float(np.float32(calibration.joint.coefficients.steps.max() * 64))


def uncoded_columns(calibration: Calibration, n_chunks: int, n_tokens: int = 32768) -> bytes:
    """Sound chunks of `joint` at a step so large that no coefficient is coded: two bits a token."""
    body = bytes(-(-n_tokens // 4) + 4)
    rate = struct.pack("<f", largest_step(calibration))
    return whole_stream(
        calibration, JOINT, ("none", rate, 4), (n_chunks, n_tokens), [(SectionType.BODY, "none", body, len(body))]
    )


def states_alone(calibration: Calibration, n_tokens: int = 32768) -> bytes:
    """A chunk of `joint` at the finest step, all coefficients coded by its table, and nothing in it but states of the coder."""
    steps = calibration.joint.coefficients.steps
    rate = struct.pack("<f", float(np.float32(steps.min() / 64)) * 1.01)
    body = bytes(-(-n_tokens // 4)) + struct.pack("<I32I", 128, *[2**32 - 1] * 32)
    return whole_stream(
        calibration, JOINT, ("none", rate, 4), (1, n_tokens), [(SectionType.BODY, "none", body, len(body))]
    )


def exact_zeros(calibration: Calibration, n_tokens: int, coder: str = "deflate") -> bytes:
    """Window tokens that are all zero, in a few bytes a block."""
    raw_bytes = 2 * calibration.geometry.joint_features * n_tokens
    window = SectionType.WINDOW, coder, zeros(raw_bytes, coder), raw_bytes
    rate = one_coefficient()
    return whole_stream(
        calibration, PAPER, ("none", rate, len(rate)), (1, n_tokens), [window], regions=(0, 0, n_tokens)
    )


def padded(calibration: Calibration, n_bytes: int, claimed: int | None = None, coder: str = "none") -> bytes:
    """A chunk of `joint` with padding."""
    rate = struct.pack("<f", largest_step(calibration))
    body = SectionType.BODY, "none", bytes(5), 5
    padding = SectionType.PADDING, coder, zeros(n_bytes, coder), n_bytes if claimed is None else claimed
    return whole_stream(calibration, JOINT, ("none", rate, 4), (1, 1), [body, padding], flags=4)


def oversized_block(calibration: Calibration, n_bytes: int, coder: str) -> bytes:
    """One block of far more than 64 KiB where a body of two bytes is due."""
    block = BLOCKS[coder](bytes(n_bytes))
    rate = one_coefficient()
    body = SectionType.BODY, coder, struct.pack("<I", len(block)) + block, 2
    return whole_stream(calibration, PAPER, ("none", rate, len(rate)), (1, 1), [body])
