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
INTERPRETED_TOKENS, INTERPRETED_RANK = 12, 16
"""Where kernels are interpreted, which takes long."""
LARGEST_ERROR = 0.01
"""Of a decoded cache against that of the reference, relative: bfloat16 keeps 8 bits."""
ROUNDING = 1e-5


def check(codec_options: dict, device: torch.device) -> dict[str, bool]:
    """What was compared, and whether it was the same."""
    found: dict[str, bool] = {}
    is_interpreted = device.type == "cpu" and codec_options["backend"] == "triton"
    tokens, rank = (INTERPRETED_TOKENS, INTERPRETED_RANK) if is_interpreted else (TOKENS, RANK)
    for profile in ("paper", "joint", "conditional"):
        # Both are given the same numbers, so they are drawn on the CPU.
        made = MadeUp(TINY, profile, rank, torch.device("cpu"))
        cache, ids = made.draw(tokens, seed=0)
        here = kvtc.Codec(made.calibration, profile, ratio=8, **codec_options)
        there = kvtc.Codec(made.calibration, profile, ratio=8, backend="reference", precision="float32")
        arithmetic = _paper if profile == "paper" else _integers
        for name, is_same in arithmetic(here, there, made, tokens).items():
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


def _integers(here: kvtc.Codec, there: kvtc.Codec, made: MadeUp, tokens: int) -> dict[str, bool]:
    """Integers of the same coefficients, their bytes, and what these are read as."""
    joint = made.calibration.joint
    if joint is None:
        raise RuntimeError("a calibration of joint was expected")
    model, step, spans = joint.coefficients, 2.0, _spans(tokens)
    drawn = np.random.default_rng(0).standard_normal((tokens, made.rank), dtype=np.float32) * model.deviations
    values = torch.from_numpy(drawn)
    classes = column_classes(model.deviations, step)

    def written(backend: Backend) -> list:
        rounded = Coefficients(values.to(backend.device), model, is_predicted=False).rounded(step, backend)
        return rounded.write(spans, backend)

    mine, reference = written(here.backend), written(there.backend)
    counts = [span.stop - span.start for span in spans]
    chunks = [
        CodedIntegers(n, parts.activities, parts.symbols, parts.escapes, classes, model.tables, step)
        for n, parts in zip(counts, reference, strict=True)
    ]
    expected = ReferenceBackend(torch.device("cpu")).read_integers(chunks, made.rank)
    read = here.backend.read_integers(chunks, made.rank)
    from_device = here.backend.read_integers([on_device(chunk, here.device) for chunk in chunks], made.rank)
    return {
        "bytes of integers": mine == reference,
        "integers": _close(read, expected, ROUNDING),
        "integers of bytes on the device": torch.equal(from_device.cpu(), read.cpu()),
    }


def _paper(here: kvtc.Codec, there: kvtc.Codec, made: MadeUp, tokens: int) -> dict[str, bool]:
    """Groups of the same coefficients, and what they are read as."""
    spans = _spans(tokens)
    (allocation, _), kind = here.rate.allocations(16), made.calibration.key
    drawn = np.random.default_rng(0).standard_normal((tokens, made.rank), dtype=np.float32)
    values = torch.from_numpy(drawn) * kind.basis.spectrum.sqrt()
    mine, reference = (codec.backend.pack_groups(values.to(codec.device), spans, allocation) for codec in (here, there))
    counts = [span.stop - span.start for span in spans]
    read, expected = (codec.backend.unpack_groups(reference, counts, allocation) for codec in (here, there))
    return {"bytes of groups": mine == reference, "groups": _close(read, expected, ROUNDING)}


def _spans(tokens: int) -> list[slice]:
    """Of three chunks, the second of one token."""
    third = tokens // 3
    return [slice(0, third), slice(third, third + 1), slice(third + 1, tokens)]


def _close(found: Tensor, expected: Tensor, largest: float = LARGEST_ERROR) -> bool:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return found.shape == expected.shape and float((found - expected).norm()) <= largest * float(expected.norm())
