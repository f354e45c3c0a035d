"""The reference model's cache held by several ranks: pipeline ranks by layers, tensor-parallel ranks by heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvtc
from kvtc.cache import KVCache
from kvtc.demo.run import CONVERSATION
from kvtc.errors import CalibrationMismatch, GeometryMismatch

transformers = pytest.importorskip("transformers")

LAYERS, HEADS = ((0, 5), (5, 12)), ((0, 1), (1, 3))
SPLITS = {"layers": [{"layers": part} for part in LAYERS], "heads": [{"kv_heads": part} for part in HEADS]}


@pytest.fixture(scope="module")
def model() -> Any:
    return kvtc.reference_model()[0]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = kvtc.reference_model()[1]
    return torch.tensor(tokenizer(CONVERSATION.read_text(encoding="utf-8")).input_ids)


@pytest.fixture(scope="module")
def whole(model, ids) -> Any:
    with torch.no_grad():
        return model(ids[None, :500]).past_key_values


def part_of(whole: Any, layers: tuple[int, int] = (0, 12), kv_heads: tuple[int, int] = (0, 3)) -> KVCache:
    """What a rank holds of the whole cache."""
    held = whole.layers[slice(*layers)]
    sides = (torch.stack([getattr(layer, side)[0, slice(*kv_heads)] for layer in held]) for side in ("keys", "values"))
    return KVCache(*sides, layers=tuple(range(*layers)), first_kv_head=kv_heads[0])


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_restore_their_parts_and_refuse_the_others(model, ids, whole, split):
    """Each rank has a calibration of its own; together they are the whole cache, as the ranks coded it."""
    texts = list(ids[500:1400].split(300))
    codecs = [
        kvtc.Codec(kvtc.calibrate(model, texts, **rank, progress=False, joint_rank=128, rank=16), ratio=6)
        for rank in SPLITS[split]
    ]
    parts = [part_of(whole, **rank) for rank in SPLITS[split]]
    streams = [codec.encode(part, ids[:500]) for codec, part in zip(codecs, parts, strict=True)]
    restored = [codec.decode(stream, ids[:500]) for codec, stream in zip(codecs, streams, strict=True)]
    again = [codec.decode(stream, ids[:500]) for codec, stream in zip(codecs, streams, strict=True)]
    for part, found, repeated in zip(parts, restored, again, strict=True):
        assert found.extent == part.extent
        for side in ("keys", "values"):
            exact, coded = getattr(part, side), getattr(found, side)
            assert torch.equal(coded, getattr(repeated, side)), "restored exactly as coded"
            assert torch.equal(coded[:, :, -128:], exact[:, :, -128:]), "the window is exact"
            assert float((coded.float() - exact.float()).norm() / exact.float().norm()) < 0.5
    joined = torch.cat([found.values for found in restored], dim=0 if split == "layers" else 1)
    assert joined.shape == part_of(whole).values.shape

    with pytest.raises(GeometryMismatch, match="covers"):
        codecs[0].encode(parts[1], ids[:500])
    with pytest.raises((GeometryMismatch, CalibrationMismatch)):
        codecs[1].decode(streams[0], ids[:500])
    # A part that says nothing of where it stands is taken for the first.
    with pytest.raises(GeometryMismatch):
        codecs[1].encode(replace(parts[1], layers=None, first_kv_head=0), ids[:500])
