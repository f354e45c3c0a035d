"""nvCOMP for the lossless stage: what it writes zlib reads, and the reverse; what it leaves or refuses is the host's."""

import threading
import zlib
from struct import pack

import pytest
import torch

import kvtc
from kvtc.backends import make_backend, nvcomp
from kvtc.backends.nvcomp import ALGORITHMS, Algorithm, NvcompBlockCoder
from kvtc.coding.lossless import CODER_IDS, compress, compress_all, decompress, decompress_all
from kvtc.container.stream import parse_stream
from kvtc.container.tables import SectionType
from kvtc.errors import BackendUnavailable, CorruptStream, InvalidArgument
from tests.builders import fresh_codec, random_cache, tiny_codec, with_section
from tests.fake_nvcomp import fake_nvcomp

CPU = torch.device("cpu")
PARTS = [bytes(70_000), b"", bytes(range(256)) * 700, b"x", torch.randint(256, (65536,)).numpy().astype("u1").tobytes()]


@pytest.fixture
def made():
    with fake_nvcomp() as codec:
        yield codec


def coder(**options):
    return NvcompBlockCoder(CPU, **{"trusts_streams": True, "least_bytes": 0} | options)


def device_codec(block_coder, **options):
    codec = fresh_codec(chunk_tokens=64, **options)
    codec.backend.block_coder = block_coder
    return codec


def batches(made):
    return [batch for codec in made.made for batch in codec.batches]


@pytest.mark.usefixtures("made")
def test_what_it_writes_zlib_reads_and_the_reverse():
    coded = compress_all(PARTS, "deflate", coder())
    assert [decompress(data, len(part), "deflate") for data, part in zip(coded, PARTS, strict=True)] == PARTS
    stored = [(compress(part, "deflate"), len(part)) for part in PARTS]
    assert decompress_all(stored, "deflate", coder()) == PARTS


def test_all_sections_of_a_stream_are_one_batch_each_way(made):
    cache = random_cache(300)
    plain, device = tiny_codec(chunk_tokens=64), device_codec(coder())
    stream = device.encode(cache)
    sections = [section for section in kvtc.inspect(stream).sections if section.coder == "deflate"]
    assert {section.kind for section in sections} >= {"body"}
    # Exact tokens have a coder of their own.
    assert [what for what, _ in batches(made)] == ["encode"]
    restored = device.decode(stream)
    assert batches(made)[1:] == [("decode", len([s for s in sections if s.kind != "rate"]))]
    for found in (plain.decode(stream), device.decode(plain.encode(cache))):
        assert torch.equal(found.keys, restored.keys)
        assert torch.equal(found.values, restored.values)


def test_by_default_it_writes_and_does_not_read(made):
    device = device_codec(NvcompBlockCoder(CPU, least_bytes=0))
    device.decode(device.encode(random_cache(100)))
    assert {what for what, _ in batches(made)} == {"encode"}


def test_little_data_and_other_coders_are_left_to_the_host(made):
    cache = random_cache(100)
    for left in (
        device_codec(coder(least_bytes=1 << 20)),
        device_codec(coder(), coder="zstd"),
        device_codec(coder(), coder="none"),
    ):
        stream = left.encode(cache)
        assert stream == tiny_codec(chunk_tokens=64, coder=left.settings.coder).encode(cache)
        left.decode(stream)
    assert made.made == []
    with pytest.raises(InvalidArgument, match="not zstd"):
        coder().compress_blocks([b"a"], "zstd")


def body_of(stream):
    """The number of its first body, which is coded."""
    return next(i for i, s in enumerate(kvtc.inspect(stream).sections) if s.kind == "body" and s.coder == "deflate")


def block_of(stream):
    """The only block of that body."""
    section = parse_stream(stream).find(SectionType.BODY, 0)
    return stream[section.offset + 4 : section.offset + section.stored_bytes]


