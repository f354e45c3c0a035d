"""Settings of engines, parts of a model, and single chunks as streams."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from kvtc import inspect
from kvtc.cache import CacheGeometry
from kvtc.engines.settings import CacheShard, EngineSettings, worker_shards
from kvtc.engines.vllm.tier_lookups import StoreLookups
from kvtc.engines.windowless_codec import WindowlessCodec
from kvtc.entries import Entries
from kvtc.errors import InvalidArgument, StoreUnavailable, StreamTooLarge, TokenMismatch, UnsupportedModel
from kvtc.reference import reference_calibration
from kvtc.store import open_store
from tests import claims
from tests.builders import (
    joint_calibration,
    measured_calibration,
    relative_error,
    same_bits,
    tiny_calibration,
    told_cache,
    told_codec,
    told_ids,
)


def settings(**changed) -> EngineSettings:
    return EngineSettings("reference", "memory:", **({"step": 0.05} | changed))


def test_a_chunk_is_coded_alone_wherever_it_stands():
    codec, cache, ids = WindowlessCodec(joint_calibration(), settings()), told_cache(600), told_ids(600)
    span = slice(256, 512)
    stream = codec.encode(cache.keys[:, :, span], cache.values[:, :, span], 256, ids[span])
    info = inspect(stream)
    assert (info.profile, info.first_position, info.n_chunks, info.window_tokens) == ("joint", 256, 1, 0)
    keys, values = codec.decode(stream, 256, 256, ids[span])
    assert relative_error(keys, cache.keys[:, :, span]) < 0.02
    assert relative_error(values, cache.values[:, :, span]) < 0.02
    first, _ = codec.decode(stream, 256, 100, ids[256:356])
    assert same_bits(first, keys[:, :, :100])
    with pytest.raises(TokenMismatch, match="position 256; expected 0"):
        codec.decode(stream, 0, 256, ids[span])
    with pytest.raises(TokenMismatch):
        codec.decode(stream, 256, 256, ids[:256])


def test_a_page_costs_no_more_than_a_chunk_past_its_tokens():
    """Who writes to the store could have put a chunk of 32768 tokens there: a few hundred bytes, and far more work."""
    codec = WindowlessCodec(joint_calibration(), settings())
    foreign = told_codec("joint", step=4.0, window_tokens=0, chunk_tokens=32768)
    stream = foreign.encode(told_cache(600), told_ids(600))
    assert codec.decode(stream, 0, 344)[0].shape[2] == 344
    for read in (
        lambda: codec.decode(stream, 0, 343),
        lambda: codec.decode(claims.many_tokens(joint_calibration(), 1), 0, 256),
    ):
        with pytest.raises(StreamTooLarge, match="would have to be decoded"):
            read()


def test_sinks_are_exact_at_the_beginning_of_a_text_only():
    codec, cache, ids = WindowlessCodec(joint_calibration(), settings()), told_cache(256), told_ids(256)
    stream = codec.encode(cache.keys, cache.values, 0, ids)
    assert inspect(stream).sink_tokens == 4
    keys, _ = codec.decode(stream, 0, 256, ids)
    assert torch.equal(keys[:, :, :4], cache.keys[:, :, :4])
    assert inspect(codec.encode(cache.keys, cache.values, 256, ids)).sink_tokens == 0


def test_the_profile_is_the_best_that_the_calibration_serves():
    assert WindowlessCodec(joint_calibration(), settings()).codec.settings.profile == "joint"
    assert WindowlessCodec(tiny_calibration(), settings(step=None, ratio=4)).codec.settings.profile == "paper"


def test_a_quality_takes_the_step_of_its_curve():
    codec = WindowlessCodec(measured_calibration(), settings(step=None, kl=2e-3))
    assert codec.codec.rate.step == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kl": 2e-3, "step": 0.05}, "not several"),
        ({"kl": 2e-3, "ratio": 8}, "not several"),
        ({"ratio": 8, "step": 0.05}, "not several"),
        ({"kl": 2e-3, "profile": "paper"}, "paper has no step"),
        ({"kl": 0.5}, "outside of what was measured"),
    ],
)
def test_rates_that_cannot_be_are_refused(changed, expected):
    with pytest.raises(InvalidArgument, match=expected):
        WindowlessCodec(measured_calibration(), settings(**{"step": None} | changed))


def test_a_quality_needs_a_curve():
    with pytest.raises(InvalidArgument, match="no measured quality of the profile joint"):
        WindowlessCodec(joint_calibration(), settings(step=None, kl=2e-3))


@pytest.mark.parametrize("name", ["ratio", "step", "kl"])
def test_rates_are_numbers(name):
    given = {"kvtc.calibration": "reference", "kvtc.store": "memory:", f"kvtc.{name}": 2}
    assert getattr(EngineSettings.from_config(given), name) == 2
    for wrong in ("2", True, [2]):
        with pytest.raises(InvalidArgument, match=rf"kvtc\.{name} is .*expected a number"):
            EngineSettings.from_config(given | {f"kvtc.{name}": wrong})


def test_rotations_that_depend_on_a_texts_length_are_refused():
    calibration = joint_calibration()
    geometry = calibration.geometry

    class LengthDependent:
        depends_on_length = True
        layer_tables = geometry.rope.layer_tables
        tables = geometry.rope.tables

    odd = replace(
        calibration,
        geometry=CacheGeometry(geometry.layers, 0, geometry.n_kv_heads, *geometry.dims, LengthDependent()),
    )
    with pytest.raises(UnsupportedModel, match="length of a sequence"):
        WindowlessCodec(odd, settings())


def test_the_reference_model_has_a_name():
    geometry = reference_calibration().geometry
    part = CacheShard(geometry.layers, 0, geometry.n_kv_heads, *geometry.dims)
    assert part.checked(*settings().read_calibration()).fingerprint == reference_calibration().fingerprint


def test_calibrations_of_ranks_are_named_by_the_rank(tmp_path):
    tiny_calibration().save(tmp_path / "tp1-pp2.safetensors")
    found, name = replace(
        settings(), calibration=f"{tmp_path}/tp{{tp_rank}}-pp{{pp_rank}}.safetensors"
    ).read_calibration(1, 2)
    assert found.fingerprint == tiny_calibration().fingerprint
    assert name.endswith("tp1-pp2.safetensors")
    with pytest.raises(FileNotFoundError):
        replace(settings(), calibration=f"{tmp_path}/tp{{tp_rank}}-pp2.safetensors").read_calibration(0, 0)
    with pytest.raises(InvalidArgument, match="stand for something"):
        replace(settings(), calibration="{rank}").read_calibration()


def test_heads_are_shared_out_as_engines_do():
    parts = worker_shards(12, 8, 64, 4, [(0, 6), (6, 6)])
    assert [(part.layers[0], part.first_kv_head, part.n_kv_heads) for part in parts[3:6]] == [
        (0, 6, 2),
        (6, 0, 2),
        (6, 2, 2),
    ]
    assert [part.first_kv_head for part in worker_shards(1, 2, 64, 4)] == [0, 0, 1, 1]
    with pytest.raises(InvalidArgument, match="3 key-value heads"):
        worker_shards(1, 3, 64, 2)


def test_lookups_answer_later_and_in_the_order_of_the_text():
    store = open_store("memory:")
    for key in ("a0", "a1", "b0", "b1", "d0", "d1"):
        store.put(key, b"")
    lookups = StoreLookups(Entries(store))
    names = {"d": 3, "b": 1, "c": 2, "a": 0}

    def answers(request: str):
        return {name: lookups.ask(request, place, name, [f"{name}0", f"{name}1"]) for name, place in names.items()}

    assert set(answers("one").values()) == {None}
    while None in answers("one").values():
        lookups.flush()
        time.sleep(0.001)
    # d is there, but of no use without c.
    assert answers("one") == {"a": True, "b": True, "c": False, "d": False}
    lookups.set_missing("one", ["a"])
    assert answers("one")["a"] is False
    lookups.forget("one")
    assert set(answers("one").values()) == {None}
    lookups.close()


def test_a_store_that_does_not_answer_has_nothing():
    store = open_store("memory:")
    entries = Entries(store)
    lookups = StoreLookups(entries)
    store.close()
    with pytest.raises(StoreUnavailable):
        store.contains("a")
    lookups.ask("one", 0, "a", ["a"])
    lookups.flush()
    lookups.close()
    assert lookups.ask("one", 0, "a", ["a"]) is False
    assert entries.counts.read()["store_errors"] == 1
