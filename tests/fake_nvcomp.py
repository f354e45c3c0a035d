"""nvCOMP's Python interface as version 6.0 has it, as far as kvtc uses it, on tensors of the CPU.

zlib does the work of every algorithm. Like the real decoder it stops where a DEFLATE stream ends, whatever follows in the block.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import torch

from .fake_modules import fake_modules

KNOWN_OPTIONS = {
    "algorithm", "device_id", "cuda_stream", "uncomp_chunk_size", "bitstream_kind", "execution_policy", "checksum_policy",
    "decompress_backend", "use_de_sort", "data_type", "algorithm_type",
}  # fmt: skip
RAW = object()
SPARE = 32
"""Bytes that a coded block may be longer than its input."""


class Array:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.buffer_size = data.numel()


class BatchArray:
    def __init__(self, views: list[torch.Tensor]) -> None:
        self.views = views
        self.buffer_sizes = [view.numel() for view in views]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Array:
        return Array(self.views[index])


def as_arrays(buffer, offsets, sizes, cuda_stream=0):
    if not sizes:
        raise ValueError("Cannot create a BatchArray from an empty sizes table")
    assert buffer.dtype == torch.uint8
    assert buffer.ndim == 1
    assert buffer.is_contiguous()
    assert isinstance(cuda_stream, int)
    assert all(offset % 16 == 0 for offset in offsets)
    assert all(size > 0 and offset + size <= buffer.numel() for offset, size in zip(offsets, sizes, strict=True))
    return BatchArray([buffer[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)])


class Codec:
    made: ClassVar[list[Codec]] = []
    fails = False

    def __init__(self, **options) -> None:
        assert options.keys() <= KNOWN_OPTIONS
        assert options["bitstream_kind"] is RAW
        if options["algorithm"] not in ("Deflate", "GDeflate", "Zstd", "ANS"):
            raise ValueError(f'Unknown algorithm: "{options["algorithm"]}".')
        self.options = options
        self.batches: list[tuple[str, int]] = []
        self._thread = threading.get_ident()
        Codec.made.append(self)

    def get_max_comp_buffer_size(self, source: Array) -> int:
        return source.buffer_size + SPARE

    def encode(self, srcs, out=None, compression_config=None):  # noqa: ARG002
        self._begin("encode", srcs)
        deflate = (zlib.compressobj(self.options.get("algorithm_type", 1), zlib.DEFLATED, -15) for _ in srcs.views)
        done = [d.compress(view.numpy().tobytes()) + d.flush() for d, view in zip(deflate, srcs.views, strict=True)]
        return self._write(done, out)

    def decode(self, srcs, data_type="", out=None, decompression_config=None):  # noqa: ARG002
        self._begin("decode", srcs)
        try:
            done = [zlib.decompressobj(-15).decompress(view.numpy().tobytes()) for view in srcs.views]
        except zlib.error as error:
            raise RuntimeError(f"nvCOMP error: {error}") from error
        return self._write(done, out)

    def _begin(self, what: str, srcs) -> None:
        assert threading.get_ident() == self._thread, "a codec belongs to one thread"
        assert isinstance(srcs, BatchArray)
        if Codec.fails:
            raise RuntimeError("CUDA Runtime API failure: an injected one")
        self.batches.append((what, len(srcs)))

    def _write(self, done: list[bytes], out) -> BatchArray:
        assert isinstance(out, BatchArray), "out= parameter of the batch overload must be an nvcomp.BatchArray"
        views = []
        for data, room in zip(done, out.views, strict=True):
            if len(data) > room.numel():
                raise ValueError(f"{room.numel()} is too small to hold the data, {len(data)}")
            views.append(room[: len(data)])
            if data:
                views[-1].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return BatchArray(views)


@contextmanager
def fake_nvcomp(version: str = "6.0.0") -> Iterator[type[Codec]]:
    Codec.made, Codec.fails = [], False
    kinds = SimpleNamespace(RAW=RAW)
    contents = {"__version__": version, "Codec": Codec, "BitstreamKind": kinds, "as_arrays": as_arrays}
    with fake_modules({"nvidia.nvcomp": contents}, ()):
        yield Codec
