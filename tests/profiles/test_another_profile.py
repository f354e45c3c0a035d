"""A whole profile: rows in 16 bits and nothing else."""
# ruff: noqa: ARG005, E731

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import kvtc
from kvtc import profiles
from kvtc.container.tables import PROFILES
from kvtc.profiles.interface import Settled
from tests.builders import random_cache, same_cache, tiny_calibration


@dataclass
class Halves:
    """Encoder, decoder and profile at once, since it keeps nothing."""

    calibration: kvtc.Calibration
    backend: object
    product: torch.dtype
    recomputation: None
    is_entropy_coded = False
    most_plan_bytes = 0

    encoder = decoder = lambda self, *_: self
    predict = least_bytes = lambda *_: None
    plan_bytes = fewest_bytes = lambda *_: 0
    read_plan = lambda self, data: SimpleNamespace(to_bytes=bytes)
    project = lambda self, rows, predicted: (rows.values.half(), rows.spans)
    search = lambda self, coefficients, budget: Settled(SimpleNamespace(to_bytes=bytes))
    quantize = lambda self, coefficients, plan: coefficients
    body_bytes = lambda self, plan, n: 2 * n * self.calibration.geometry.joint_features
    add_prediction = lambda self, rows, bodies: rows

    def entropy_code(self, symbols: tuple[torch.Tensor, list[slice]]) -> list[bytes]:
        return [symbols[0][span].numpy().tobytes() for span in symbols[1]]

    def entropy_decode(self, bodies: Sequence) -> torch.Tensor:
        rows = [np.frombuffer(body.data, np.float16).reshape(body.n_tokens, -1) for body in bodies]
        return torch.from_numpy(np.concatenate(rows))

    def reconstruct(self, rows: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = rows.float().tensor_split(2, dim=1)
        return tuple(side.tensor_split(self.calibration.geometry.n_layers, dim=1)[layer] for side in (keys, values))


def test_a_profile_of_ones_own(monkeypatch):
    monkeypatch.setitem(profiles._MADE_BY, "halves", None)
    monkeypatch.setitem(PROFILES, "halves", 0)
    profiles.register("halves", 200, Halves)
    codec, cache = kvtc.Codec(tiny_calibration(), "halves", coder="zstd"), random_cache(300)
    stream = codec.encode(cache)
    assert kvtc.inspect(stream).profile == "halves"
    decoded = codec.decode(stream)
    torch.testing.assert_close(decoded.values, cache.values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(decoded.keys, cache.keys, rtol=1e-3, atol=5e-3)
    assert same_cache(codec.decode(codec.encode(cache)), decoded)
