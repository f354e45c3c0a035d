"""What bounds a codec on a device: copies, products, rANS by chunks, and lossless coders on the
same bytes.
"""

import zlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import CHUNK_TOKENS, caches, calibration_for, coefficient_model, drawn, shipped
from benchmarks.gpu.coding import Case, Setting
from kvtc.backends import CodedIntegers, make_backend, nvcomp
from kvtc.coding.joint.uniform_quantizer import column_classes
from kvtc.coding.lossless import BLOCK_BYTES
from kvtc.container.stream import parse_stream
from kvtc.container.tables import SectionType
from kvtc.errors import KvtcError

RANKS = (3000, 6000, 10000)
N_CHUNKS = (1, 4, 16, 64, 256)
BITS_A_COEFFICIENT = 3.4
NVCOMP_CODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Deflate": ("Deflate", {}),
    "Deflate, type 4": ("Deflate", {"algorithm_type": 4}),
    "GDeflate": ("GDeflate", {}),
    "Zstd": ("Zstd", {}),
    "ANS": ("ANS", {}),
}


def ceilings(setting: Setting) -> dict[str, Any]:
    """Bytes a second of copies, and operations a second of the inverse product, of one layer and of
    all at once.
    """
    found: dict[str, Any] = _bandwidths(1 << (20 if setting.is_small else 31), setting)
    geometry = setting.shape("nemo").geometry
    size, n_tokens = geometry.n_kv_heads * geometry.head_dim, 512 if setting.is_small else 65536
    found["bfloat16_products"] = [
        {
            "tokens": n_tokens,
            "rank": setting.rank(rank),
            "features": n,
            "operations_a_second": _rate(n_tokens, setting.rank(rank), n, setting),
        }
        for rank in RANKS
        for n in (size, 8 * size)
    ]
    return found


def _bandwidths(n_bytes: int, setting: Setting) -> dict[str, float]:
    device, clock = setting.device, setting.clock
    source, few = torch.ones(n_bytes, dtype=torch.uint8, device=device), n_bytes // 8
    target, pageable = torch.empty_like(source), torch.ones(few, dtype=torch.uint8)
    hosts = {"pageable": pageable} | ({"pinned": pageable.pin_memory()} if device.type == "cuda" else {})

    def copy(host: torch.Tensor) -> None:
        target[: len(host)].copy_(host, non_blocking=True)

    found = {"device_copy_bytes_a_second": 2 * n_bytes / clock.median(partial(copy, source))}
    for name, host in hosts.items():
        found[f"host_to_device_{name}_bytes_a_second"] = few / clock.median(partial(copy, host))
    return found


def _rate(n_tokens: int, rank: int, features: int, setting: Setting) -> float:
    options = {"device": setting.device, "dtype": torch.bfloat16}
    rows, columns = torch.randn(n_tokens, rank, **options), torch.randn(features, rank, **options)
    mean = torch.randn(features, **options)
    return 2 * n_tokens * rank * features / setting.clock.median(lambda: torch.addmm(mean, rows, columns.T))


def rans(setting: Setting) -> dict[str, Any]:
    """Symbols a second of reading integers (entropy decoding and dequantizing) by chunks in a call:
    with copies, and without.

    seconds: of bytes in the host's memory, as streams bring them; device_seconds: of bytes that lie
    on the device already.
    """
    rank, backend = setting.rank(3000), make_backend(setting.device, setting.backend)
    model = coefficient_model(shipped().joint.coefficients, rank)
    step = model.step_for(BITS_A_COEFFICIENT * rank)
    classes = column_classes(model.deviations, step)
    counts = N_CHUNKS[:2] if setting.is_small else N_CHUNKS
    generator = torch.Generator(setting.device).manual_seed(5)
    chunks = []
    for _ in range(counts[-1]):
        rounded = backend.round(drawn(model.deviations, CHUNK_TOKENS, generator), step, classes, model.tables)
        (coded,) = backend.write_integers(rounded, [slice(0, CHUNK_TOKENS)], classes, model.tables)
        parts = coded.activities, coded.symbols, coded.escapes
        chunks.append(CodedIntegers(CHUNK_TOKENS, *parts, classes, model.tables, step))
    n_bytes = sum(len(chunk.symbols) for chunk in chunks)
    n_escape_bytes = sum(len(chunk.escapes) for chunk in chunks)
    there = [on_device(chunk, setting.device) for chunk in chunks]
    rows = []
    for count in counts:
        n_symbols = count * CHUNK_TOKENS * len(classes)
        row: dict[str, Any] = {"chunks": count, "symbols": n_symbols}
        for prefix, some in (("", chunks[:count]), ("device_", there[:count])):
            seconds = setting.clock.median(partial(backend.read_integers, some, rank))
            row |= {f"{prefix}seconds": seconds, f"{prefix}symbols_a_second": n_symbols / seconds}
        rows.append(row)
    n_symbols = counts[-1] * CHUNK_TOKENS * len(classes)
    return {
        "backend": backend.name,
        "rank": rank,
        "coded": len(classes),
        "bits_a_symbol": 8 * n_bytes / n_symbols,
        "escape_bits_a_symbol": 8 * n_escape_bytes / n_symbols,
        "rows": rows,
    }


