"""Random damage to calibration files and cache files, their checksums made right: see `fuzz`."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as remember
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kvtc.cache_file import load_cache, save_cache
from kvtc.calibration import Calibration, load_calibration
from kvtc.calibration.artifact import _checksum, _parse
from kvtc.codec.codec import Codec
from kvtc.errors import KvtcError

from .builders import (
    measured_calibration,
    random_cache,
    tiny_calibration,
    told_cache,
    told_ids,
    two_widths,
    two_widths_calibration,
)

Contents = tuple[dict[str, str], dict[str, Tensor]]

NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1e-45,
    1e-30,
    1e9,
    -1e9,
    65504.0,
    1e13,
    3e38,
    -3e38,
    float("inf"),
    float("nan"),
]
JSON_NUMBERS = [
    *(
        "0",
        "-1",
        "1",
        "2",
        "7",
        "0.5",
        "1e9",
        "1e308",
        "1e999",
        "NaN",
        "-Infinity",
        "65535",
        "65536",
        "1" * 30,
        "1" * 5000,
    ),
    *("true", "null", '"8"', "[]", "{}"),
]
JSON_TEXTS = [
    "",
    "{",
    "[]",
    "{}",
    "null",
    "1",
    '"x"',
    "[" * 3000,
    "[" * 40 + "]" * 40,
    '{"a": 1, "a": 2}',
    '{"a": NaN}',
    "\ud7ff",
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]


@dataclass(frozen=True)
class DamagedFile:
    """The bytes of a file, and what reads it and uses what it holds."""

    data: bytes
    use: Callable[[Path, random.Random], None]


@remember
def sound_files() -> list[tuple[bytes, Callable[[Path, random.Random], None]]]:
    """The bytes of files of few bytes, and what reads each."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "sound")
        calibrations = (
            measured_calibration(),
            measured_calibration(),
            tiny_calibration(),
            two_widths_calibration("latent"),
        )
        for calibration in calibrations:
            calibration.save(path)
            found.append((path.read_bytes(), use_calibration))
        save_cache(path, random_cache(9, torch.bfloat16, first_position=3), torch.arange(9))
        return [*found, (path.read_bytes(), use_cache)]


def read(data: bytes) -> Contents:
    """Metadata and tensors of a sound file."""
    (size,) = struct.unpack("<Q", data[:8])
    return dict(json.loads(data[8 : 8 + size])["__metadata__"]), safetensors.torch.load(data)


def write(contents: Contents) -> bytes:
    """A file of them, whose checksum and fingerprint are those of its contents where it has any."""
    metadata, tensors = contents
    if metadata.pop("checksum", None) is not None:
        # What cannot be parsed is refused before anybody looks at its fingerprint.
        with suppress(KvtcError, KeyError, ValueError, TypeError, AttributeError):
            metadata["fingerprint"] = _parse(metadata, tensors).fingerprint.hex()
        try:
            metadata["checksum"] = _checksum(metadata, tensors)
        except TypeError:
            metadata["checksum"] = hashlib.sha256().hexdigest()  # of a dtype that numpy does not know
    return safetensors.torch.save(tensors, metadata)


def set_numbers(draw: random.Random, contents: Contents) -> None:
    tensors = contents[1]
    name = draw.choice(sorted(tensors))
    changed = tensors[name].clone()
    flat = changed.view(-1)
    for _ in range(draw.choice([1, 1, 3])):
        if flat.numel():
            place = draw.choice([0, flat.numel() - 1, draw.randrange(flat.numel())])
            value = draw.choice(NUMBERS)
            flat[place] = value if changed.dtype.is_floating_point else draw.choice([0, 1, 64, 100])
    tensors[name] = changed


def scale_numbers(draw: random.Random, contents: Contents) -> None:
    name = draw.choice(sorted(contents[1]))
    if contents[1][name].dtype.is_floating_point:
        contents[1][name] = contents[1][name] * draw.choice([0.0, -1.0, 0.5, 3.0, 1e-6, 1e6, 1e12, 1e20])