WRONG = {
    "nothing": lambda _: b"",
    "half": lambda block: block[: len(block) // 2],
    "another length": lambda _: zlib.compress(bytes(3), wbits=-15),
    "a bomb": lambda _: zlib.compress(bytes(1 << 20), wbits=-15),
    "no stream": lambda _: b"\xff" * 20,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_corrupt_block_is_refused_and_its_section_named(wrong, made):
    device = device_codec(coder())
    stream = device.encode(random_cache(100))
    number = body_of(stream)
    block = WRONG[wrong](block_of(stream))
    with pytest.raises(CorruptStream, match="section body of chunk 0"):
        device.decode(with_section(stream, number, pack("<I", len(block)) + block, CODER_IDS["deflate"]))
    assert [what for what, _ in batches(made)][:1] == ["encode"]


@pytest.mark.usefixtures("made")
def test_bytes_after_a_block_are_noticed_unless_streams_are_trusted():
    device = device_codec(coder())
    stream = device.encode(random_cache(100))
    block = block_of(stream) + b"more"
    longer = with_section(stream, body_of(stream), pack("<I", len(block)) + block)
    with pytest.raises(CorruptStream, match="does not end where its section says"):
        device_codec(NvcompBlockCoder(CPU, least_bytes=0)).decode(longer)
    assert torch.equal(device.decode(longer).keys, device.decode(stream).keys)


@pytest.mark.usefixtures("made")
def test_a_claim_beyond_what_deflate_can_do_is_refused_before_memory_is_asked_for():
    with pytest.raises(CorruptStream, match="63 bytes, too few for the 65536 expected"):
        coder().decompress_blocks([bytes(63)], [65536], "deflate")


def test_what_the_device_refuses_the_host_reads_and_says_so(made, caplog):
    device = device_codec(coder())
    cache = random_cache(100)
    stream = device.encode(cache)
    expected = device.decode(stream)
    made.fails = True
    assert torch.equal(device.decode(stream).keys, expected.keys)
    assert "sections are read without a device: nvCOMP does not decode a Deflate block" in caplog.text
    with pytest.raises(RuntimeError, match="an injected one"):
        device.encode(cache)


def test_every_thread_has_a_codec_of_its_own(made):
    shared, found = coder(), []
    threads = [threading.Thread(target=lambda: found.append(compress_all(PARTS, "deflate", shared))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made.made) == 3
    assert found == [found[0]] * 3


def test_large_batches_are_cut(made, monkeypatch):
    monkeypatch.setattr(nvcomp, "_BATCH_BLOCKS", 2)
    coded = compress_all(PARTS, "deflate", coder())
    stored = [(data, len(part)) for data, part in zip(coded, PARTS, strict=True)]
    assert decompress_all(stored, "deflate", coder()) == PARTS
    assert [size for _, size in batches(made)] == [2, 2, 2, 1] * 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_to_compare(name, made):
    blocks = [b"abc" * 1000, b"d"]
    algorithm = Algorithm(CPU, name)
    coded = algorithm.compress(blocks)
    assert len(coded[0]) < 100
    assert algorithm.decompress(coded, [3000, 1]) == blocks
    assert [codec.options["algorithm"] for codec in made.made] == [name]
    with pytest.raises(CorruptStream, match="block 0 decodes to 3000 bytes, 3001 expected"):
        algorithm.decompress(coded, [3001, 1])
    with pytest.raises(InvalidArgument, match="'LZ5' is unknown"):
        Algorithm(CPU, "LZ5")


@pytest.mark.usefixtures("made")
def test_why_it_cannot_be_used(monkeypatch):
    cuda = torch.device("cuda")
    assert "this one is of type cpu" in nvcomp.obstacle(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvcomp.obstacle(cuda) == "no CUDA device is visible"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert nvcomp.obstacle(cuda) is None
    with fake_nvcomp("5.1.0"):
        assert nvcomp.obstacle(cuda) == "version 6 is needed; version 5 is installed"
    monkeypatch.setattr(nvcomp.importlib, "import_module", missing)
    assert 'pip install "kvtc[nvcomp]"' in nvcomp.obstacle(cuda)


def missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


@pytest.mark.usefixtures("made")
def test_a_cuda_device_gets_it_where_it_is_installed(monkeypatch):
    assert make_backend(CPU).block_coder is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = make_backend(torch.device("cuda"), "reference").block_coder
    assert isinstance(found, NvcompBlockCoder)
    assert not found.trusts_streams


def test_it_is_checked_against_zlib(made, monkeypatch):
    with pytest.raises(BackendUnavailable, match="of type cpu"):
        nvcomp.check(CPU)
    monkeypatch.setattr(nvcomp, "obstacle", lambda _: None)
    nvcomp.check(CPU)
    monkeypatch.setattr(made, "decode", lambda _codec, _srcs, out: out)
    with pytest.raises(BackendUnavailable, match="different bytes"):
        nvcomp.check(CPU)
