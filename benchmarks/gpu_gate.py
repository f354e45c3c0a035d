"""Whether a device computes what the reference backend computes: `gpu.py` reports no speed before this holds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import kvtc
from gpu_cases import TINY, MadeUp
from gpu_clock import on_device
from kvtc.backends import Backend, CodedIntegers, ReferenceBackend
from kvtc.coding.uniform import column_classes
from kvtc.profiles.coefficients import Coefficients

TOKENS, RANK = 300, 48
SPANS = (slice(0, 100), slice(100, 101), slice(101, TOKENS))
LARGEST_ERROR = 0.01
"""Of a decoded cache against that of the reference, relative: bfloat16 keeps 8 bits."""
ROUNDING = 1e-5


def check(codec_options: dict, device: torch.device) -> dict[str, bool]:
    """What was compared, and whether it was the same."""
    found: dict[str, bool] = {}
    for profile in ("paper", "joint", "conditional"):
        # Both are given the same numbers, so they are drawn on the CPU.
        made = MadeUp(TINY, profile, RANK, torch.device("cpu"))
        cache, ids = made.draw(TOKENS, seed=0)
        here = kvtc.Codec(made.calibration, profile, ratio=8, **codec_options)
        there = kvtc.Codec(made.calibration, profile, ratio=8, backend="reference", precision="float32")
        arithmetic = _paper if profile == "paper" else _integers
        for name, is_same in arithmetic(here, there, made).items():
            found[f"{profile}: {name}"] = is_same
        moved = kvtc.KVCache(cache.keys.to(device), cache.values.to(device))
        stream = here.encode(moved, ids)
        restored, expected = here.decode(stream, ids), there.decode(stream, ids)
        found[f"{profile}: decoded"] = all(
            _close(getattr(restored, side), getattr(expected, side)) for side in ("keys", "values")
        )
        batch, _ = here.decode_batch([stream, stream], [ids, ids])
        found[f"{profile}: batch"] = _close(batch.layers[0].keys[1], expected.keys[0]) and _close(
            batch.layers[-1].values[0], expected.values[-1]
        )
    return found


def _integers(here: kvtc.Codec, there: kvtc.Codec, made: MadeUp) -> dict[str, bool]:
    """Integers of the same coefficients, their bytes, and what these are read as."""
    joint = made.calibration.joint
    if joint is None:
        raise RuntimeError("a calibration of joint was expected")
    model, step = joint.coefficients, 2.0
    drawn = np.random.default_rng(0).standard_normal((TOKENS, RANK), dtype=np.float32) * model.deviations
    values = torch.from_numpy(drawn)
    classes = column_classes(model.deviations, step)

    def written(backend: Backend) -> list:
        rounded = Coefficients(values.to(backend.device), model, is_predicted=False).rounded(step, backend)
        return rounded.write(SPANS, backend)

    mine, reference = written(here.backend), written(there.backend)
    counts = [span.stop - span.start for span in SPANS]
    chunks = [
        CodedIntegers(n, parts.activities, parts.symbols, parts.escapes, classes, model.tables, step)
        for n, parts in zip(counts, reference, strict=True)
    ]
    expected = ReferenceBackend(torch.device("cpu")).read_integers(chunks, RANK)
    read = here.backend.read_integers(chunks, RANK)
    from_device = here.backend.read_integers([on_device(chunk, here.device) for chunk in chunks], RANK)
    return {
        "bytes of integers": mine == reference,
        "integers": _close(read, expected, ROUNDING),
        "integers of bytes on the device": torch.equal(from_device.cpu(), read.cpu()),
    }


def _paper(here: kvtc.Codec, there: kvtc.Codec, made: MadeUp) -> dict[str, bool]:
    """Groups of the same coefficients, and what they are read as."""
    (allocation, _), kind = here.rate.allocations(16), made.calibration.key
    drawn = np.random.default_rng(0).standard_normal((TOKENS, RANK), dtype=np.float32)
    values = torch.from_numpy(drawn) * kind.basis.spectrum.sqrt()
    mine, reference = (
        codec.backend.pack_groups(values.to(codec.device), list(SPANS), allocation) for codec in (here, there)
    )
    counts = [span.stop - span.start for span in SPANS]
    read, expected = (codec.backend.unpack_groups(reference, counts, allocation) for codec in (here, there))
    return {"bytes of groups": mine == reference, "groups": _close(read, expected, ROUNDING)}


def _close(found: Tensor, expected: Tensor, largest: float = LARGEST_ERROR) -> bool:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return found.shape == expected.shape and float((found - expected).norm()) <= largest * float(expected.norm())