def change_form(draw: random.Random, contents: Contents) -> None:
    tensors = contents[1]
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = draw.randrange(6)
    if kind == 0 and tensor.dtype != torch.uint16:
        tensors[name] = tensor.to(draw.choice(DTYPES))
    elif kind == 1 and tensor.dim():
        axis = draw.randrange(tensor.dim())
        tensors[name] = tensor.narrow(axis, 0, draw.randrange(tensor.shape[axis] + 1)).clone()
    elif kind == 2:
        tensors[name] = tensor.reshape(-1).clone()
    elif kind == 3:
        tensors[name] = torch.zeros(draw.choice([(0, 1 << 40), (3, 0, 1 << 40, 8), (0, 0), (0,)]), dtype=tensor.dtype)
    elif kind == 4:
        tensors[draw.choice([name + "x", "more", *tensors])] = tensor.clone()


def change_text(draw: random.Random, contents: Contents) -> None:
    metadata = contents[0]
    if metadata:
        name = draw.choice(sorted(metadata))
        metadata[name] = draw.choice(JSON_TEXTS)


def change_number(draw: random.Random, contents: Contents) -> None:
    metadata = contents[0]
    name = draw.choice(sorted(metadata) or ["none"])
    found = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", metadata.get(name, "")))
    if found:
        chosen = draw.choice(found)
        text = metadata[name]
        metadata[name] = text[: chosen.start()] + draw.choice(JSON_NUMBERS) + text[chosen.end() :]


CHANGES = [set_numbers, set_numbers, scale_numbers, change_form, change_text, change_number, change_number]


def draw_file(draw: random.Random) -> DamagedFile:
    """A file whose contents are changed under right checksums, or one with other bytes."""
    data, use = draw.choice(sound_files())
    if draw.random() < 0.15:
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 3])):
            changed[draw.randrange(min(len(changed), 2000))] = draw.randrange(256)
        return DamagedFile(bytes(changed[: draw.choice([len(changed), draw.randrange(len(changed))])]), use)
    contents = read(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        draw.choice(CHANGES)(draw, contents)
    return DamagedFile(write(contents), use)


def try_to_use(draw: random.Random, damaged: DamagedFile, directory: Path) -> None:
    """Raises `KvtcError`, or returns; anything else is a failure. directory: where the file is written."""
    path = directory / "damaged.safetensors"
    path.write_bytes(damaged.data)
    damaged.use(path, draw)


def use_calibration(path: Path, draw: random.Random) -> None:
    """What is read codes caches, and they come back finite."""
    calibration = load_calibration(path)
    for name, tensor in numbers_of(calibration):
        assert bool(tensor.isfinite().all()), f"{name} is not finite"
    profile = draw.choice(calibration.profiles)
    options = {"ratio": draw.choice([2.0, 8.0, 64.0])} if draw.random() < 0.5 or profile == "paper" else {"step": 0.5}
    codec = Codec(calibration, profile, sink_tokens=2, window_tokens=3, chunk_tokens=8, **options)
    is_latent = calibration.geometry.n_kv_heads == 1
    cache = (
        random_cache(20, torch.bfloat16, geometry=two_widths("latent")) if is_latent else told_cache(20, torch.bfloat16)
    )
    decoded = codec.decode(codec.encode(cache, told_ids(20)), told_ids(20))
    assert bool(decoded.keys.isfinite().all() and decoded.values.isfinite().all()), (
        "a calibration gives a cache that is not finite"
    )


def numbers_of(calibration: Calibration) -> list[tuple[str, Tensor]]:
    """All floating-point tensors that must be finite."""
    found = list(calibration._coding_tensors()) if calibration.joint else []
    for name, kind in (("key", calibration.key), ("value", calibration.value)):
        found += [(f"{name} basis", part) for part in (kind.basis.mean, kind.basis.vectors, kind.basis.spectrum)]
    found += [(f"quality of {profile}", curve.tensor()) for profile, curve in calibration.quality.items()]
    return [(name, tensor) for name, tensor in found if tensor.dtype.is_floating_point]


def use_cache(path: Path, draw: random.Random) -> None:
    """What is read is a cache that can be coded, or refused."""
    cache, token_ids = load_cache(path)
    cache.describe()
    codec = Codec(tiny_calibration(), ratio=draw.choice([2.0, 8.0]), sink_tokens=2, window_tokens=3)
    assert codec.decode(codec.encode(cache, token_ids)).n_tokens == cache.n_tokens
