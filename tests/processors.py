"""The same bytes on every processor: streams and decoded caches, compared by digest under settings that stand for other machines.

    python -m tests.processors [--suite]

Each setting runs in a process of its own: the instruction sets that torch (ATEN_CPU_CAPABILITY), its libraries
(MKL_ENABLE_INSTRUCTIONS, ONEDNN_MAX_CPU_ISA) and numba (NUMBA_CPU_NAME) may use, and the number of threads. The settings
cover every pair of values of two of them. Inside each process every tensor of the calibration lies at 0, 4, 16 and 32 bytes
past a multiple of 64, row by row and column by column, chunks are decoded alone, in a batch and as prefixes, and a
calibration is fitted, saved and loaded. --suite runs the tests of the codec under every setting too. The exit code is 1
where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtc

ROOT = Path(__file__).parents[1]
NATIVE = "native"
SETTINGS = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2", NATIVE),
    "MKL_ENABLE_INSTRUCTIONS": ("AVX2", NATIVE),
    "ONEDNN_MAX_CPU_ISA": ("AVX2", NATIVE),
    "NUMBA_CPU_NAME": ("generic", NATIVE),
    "OMP_NUM_THREADS": ("1", "2"),
}
OFFSETS = (0, 4, 16, 32)
CODED = {
    "paper": {"ratio": 16.0, "profile": "paper"},
    "joint": {"step": 1.0, "profile": "joint"},
    "joint, ratio": {"ratio": 32.0, "profile": "joint"},
    "joint, coded window": {"step": 1.0, "profile": "joint", "window_format": "coded"},
    "lossless": {"lossless": True},
    "joint, bfloat16": {"step": 1.0, "profile": "joint", "precision": "bfloat16"},
}
CORE = ["coding/test_product", "container/test_golden", "coding/test_rans", "coding/test_rope", "coding/test_joint_parts",
        "codec/test_joint", "codec/test_codec", "codec/test_fixed_size"]  # fmt: skip


def covering(settings: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """Few settings in which every pair of values of two names occurs; the first is this machine as it is."""
    names = list(settings)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*settings.values())]
    every.sort(key=lambda setting: [setting[name] != settings[name][-1] for name in names])

    def pairs(setting: dict[str, str]) -> set[Any]:
        return set(itertools.combinations(setting.items(), 2))

    chosen, left = [], set().union(*map(pairs, every))
    while left:
        best = every[0] if not chosen else max(every, key=lambda setting: len(pairs(setting) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def laid_out(value: Any, lay: Callable[[Tensor], Tensor]) -> Any:
    """A calibration, or a part of it, whose tensors lie elsewhere."""
    if isinstance(value, Tensor):
        return lay(value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: laid_out(getattr(value, field.name), lay) for field in fields(value) if field.init}
        return replace(value, **found)
    return value


def at_offset(tensor: Tensor, offset: int, by_columns: bool) -> Tensor:
    """The same numbers, so many bytes past a multiple of 64."""
    turned = tensor.mT if by_columns and tensor.dim() > 1 else tensor
    room = torch.empty(tensor.numel() * tensor.element_size() + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset // tensor.element_size() * tensor.element_size()
    placed = room[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(turned.shape)
    placed.copy_(turned)
    return placed.mT if by_columns and tensor.dim() > 1 else placed


def digest(*parts: Any) -> str:
    """Of bytes, and of caches bit for bit."""
    hashed = hashlib.sha256()
    for part in parts:
        tensors = [] if isinstance(part, bytes) else [part.keys, part.values]
        data = (
            [part] if isinstance(part, bytes) else [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
        )
        for piece in data:
            hashed.update(piece)
    return hashed.hexdigest()[:12]


def digests(folder: Path) -> dict[str, str]:
    """What this process writes and restores of one cache, by name."""
    calibration = kvtc.load_calibration(folder / "calibration")
    cache, ids = (
        kvtc.KVCache(*torch.load(folder / "cache", weights_only=True)),
        torch.load(folder / "ids", weights_only=True),
    )
    found = {}
    for name, options in CODED.items():
        codec = kvtc.Codec(calibration, window_tokens=64, **options)
        stream = codec.encode(cache, ids)
        found[f"{name}: stream"] = digest(stream)
        found[f"{name}: cache"] = digest(codec.decode(stream, ids))
    return found


def differences(folder: Path) -> list[str]:
    """What differs inside this process though it must not."""
    found = []
    calibration = kvtc.load_calibration(folder / "calibration")
    cache, ids = (
        kvtc.KVCache(*torch.load(folder / "cache", weights_only=True)),
        torch.load(folder / "ids", weights_only=True),
    )
    for name in ("paper", "joint", "joint, bfloat16"):
        options = CODED[name]
        codec = kvtc.Codec(calibration, window_tokens=64, **options)
        stream = codec.encode(cache, ids)
        whole = codec.decode(stream, ids)
        for offset, by_columns in itertools.product(OFFSETS, (False, True)):
            elsewhere = laid_out(calibration, lambda t, o=offset, c=by_columns: at_offset(t, o, c))
            other = kvtc.Codec(elsewhere, window_tokens=64, **options)
            if digest(stream, whole) != digest(other.encode(cache, ids), other.decode(stream, ids)):
                found.append(f"{name}: calibration {offset} bytes past 64, {'columns' if by_columns else 'rows'}")
        found += [f"{name}: {what}" for what in apart(codec, stream, whole, ids)]
    found += [f"fitted and loaded: {what}" for what in fitted_and_loaded()]
    return found


def apart(codec: kvtc.Codec, stream: bytes, whole: kvtc.KVCache, ids: Tensor) -> list[str]:
    """Prefixes, and chunks one by one in the order of their age, against the whole."""
    found = []
    for n in (1, 77, 300):
        prefix = codec.decode(stream, ids[:n], tokens=n)
        if digest(prefix) != digest(kvtc.KVCache(whole.keys[:, :, :n], whole.values[:, :, :n])):
            found.append(f"the first {n} tokens alone")
    parts = kvtc.split_stream(stream)
    starts = [0, *itertools.accumulate(kvtc.inspect(part).n_tokens for part in parts)]
    for part, start, stop in reversed(list(zip(parts, starts, starts[1:], strict=False))):
        alone = codec.decode(part, ids[start:stop])
        there = kvtc.KVCache(whole.keys[:, :, start:stop], whole.values[:, :, start:stop])
        if digest(alone) != digest(there):
            found.append(f"tokens {start} to {stop - 1} alone")
    return found


def fitted_and_loaded() -> list[str]:
    """A tiny calibration as it was fitted and as it was loaded; streams one by one and in a batch."""
    from tests.builders import joint_calibration, told_cache, told_ids, told_model

    found = []
    with tempfile.TemporaryDirectory() as folder:
        joint_calibration().save(Path(folder, "file"))
        loaded = kvtc.load_calibration(Path(folder, "file"))
    for profile in ("paper", "joint", "conditional"):
        caches, ids = [told_cache(n, torch.bfloat16, n) for n in (90, 300)], [told_ids(n, n) for n in (90, 300)]
        codecs = [
            kvtc.Codec(which, profile, 6, chunk_tokens=64, model=told_model())
            for which in (joint_calibration(), loaded)
        ]
        streams = [[codec.encode(*both) for both in zip(caches, ids, strict=True)] for codec in codecs]
        decoded = [[codec.decode(*both) for both in zip(streams[0], ids, strict=True)] for codec in codecs]
        if digest(*streams[0], *decoded[0]) != digest(*streams[1], *decoded[1]):
            found.append(profile)
    return found


def real_case(folder: Path) -> None:
    """The reference model's own calibration, and its cache of a text."""
    from kvtc.huggingface.models import capture

    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    text = (ROOT / "src/kvtc/demo/conversation.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids * 2)[:400]
    cache = capture(model, ids)
    torch.save((cache.keys, cache.values), folder / "cache")
    torch.save(ids, folder / "ids")
    kvtc.reference_calibration().save(folder / "calibration")


def environment(setting: dict[str, str]) -> dict[str, str]:
    """Of a process under a setting."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {name: value for name, value in setting.items() if value != NATIVE}


def run(setting: dict[str, str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A program under a setting."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(setting), cwd=ROOT, capture_output=True, text=True, check=False)


def child(setting: dict[str, str], folder: Path) -> dict[str, Any]:
    """What a process under a setting makes of the case in a folder."""
    done = run(setting, ["-m", "tests.processors", "--child", str(folder)])
    if done.returncode:
        sys.exit(f"{setting}:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true", help="run the tests of the codec under every setting, too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"digests": digests(options.child), "differences": differences(options.child)}))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        real_case(Path(name))
        print(f"| {' | '.join(SETTINGS)} | streams | caches | inside |{' tests |' if options.suite else ''}")
        print("|" + "---|" * (len(SETTINGS) + 3 + options.suite))
        for setting in covering(SETTINGS):
            result = child(setting, Path(name))
            results.append(result)
            kinds = [
                digest(*(d.encode() for n, d in result["digests"].items() if n.endswith(k)))
                for k in ("stream", "cache")
            ]
            cells = [*setting.values(), *kinds, str(len(result["differences"])) + " differ"]
            if options.suite:
                files = [f"tests/{name}.py" for name in CORE]
                # torch's own attention in bfloat16 fails where it is held to less than a processor with AMX has.
                done = run(
                    setting,
                    ["-m", "pytest", "--no-header", "-p", "no:cacheprovider", "-k", "not reference_model", *files],
                )
                cells.append(done.stdout.splitlines()[-1])
                result["differences"] += [
                    line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
                ]
            print(f"| {' | '.join(cells)} |", flush=True)
    found = {line for result in results for line in result["differences"]}
    found |= {
        name for result in results for name, value in result["digests"].items() if value != results[0]["digests"][name]
    }
    for line in sorted(found):
        print(f"differs: {line}")
    print("all the same" if not found else f"{len(found)} differ")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
