"""The format does not drift: bytes of version 1 that are kept, and a second decoder written from docs/format.md alone."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import lz4.block
import numpy as np
import pytest
import torch
import zstandard

from kvtc.cache import KVCache
from kvtc.calibration import Calibration
from kvtc.codec import Codec

from .builders import GOLDEN_TOKEN_IDS, golden_cache, golden_calibration, golden_codec, random_cache, same_cache

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "stream_v1.hex"
PAGE = HERE.parent / "docs" / "format.md"


def golden_stream() -> bytes:
    return bytes.fromhex(GOLDEN.read_text())


def test_the_page_prints_the_golden_stream():
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} )+) .*$", PAGE.read_text(), re.MULTILINE)
    printed = b""
    for offset, octets in lines:
        assert int(offset, 16) == len(printed)
        printed += bytes.fromhex(octets)
    assert printed == golden_stream()


def test_the_golden_stream_decodes_to_the_expected_cache():
    decoded = golden_codec().decode(golden_stream(), GOLDEN_TOKEN_IDS)
    assert same_cache(decoded, golden_cache())


def test_encoding_gives_the_golden_stream():
    assert golden_codec().encode(golden_cache(), GOLDEN_TOKEN_IDS).hex() == golden_stream().hex()


def test_the_specification_suffices_for_the_golden_stream():
    positions, rope_length, keys, values = decode_by_the_page(golden_stream(), golden_calibration())
    assert positions == [0, 1, 3, 6]
    assert rope_length == 0
    np.testing.assert_array_equal(keys, golden_cache().keys.float().numpy())
    np.testing.assert_array_equal(values, golden_cache().values.float().numpy())


def ragged_cache(dtype: torch.dtype) -> KVCache:
    """60 tokens whose positions begin inside a cell and leave some out."""
    whole = random_cache(90, dtype, seed=3)
    places = torch.tensor([p for p in range(3, 88) if p % 7 not in (2, 5)])[:60]
    return KVCache(whole.keys[:, :, places], whole.values[:, :, places], places, rope_length=90)


@pytest.mark.parametrize("lossless", ["none", "deflate", "zstd", "lz4"])
@pytest.mark.parametrize(
    ("dtype", "sink_format", "allocation"),
    [
        (torch.bfloat16, "exact", "dynamic"),
        (torch.float16, "fp8", "dynamic"),
        (torch.float32, "exact", "truncate"),
        (torch.float8_e4m3fn, "exact", "dynamic"),
        (torch.float8_e5m2, "fp8", "dynamic"),
    ],
)
def test_the_specification_suffices_for_every_feature(calibration, lossless, dtype, sink_format, allocation):
    codec = Codec(
        calibration,
        ratio=3,
        window_tokens=9,
        sink_tokens=6,
        chunk_tokens=16,
        lossless=lossless,
        sink_format=sink_format,
        allocation=allocation,
    )
    cache = ragged_cache(dtype)
    stream = codec.encode(cache)
    decoded = codec.decode(stream)
    positions, rope_length, keys, values = decode_by_the_page(stream, calibration)
    assert positions == cache.positions.tolist()
    assert rope_length == 90
    # The page fixes no order of summation, so a sum may round to the neighbouring number of the cache's dtype.
    step = max(torch.finfo(dtype).eps, 1e-5)
    near_zero = torch.finfo(dtype).tiny * torch.finfo(dtype).eps + 1e-5
    np.testing.assert_allclose(keys, decoded.keys.float().numpy(), rtol=step, atol=near_zero)
    np.testing.assert_allclose(values, decoded.values.float().numpy(), rtol=step, atol=near_zero)


# From here on nothing of the package is used but the tensors of a calibration.


def decode_by_the_page(data: bytes, calibration: Calibration) -> tuple[list[int], int, np.ndarray, np.ndarray]:
    """Stream -> positions, rope length, keys and values [L, H, T, D] float32. Assumes a sound stream."""
    (magic, version, _, dtype, flags, _, _, layers, _, heads, dim, _, cell, rope_length, n_chunks, n_sections, crc) = (
        struct.unpack_from("<4s4B16s6H5I", data)
    )
    tables_end = 56 + 20 * n_chunks + 20 * n_sections
    assert (magic, version) == (b"KVTC", 1)
    assert zlib.crc32(data[:52] + data[56:tables_end]) == crc
    sections, start = {}, tables_end
    for index in range(n_sections):
        kind, coder, _, chunk, raw, stored, crc = struct.unpack_from("<BBHIIII", data, 56 + 20 * n_chunks + 20 * index)
        part = data[start : start + stored]
        assert zlib.crc32(part) == crc
        sections[kind, chunk] = undo_coder(part, coder, raw)
        start += stored
    assert start == len(data)

    allocations, at = [], 0
    alloc = sections[1, 0xFFFFFFFF]
    for _ in range(2):
        (count,) = struct.unpack_from("<H", alloc, at)
        allocations.append([struct.unpack_from("<IHHB", alloc, at + 2 + 9 * i) for i in range(count)])
        at += 2 + 9 * count

    positions: list[int] = []
    parts: list[np.ndarray] = []
    for index in range(n_chunks):
        first, n_sink, n_body, n_window, chunk_flags, _ = struct.unpack_from("<IHHHH8s", data, 56 + 20 * index)
        n = n_sink + n_body + n_window
        if chunk_flags & 1:
            assert flags & 4
            here = [first // cell * cell + offset for offset in struct.unpack(f"<{n}H", sections[2, index])]
        else:
            here = list(range(first, first + n))
        if n_sink and chunk_flags & 2:
            parts.append(fp8_vectors(sections[3, index], (2, layers, heads, n_sink, dim), dtype))
        elif n_sink:
            parts.append(planes(sections[3, index], (2, layers, heads, n_sink, dim), dtype))
        if n_body:
            rows = body_rows(sections[4, index], n_body, allocations, calibration)
            both = rows.reshape(2, n_body, layers, heads, dim).transpose(0, 2, 3, 1, 4).copy()
            rotate(both[0], np.array(here[n_sink : n_sink + n_body]), rope_length, calibration)
            parts.append(round_to(both, dtype))
        if n_window:
            parts.append(planes(sections[5, index], (2, layers, heads, n_window, dim), dtype))
        positions += here
    both = np.concatenate(parts, axis=3)
    return positions, rope_length, both[0], both[1]


def undo_coder(part: bytes, coder: int, raw: int) -> bytes:
    if coder == 0:
        return part
    n = -(-raw // 65536)
    lengths = struct.unpack_from(f"<{n}I", part)
    out, at = b"", 4 * n
    for index, length in enumerate(lengths):
        block, size = part[at : at + length], min(65536, raw - 65536 * index)
        if coder == 1:
            out += zlib.decompress(block, wbits=-15)
        elif coder == 2:
            out += zstandard.ZstdDecompressor().decompress(block, max_output_size=size)
        else:
            out += lz4.block.decompress(block, uncompressed_size=size)
        at += length
    assert len(out) == raw
    return out


def small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """The 256 values of an 8-bit float format; its infinities are not among what tests decode."""
    code = np.arange(256)
    exponent, mantissa = (code >> mantissa_bits) & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    return np.where(code < 128, 1, -1) * fraction * 2.0 ** (np.maximum(exponent, 1) - bias)


E4M3, E5M2 = small_floats(4, 3, 7), small_floats(5, 2, 15)


def planes(data: bytes, shape: tuple[int, ...], dtype: int) -> np.ndarray:
    size = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1}[dtype]
    octets = np.frombuffer(data, np.uint8).reshape(size, -1).T.copy()
    if dtype == 1:
        values = (octets.view("<u2").astype("<u4") << 16).view("<f4")
    elif dtype in (2, 3):
        values = octets.view("<f2" if dtype == 2 else "<f4").astype(np.float32)
    else:
        values = (E4M3 if dtype == 4 else E5M2)[octets].astype(np.float32)
    return values.reshape(shape)


def fp8_vectors(data: bytes, shape: tuple[int, ...], dtype: int) -> np.ndarray:
    n_vectors = int(np.prod(shape[:-1]))
    symbols = E4M3[np.frombuffer(data, np.uint8, n_vectors * shape[-1])].astype(np.float32)
    scales = np.frombuffer(data, "<f2", offset=n_vectors * shape[-1]).astype(np.float32)
    return round_to(symbols.reshape(shape) * (scales / np.float32(448)).reshape(*shape[:-1], 1), dtype)


def body_rows(data: bytes, n: int, allocations: list, calibration: Calibration) -> np.ndarray:
    """[2, n, p] float32: keys before rotation, and values."""
    at, sides = 0, []
    for runs, kind in zip(allocations, (calibration.key, calibration.value), strict=True):
        coefficients = np.zeros((n, kind.basis.rank), np.float32)
        for start, size, count, bits in runs:
            if bits < 16:
                octets = np.frombuffer(data, np.uint8, 4 * count * n, at).reshape(2, 2, count * n)
                shift, scale = (
                    (low.astype("<u2") + (high.astype("<u2") << 8)).view("<f2").astype(np.float32).reshape(count, n, 1)
                    for low, high in octets
                )
                at += 4 * count * n
            n_bytes = -(-count * n * size * bits // 8)
            packed = np.frombuffer(data, np.uint8, n_bytes, at)
            at += n_bytes
            if bits == 16:
                values = packed.view("<f2").astype(np.float32).reshape(count, n, size)
            elif bits == 8:
                values = shift + E4M3[packed].astype(np.float32).reshape(count, n, size) * (scale / np.float32(448))
            else:
                symbols = (packed[:, None] >> np.arange(0, 8, bits)) & (2**bits - 1)
                symbols = symbols.reshape(-1)[: count * n * size].reshape(count, n, size).astype(np.float32)
                values = shift + symbols * (scale / np.float32(2**bits - 1))
            coefficients[:, start : start + size * count] = values.transpose(1, 0, 2).reshape(n, -1)
        sides.append(coefficients @ kind.basis.vectors.float().numpy().T + kind.basis.mean.numpy())
    assert at == len(data)
    return np.stack(sides)


def rotate(keys: np.ndarray, positions: np.ndarray, rope_length: int, calibration: Calibration) -> None:
    """Half-split rotation of every layer, in place; keys [L, H, n, D]."""
    rope = calibration.geometry.rope
    for layer, index in enumerate(rope.layer_tables):
        if index < 0:
            continue
        table = rope.tables[index]
        assert (table.interleaved, table.scaling, rope_length > 0) == (False, None, True)
        frequencies = np.array(table.inverse_frequencies, np.float32)
        angles = positions.astype(np.float32)[:, None] * frequencies
        cos, sin = np.cos(angles) * table.attention_scaling, np.sin(angles) * table.attention_scaling
        half = len(frequencies)
        first, second = keys[layer, ..., :half].copy(), keys[layer, ..., half : 2 * half].copy()
        keys[layer, ..., :half] = first * cos - second * sin
        keys[layer, ..., half : 2 * half] = second * cos + first * sin


def round_to(values: np.ndarray, dtype: int) -> np.ndarray:
    """Nearest value of the cache's dtype, ties to even, the largest one where it is passed."""
    kind = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32, 4: torch.float8_e4m3fn, 5: torch.float8_e5m2}[dtype]
    limit = torch.finfo(kind).max
    return torch.from_numpy(values.astype(np.float32)).clamp(-limit, limit).to(kind).float().numpy()
