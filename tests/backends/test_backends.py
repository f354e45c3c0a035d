"""Which backend computes, what every backend promises the codec, and places in caches and pages."""

from functools import partial

import pytest
import torch

from kvtc import Codec, inspect
from kvtc.backends import ReferenceBackend, Target, choose
from kvtc.errors import BackendUnavailable, CorruptStream, InvalidArgument
from tests.builders import (
    joint_codec,
    random_cache,
    tiny_calibration,
    told_cache,
    told_codec,
    told_ids,
)

CPU = torch.device("cpu")


def test_the_cpu_computes_as_the_reference():
    assert choose(CPU).name == "reference"
    assert choose(CPU).reason == "a device of type cpu"
    assert isinstance(Codec(tiny_calibration()).backend, ReferenceBackend)


def test_a_named_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        Codec(tiny_calibration(), backend="triton")
    with pytest.raises(InvalidArgument, match="backend is 'cuda'"):
        Codec(tiny_calibration(), backend="cuda")
    with pytest.raises(InvalidArgument, match="precision is 'float64'"):
        Codec(tiny_calibration(), precision="float64")


@pytest.mark.parametrize("profile", ["joint", "conditional"])
def test_several_chunks_at_once_decode_to_the_same(profile, monkeypatch):
    codec = joint_codec(profile, step=0.5, window_tokens=10, chunk_tokens=64)
    cache, ids = told_cache(300), told_ids(300)
    alone = codec.encode(cache, ids)
    monkeypatch.setattr(ReferenceBackend, "batch_tokens", lambda *_: 150)
    together = codec.encode(cache, ids)
    assert inspect(together).n_chunks == inspect(alone).n_chunks == 5
    first, second = codec.decode(alone, ids), codec.decode(together, ids)
    # Products of other shapes round otherwise: an integer here and there may differ, by one step.
    assert (first.values - second.values).abs().max() < 0.5
    assert (first.values != second.values).float().mean() < 0.01


@pytest.mark.parametrize("profile", ["paper", "conditional"])
def test_products_of_bfloat16_cost_little(profile):
    options = {"ratio": 4} if profile == "paper" else {"step": 0.5}
    codecs = [
        told_codec(profile, window_tokens=10, chunk_tokens=64, precision=precision, **options)
        for precision in ("float32", "bfloat16")
    ]
    cache, ids = told_cache(100), told_ids(100)
    exact, rounded = (codec.decode(codec.encode(cache, ids), ids) for codec in codecs)
    assert torch.equal(exact.keys[:, :, -10:], rounded.keys[:, :, -10:])
    assert not torch.equal(exact.values, rounded.values)
    errors = [(found.values - cache.values).norm() for found in (exact, rounded)]
    assert errors[1] < 1.05 * errors[0]


class Pages:
    """Pages [B, H, N, 2 D] of each layer, in which tokens lie in an order of their own."""

    def __init__(self, layers, heads, tokens, dim, dtype, n=16):
        count = -(-tokens // n)
        self.order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(0))[:count]
        self.layers = torch.full((layers, count + 2, heads, n, 2 * dim), 7.0).to(dtype)
        self.shape, self.n, self.dim = (heads, tokens, dim), n, dim

    def targets(self):
        found = []
        for layer in self.layers:
            at = torch.arange(self.shape[1])
            page, slot = self.order[at // self.n], at % self.n
            offsets = layer.storage_offset() + page * layer.stride(0) + slot * layer.stride(2)
            flat = self.layers.view(-1)
            found.append(tuple(Target(flat, offsets + kind * self.dim, layer.stride(1), 1) for kind in range(2)))
        return found

    def read(self):
        whole = self.layers[:, self.order].transpose(1, 2).flatten(2, 3)[:, :, : self.shape[1]]
        return whole[..., : self.dim], whole[..., self.dim :]


@pytest.mark.parametrize("tokens", [None, 70, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_pages_are_filled_as_a_cache_is(tokens, dtype):
    calibration = tiny_calibration()
    cache = random_cache(200, dtype=dtype)
    codec = Codec(calibration, ratio=4, window_tokens=20, chunk_tokens=64)
    stream = codec.encode(cache)
    expected = codec.decode(stream, tokens=tokens)
    layers, heads, n, dim = expected.keys.shape
    pages = Pages(layers, heads, n, dim, dtype)
    before = pages.layers.clone()
    codec.decode_into(stream, pages.targets(), tokens=tokens)
    for found, side in zip(pages.read(), (expected.keys, expected.values), strict=True):
        assert torch.equal(found.float(), side.float())
    unused = [page for page in range(pages.layers.shape[1]) if page not in pages.order]
    assert torch.equal(pages.layers[:, unused].float(), before[:, unused].float())


def test_a_damaged_window_is_found_before_anything_is_written():
    codec = Codec(tiny_calibration(), ratio=4, window_tokens=20, chunk_tokens=64)
    cache = random_cache(200)
    damaged = bytearray(codec.encode(cache))
    damaged[-1] ^= 1  # the window comes last
    layers, heads, n, dim = cache.keys.shape
    pages = Pages(layers, heads, n, dim, cache.dtype)
    before = pages.layers.clone()
    for decode in (
        codec.decode,
        codec.decode_lazily,
        codec.decode_layers,
        partial(codec.decode_into, targets=pages.targets()),
    ):
        with pytest.raises(CorruptStream, match="window"):
            decode(bytes(damaged))
    assert torch.equal(pages.layers, before)


def test_targets_of_another_size_are_refused():
    cache = random_cache(50)
    codec = Codec(tiny_calibration(), ratio=4)
    stream = codec.encode(cache)
    layers, heads, _, dim = cache.keys.shape
    with pytest.raises(InvalidArgument, match="tokens"):
        codec.decode_into(stream, Pages(layers, heads, 49, dim, cache.dtype).targets())
    with pytest.raises(InvalidArgument, match="layers"):
        codec.decode_into(stream, Pages(layers - 1, heads, 50, dim, cache.dtype).targets())