def on_device(chunk: CodedIntegers, device: torch.device) -> CodedIntegers:
    """The same chunk, its bytes on the device."""

    def moved(data: bytes) -> torch.Tensor:
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return host.to(device)

    parts = moved(chunk.activities), moved(chunk.symbols), moved(chunk.escapes)
    return replace(chunk, activities=parts[0], symbols=parts[1], escapes=parts[2])


def lossless(setting: Setting) -> dict[str, Any]:
    """nvCOMP's coders, and zlib on one core, on the bodies of a stream of the profile `paper` in
    blocks of 64 KiB.
    """
    case = Case("nemo", "paper", 6000)
    calibration = calibration_for(setting.shape("nemo"), "paper", setting.rank(6000), setting.device)
    codec = setting.codec(calibration, case)
    batch = (1, 300) if setting.is_small else (1, 8192)
    (sequence,) = caches(calibration, "paper", batch, setting.device)
    stream = parse_stream(codec.encode(sequence.cache, sequence.token_ids))
    bodies = [
        stream.read(SectionType.BODY, index, stream.find(SectionType.BODY, index).raw_bytes)
        for index in range(len(stream.chunks))
    ]
    blocks = [body[at : at + BLOCK_BYTES] for body in bodies for at in range(0, len(body), BLOCK_BYTES)]
    raw = sum(map(len, blocks))
    some = blocks[:: max(1, len(blocks) // 64)]
    found: dict[str, Any] = {
        "raw_bytes": raw,
        "blocks": len(blocks),
        "zlib": _zlib(some, setting),
        "nvcomp": {},
        "skipped": {},
    }
    for name, (algorithm, coder_options) in NVCOMP_CODERS.items():
        try:
            coder = nvcomp.Algorithm(setting.device, algorithm, **coder_options)
            found["nvcomp"][name] = _nvcomp(coder, blocks, setting, is_deflate=algorithm == "Deflate")
        except (ImportError, KvtcError, RuntimeError) as error:
            found["skipped"][f"nvCOMP {name}"] = str(error)
    return found


def _zlib(blocks: list[bytes], setting: Setting) -> dict[str, float]:
    """Level 6 as the container uses it, on some of the blocks."""
    coded, raw = _deflated(blocks), sum(map(len, blocks))
    decode = setting.clock.median(lambda: [zlib.decompress(block, -15) for block in coded])
    return {
        "ratio": raw / sum(map(len, coded)),
        "encode_bytes_a_second": raw / setting.clock.median(lambda: _deflated(blocks)),
        "decode_bytes_a_second": raw / decode,
    }


def _deflated(blocks: list[bytes]) -> list[bytes]:
    coders = [zlib.compressobj(6, zlib.DEFLATED, -15) for _ in blocks]
    return [coder.compress(block) + coder.flush() for coder, block in zip(coders, blocks, strict=True)]


def _nvcomp(coder: nvcomp.Algorithm, blocks: list[bytes], setting: Setting, is_deflate: bool) -> dict[str, Any]:
    """All blocks in batches, from the host's memory and back to it."""
    sizes = [len(block) for block in blocks]
    stored, raw = coder.compress(blocks), sum(sizes)
    if coder.decompress(stored, sizes) != blocks:
        raise RuntimeError("it does not give back what went in")
    found = {
        "ratio": raw / sum(map(len, stored)),
        "encode_bytes_a_second": raw / setting.clock.median(lambda: coder.compress(blocks)),
        "decode_bytes_a_second": raw / setting.clock.median(lambda: coder.decompress(stored, sizes)),
    }
    if is_deflate:
        found["zlib_reads_it"] = [zlib.decompress(block, -15) for block in stored] == blocks
        found["it_reads_zlib"] = coder.decompress(_deflated(blocks), sizes) == blocks
    return found
