"""nvCOMP's Python interface, as a stand-in that codes with zlib on the CPU: what is handed over, and what comes back."""

import sys
import zlib

import pytest
import torch

from kvtc.backends import nvcomp
from kvtc.coding.lossless import BLOCK_BYTES, decompress
from kvtc.errors import CorruptStream, MissingDependency

from .fake_modules import fake_modules

CPU = torch.device("cpu")
BLOCKS = [bytes(range(256)) * 256, bytes(BLOCK_BYTES), b"a short last one"]


class BitstreamKind:
    NVCOMP_NATIVE, RAW = "native", "raw"


class Codec:
    """As nvidia.nvcomp.Codec: keywords alone, batches in and out."""

    def __init__(self, **options):
        assert options.pop("device_id") == 0
        assert options.pop("cuda_stream") == 7
        # With another kind nvCOMP would put a header of its own before each block.
        assert options.pop("bitstream_kind") == BitstreamKind.RAW
        assert options == {"algorithm": "Deflate"}

    def encode(self, srcs):
        found = []
        for array in srcs:
            coder = zlib.compressobj(6, zlib.DEFLATED, -15)
            found.append(_array(coder.compress(array.numpy().tobytes()) + coder.flush()))
        return found

    def decode(self, srcs):
        try:
            return [_array(zlib.decompress(array.numpy().tobytes(), -15)) for array in srcs]
        except zlib.error as error:
            raise RuntimeError(f"nvCOMP error: {error}") from error


def _array(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_arrays(sources, cuda_stream=0):
    assert cuda_stream == 7
    assert all(source.data_ptr() % nvcomp.ALIGNMENT == sources[0].data_ptr() % nvcomp.ALIGNMENT for source in sources)
    assert all(source.dtype == torch.uint8 and source.is_contiguous() for source in sources)
    return list(sources)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(nvcomp, "_current_stream", {CPU: 7}.get)
    names = {"Codec": Codec, "as_arrays": as_arrays, "BitstreamKind": BitstreamKind}
    with fake_modules({"nvidia.nvcomp": names}, []):
        yield


@pytest.mark.usefixtures("installed")
def test_blocks_are_those_of_a_section():
    coded = nvcomp.deflate_blocks(BLOCKS, CPU)
    stored = b"".join([*(len(block).to_bytes(4, "little") for block in coded), *coded])
    raw = b"".join(BLOCKS)
    assert decompress(stored, len(raw), "deflate") == raw
    assert nvcomp.inflate_blocks(coded, [len(block) for block in BLOCKS], CPU) == BLOCKS
    assert nvcomp.deflate_blocks([], CPU) == nvcomp.inflate_blocks([], [], CPU) == []


@pytest.mark.usefixtures("installed")
def test_damaged_blocks_are_refused():
    coded = nvcomp.deflate_blocks(BLOCKS, CPU)
    with pytest.raises(CorruptStream, match="block 2 decodes to 16 bytes, 17 expected"):
        nvcomp.inflate_blocks(coded, [BLOCK_BYTES, BLOCK_BYTES, 17], CPU)
    with pytest.raises(CorruptStream, match="does not decode"):
        nvcomp.inflate_blocks([b"\xff\xff"], [10], CPU)


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", None)
    with pytest.raises(MissingDependency, match="nvidia-nvcomp-cu12"):
        nvcomp.deflate_blocks(BLOCKS, CPU)
