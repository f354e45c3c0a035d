"""Streams of one machine on another, whose products are rounded otherwise: what stays the same, and how far the rest may move."""

from dataclasses import replace

import pytest
import torch

import kvtc
from kvtc.coding.product import Columns, PackedRows
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    joint_calibration,
    same_cache,
    told_cache,
    told_codec,
    told_ids,
    told_model,
)

PROFILES = ["paper", "joint", "conditional"]
UNIT = 2.0**-24
"""Half of a float32's last digit, as a share of it: what one operation may be off by."""


@pytest.fixture
def elsewhere(monkeypatch):
    """Every product by torch's own library and in another order, as on a GPU.

    Gives the sums of magnitudes of those that restore rows.
    """
    sums: list[float] = []

    def times(self, rows, start=None, n_columns=None, blocks=()):
        n = self.shape[1] if n_columns is None else n_columns
        values = rows.values.float() if isinstance(rows, PackedRows) else rows.float()
        matrix = self.plain[: values.shape[1], :n]
        # From the last term to the first, for libraries add up in orders of their own.
        found = values.flip(1) @ matrix.flip(0)
        if start is not None:
            found += start
        if isinstance(rows, PackedRows) and self.shape[1] in (N_HEADS * HEAD_DIM, 2 * N_HEADS * HEAD_DIM):
            magnitudes = values.abs() @ matrix.abs()
            sums.append(float((magnitudes + (0 if start is None else start.abs())).max()) if len(values) else 0.0)
        for its in blocks:
            found = its.added_to(found)
        return found

    made = Columns.__init__

    def remember(self, matrix, *rest, **options):
        made(self, matrix, *rest, **options)
        self.plain = matrix.float()

    monkeypatch.setattr(Columns, "__init__", remember)
    monkeypatch.setattr(Columns, "times", times)
    return sums


@pytest.mark.parametrize("profile", PROFILES)
def test_values_on_another_machine_differ_by_roundings_within_the_bound(profile, elsewhere, monkeypatch):
    """The bound of docs/format.md, before rounding to the cache's dtype; its sum of magnitudes is taken smaller here."""
    cache, ids = told_cache(300), told_ids(300)
    calibration = joint_calibration()
    there = told_codec(profile, 6, window_tokens=0)
    stream = there.encode(cache, ids)
    restored = there.decode(stream, ids)
    monkeypatch.undo()
    again = told_codec(profile, 6, window_tokens=0).decode(stream, ids)
    rank = calibration.joint.basis.rank if profile != "paper" else calibration.key.basis.rank
    bound = 4 * (rank + HEAD_DIM + 4) * UNIT * max(elsewhere)
    off = max(float((getattr(again, side) - getattr(restored, side)).abs().max()) for side in ("keys", "values"))
    assert 0 < off <= bound


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.usefixtures("elsewhere")
def test_a_stream_of_another_machine_is_read_here(profile, monkeypatch):
    """What entropy decoding needs is in the stream: integers alone, none of which follows from a product."""
    cache, ids = told_cache(300, torch.bfloat16), told_ids(300)
    stream = told_codec(profile, 6).encode(cache, ids)
    monkeypatch.undo()
    codec = told_codec(profile, 6)
    again = codec.encode(codec.decode(stream, ids), ids)
    assert kvtc.inspect(again).n_tokens == kvtc.inspect(stream).n_tokens == 300


@pytest.mark.parametrize("noise", [1e-5, 1e-2, 1.0])
def test_no_symbol_of_conditional_depends_on_its_prediction(noise, monkeypatch):
    """A prediction that is off, by roundings or by far, moves values by as much and parses the same."""
    cache, ids = told_cache(300), told_ids(300)
    codec = told_codec("conditional", step=1.0, window_tokens=0)
    stream = codec.encode(cache, ids)
    read: list[torch.Tensor] = []
    plain = codec.backend.read_integers
    monkeypatch.setattr(
        codec.backend, "read_integers", lambda *given: (read.append(plain(*given)), read[-1].clone())[1]
    )
    exact = codec.decode(stream, ids)
    run = told_model().run

    def off(token_ids):
        found = run(token_ids)
        drawn = torch.randn(found.hidden.shape, generator=torch.Generator().manual_seed(1))
        return replace(found, hidden=found.hidden + noise * drawn)

    monkeypatch.setattr(told_model(), "run", off)
    moved = codec.decode(stream, ids)
    assert torch.equal(read[0], read[1])
    distance = float((moved.values - exact.values).square().mean().sqrt())
    assert 0.01 * noise < distance < 100 * noise


def test_one_thread_and_two_write_and_restore_the_same():
    cache, ids = told_cache(300, torch.bfloat16), told_ids(300)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            codec = told_codec("conditional", 6)
            stream = codec.encode(cache, ids)
            found.append((stream, codec.decode(stream, ids)))
    finally:
        torch.set_num_threads(before)
    assert found[0][0] == found[1][0]
    assert same_cache(found[0][1], found[1][1])


def test_a_batch_and_a_single_stream_restore_the_same():
    from transformers import DynamicCache

    codec = told_codec("conditional", step=1.0, window_tokens=16)
    lengths, streams, single = (90, 300), [], []
    for n in lengths:
        cache = told_cache(n, torch.bfloat16, n)
        whole = DynamicCache(
            [(keys[None], values[None]) for keys, values in zip(cache.keys, cache.values, strict=True)]
        )
        streams.append(codec.encode(whole, told_ids(n, n)))
        single.append(codec.decode_neutral(streams[-1], told_ids(n, n)))
    batch, _ = codec.decode_batch(streams, [told_ids(n, n) for n in lengths])
    for row, (n, alone) in enumerate(zip(lengths, single, strict=True)):
        for layer in range(len(alone.keys)):
            assert torch.equal(batch.layers[layer].keys[row, :, -n:], alone.keys[layer])
            assert torch.equal(batch.layers[layer].values[row, :, -n:], alone.values[layer])
