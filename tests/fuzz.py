"""Random damage to small streams: only errors of the package may come of it, quickly and in little memory.

    python -m tests.fuzz --mutations 100000 --seed 0

Half of the mutated streams get right checksums again, so that the parser and the decoders behind it are reached.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import kvtc
from kvtc.cache import KVCache
from kvtc.codec import Codec
from kvtc.coding.lossless import CODER_IDS, compress
from kvtc.container import SectionType, parse_stream
from kvtc.errors import KvtcError

from .builders import (
    CHUNK_BYTES,
    GOLDEN_TOKEN_IDS,
    HEADER_BYTES,
    SECTION_BYTES,
    counts_of,
    gappy_cache,
    golden_cache,
    golden_codec,
    golden_joint_codec,
    joint_codec,
    random_cache,
    reseal,
    sections_of,
    tiny_codec,
    told_cache,
    told_gappy_cache,
    told_ids,
    with_section,
)

SECONDS_EACH = 10
MEMORY_GROWTH_BYTES = 64 << 20
WARM_UP = 1000
SEVERAL_LANES_TOKENS = 700

# (offset, layout) of the fields of docs/format.md; checksums are left out, the reseal sees to them.
HEADER_FIELDS = [
    (0, "I"), (4, "B"), (5, "B"), (6, "B"), (7, "B"), (8, "Q"), (24, "H"), (26, "H"), (28, "H"), (30, "H"), (32, "H"),
    (34, "H"), (36, "I"), (40, "I"), (44, "I"), (48, "I"),
]  # fmt: skip
CHUNK_FIELDS = [(0, "I"), (4, "H"), (6, "H"), (8, "H"), (10, "H"), (12, "Q")]
SECTION_FIELDS = [(0, "B"), (1, "B"), (2, "H"), (4, "I"), (8, "I"), (12, "I")]
RUN_FIELDS = [(0, "I"), (4, "H"), (6, "H"), (8, "B")]


@dataclass(frozen=True)
class Target:
    """A valid stream, its parts for mutations that know them, and the codec that decodes it.

    final: the sections that no lossless coder may be applied to. token_ids: those without which it does not decode.
    """

    codec: Codec
    stream: bytes
    raw_sections: tuple[bytes, ...]
    final: frozenset[int]
    n_tokens: int
    token_ids: Sequence[int] | None

    def decode(self, data: bytes, **arguments: Any) -> Any:
        """`Codec.decode`, with token ids where they are needed."""
        return self.codec.decode(data, **({"token_ids": self.token_ids} | arguments))


def make_targets() -> list[Target]:
    """Streams of few bytes that together have every kind of section, dtype, coder and flag."""
    from transformers import DynamicCache

    small = {"sink_tokens": 1, "window_tokens": 1}
    of_a_model = random_cache(6, torch.bfloat16)
    model_cache = DynamicCache()
    for layer in range(of_a_model.n_layers):
        model_cache.update(of_a_model.keys[None, layer], of_a_model.values[None, layer], layer)
    made: list[tuple[Codec, bytes, Sequence[int] | None]] = [
        (golden_codec(), golden_codec().encode(golden_cache(), GOLDEN_TOKEN_IDS), None)
    ]
    for codec, cache, ids in (
        (golden_joint_codec("joint"), golden_cache(), GOLDEN_TOKEN_IDS),
        (golden_joint_codec("conditional"), golden_cache(), GOLDEN_TOKEN_IDS),
        (joint_codec("joint", step=0.05, chunk_tokens=64), told_cache(45), None),
        (joint_codec("joint", step=20.0), *told_gappy_cache(20)),
        # Tokens enough for a second lane of the coder.
        (joint_codec("joint", step=2.0, chunk_tokens=1024), told_cache(SEVERAL_LANES_TOKENS), None),
        (joint_codec("conditional", step=0.5, window_tokens=0), told_cache(20, torch.bfloat16), told_ids(20)),
        (joint_codec("conditional", ratio=8, sink_format="fp8"), *told_gappy_cache(30)),
        (joint_codec("joint", ratio=8, fixed_size=True), told_cache(30, torch.bfloat16), told_ids(30)),
        (joint_codec("conditional", window_tokens=9, window_format="coded"), *told_gappy_cache(30)),
    ):
        known = None if ids is None else list(map(int, ids))
        needed = known if codec.settings.profile == "conditional" else None
        made.append((codec, codec.encode(cache, known), needed))
    for options, cache, ids in (
        ({"lossless": "deflate", "sink_format": "fp8"}, random_cache(9, torch.bfloat16), range(9)),
        ({"lossless": "none", "window_tokens": 0}, gappy_cache(9, torch.float16), None),
        ({"lossless": "zstd", "chunk_tokens": 32}, random_cache(40, torch.bfloat16, first_position=20), None),
        ({"lossless": "lz4", "allocation": "truncate"}, random_cache(7, torch.float8_e4m3fn), range(7)),
        ({"lossless": "deflate", "sink_tokens": 0}, gappy_cache(6, torch.float8_e5m2), range(6)),
        ({"lossless": "deflate", "chunk_tokens": 64}, random_cache(5), None),
        ({"lossless": "lz4"}, model_cache, None),
        ({}, random_cache(0), None),
    ):
        codec = tiny_codec(**(small | options))
        made.append((codec, codec.encode(cache, ids), None))
    targets = []
    for codec, stream, needed in made:
        parsed = parse_stream(stream)
        raw = tuple(parsed.read(s.type, s.chunk, s.raw_bytes) for s in parsed.sections)
        is_final = parsed.header.profile != "paper"
        finished = {SectionType.BODY, SectionType.PADDING} if is_final else set()
        finished |= {SectionType.WINDOW} if any(chunk.coded_window for chunk in parsed.chunks) else set()
        final = frozenset(i for i, s in enumerate(parsed.sections) if s.type in finished)
        targets.append(Target(codec, stream, raw, final, parsed.n_tokens, needed))
    return targets


def draw_of(seed: int, number: int) -> random.Random:
    """The choices of one mutation."""
    return random.Random(f"{seed}:{number}")


def interesting(draw: random.Random, width: int, old: int) -> int:
    """A number of `width` bytes that a careless parser may stumble over."""
    top = 1 << 8 * width
    choices = [0, 1, 2, 3, 4, 8, 16, top - 1, top - 2, top >> 1, (top >> 1) - 1, old + 1, old - 1, old * 2, old // 2]
    choices += [1 << draw.randrange(8 * width), draw.randrange(top), draw.randrange(min(top, 64))]
    return draw.choice(choices) % top


def set_field(draw: random.Random, data: bytearray, offset: int, layout: str) -> None:
    if offset + struct.calcsize(layout) <= len(data):
        (old,) = struct.unpack_from("<" + layout, data, offset)
        struct.pack_into("<" + layout, data, offset, interesting(draw, struct.calcsize(layout), old))


def flip_bit(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def set_byte(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    data[draw.randrange(len(data))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])


def insert(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    place = draw.randrange(len(data) + 1)
    data[place:place] = draw.randbytes(draw.randint(1, 24))


def delete(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    place = draw.randrange(len(data))
    del data[place : place + draw.randint(1, 24)]


def cut(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    del data[draw.randrange(len(data)) :]


def repeat(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    start, place = draw.randrange(len(data)), draw.randrange(len(data))
    data[place:place] = data[start : start + draw.randint(1, 200)]


def splice(draw: random.Random, data: bytearray, targets: list[Target]) -> None:
    other = draw.choice(targets).stream
    if draw.random() < 0.5:
        data[draw.randrange(len(data)) :] = other[draw.randrange(len(other)) :]
    else:
        # The same range of both: fields stay fields.
        start = draw.randrange(min(len(data), len(other)))
        stop = start + draw.randint(1, 100)
        data[start:stop] = other[start:stop]


def set_header_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    set_field(draw, data, *draw.choice(HEADER_FIELDS))


def set_chunk_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    n_chunks = min(counts_of(data)[0], 8)
    if n_chunks:
        offset, layout = draw.choice(CHUNK_FIELDS)
        set_field(draw, data, HEADER_BYTES + CHUNK_BYTES * draw.randrange(n_chunks) + offset, layout)


def move_tokens(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    """Tokens from one region of a chunk to another: the total stays right."""
    if counts_of(data)[0] and len(data) >= HEADER_BYTES + CHUNK_BYTES:
        counts = list(struct.unpack_from("<3H", data, HEADER_BYTES + 4))
        source, sink = draw.sample(range(3), 2)
        moved = draw.randint(0, counts[source])
        counts[source], counts[sink] = counts[source] - moved, (counts[sink] + moved) % 65536
        struct.pack_into("<3H", data, HEADER_BYTES + 4, *counts)


def set_section_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    n_chunks, n_sections = counts_of(data)
    if 0 < n_sections < 100 and n_chunks < 100:
        offset, layout = draw.choice(SECTION_FIELDS)
        entry = HEADER_BYTES + CHUNK_BYTES * n_chunks + SECTION_BYTES * draw.randrange(n_sections)
        set_field(draw, data, entry + offset, layout)


def set_allocation_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    sections = sections_of(data[:100_000]) if counts_of(data)[1] < 100 else []
    if sections:
        _, start, length = sections[0]
        offset, layout = draw.choice([(0, "H"), *((2 + place, layout) for place, layout in RUN_FIELDS)])
        set_field(draw, data, start + offset + 9 * draw.randrange(max(1, length // 9)), layout)


def set_step(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    """Another step where the rate is one: other coefficients are coded then, with other tables."""
    sections = sections_of(data[:100_000]) if counts_of(data)[1] < 100 else []
    if sections and sections[0][2] == 4 and sections[0][1] + 4 <= len(data):
        step = draw.choice([2.0 ** draw.uniform(-24, 12), 0.0, -1.0, float("inf"), float("nan"), 1e-45])
        struct.pack_into("<f", data, sections[0][1], step)


def set_coder_state(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    """Where a body of rANS says how long it is and where its lanes start, or among its words: all that its decoder is led by."""
    sections = sections_of(data[:100_000]) if counts_of(data)[1] < 100 else []
    bodies = [section for section in sections if data[section[0] : section[0] + 1] == bytes([SectionType.BODY])]
    if bodies and sections[0][2] == 4:
        entry, start, _ = draw.choice(bodies)
        (chunk,) = struct.unpack_from("<I", data, entry + 4)
        if chunk < counts_of(data)[0]:
            (n_tokens,) = struct.unpack_from("<H", data, HEADER_BYTES + CHUNK_BYTES * chunk + 6)
            # The length, up to two lanes, and the first words behind them.
            set_field(draw, data, start + -(-n_tokens // 4) + 4 * draw.randrange(5), "I")


def replace_section(draw: random.Random, target: Target) -> bytearray:
    """A section that decodes well, to bytes that are wrong in content or in number."""
    number = draw.randrange(len(target.raw_sections))
    raw = bytearray(target.raw_sections[number])
    for _ in range(draw.randint(0, 3)):
        kind = draw.random()
        if kind < 0.6:
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        elif kind < 0.8:
            set_field(draw, raw, draw.randrange(len(raw)), draw.choice("HI"))
        elif kind < 0.9:
            raw += bytes(draw.randint(1, 300_000))
        else:
            del raw[draw.randrange(1, len(raw) + 1) :]
        if not raw:
            break
    coder = draw.choice(list(CODER_IDS)[:2] + list(CODER_IDS))
    is_final = number in target.final and draw.random() < 0.9
    coder = "none" if is_final else coder
    stored = bytearray(compress(bytes(raw), coder))
    if stored and draw.random() < 0.3:
        stored[draw.randrange(len(stored))] ^= 1 << draw.randrange(8)
    claimed = len(raw) if is_final or draw.random() < 0.5 else len(target.raw_sections[number])
    return bytearray(with_section(target.stream, number, bytes(stored), CODER_IDS[coder], claimed))


MUTATIONS: list[Callable[[random.Random, bytearray, list[Target]], None]] = [
    flip_bit, set_byte, insert, delete, cut, repeat, splice, set_header_field, set_chunk_field, move_tokens,
    set_section_field, set_allocation_field, set_step, set_coder_state,
]  # fmt: skip


def mutate(draw: random.Random, targets: list[Target]) -> tuple[Target, bytes]:
    target = draw.choice(targets)
    data = replace_section(draw, target) if draw.random() < 0.2 else bytearray(target.stream)
    for _ in range(draw.choice([0, 1, 1, 2, 4]) if data != target.stream else draw.choice([1, 1, 1, 2, 4])):
        if len(data) >= HEADER_BYTES:
            draw.choice(MUTATIONS)(draw, data, targets)
    return target, reseal(data) if draw.random() < 0.5 and counts_of_fit(data) else bytes(data)


def counts_of_fit(data: bytearray) -> bool:
    """Whether the tables may be there at all: making millions of checksums right is no test."""
    return len(data) >= HEADER_BYTES and max(counts_of(data)) < 10_000


def try_to_decode(draw: random.Random, target: Target, data: bytes) -> None:
    """Everything that reads a stream. Raises `KvtcError`, or returns; anything else is a failure."""
    arguments: dict[str, Any] = {}
    if draw.random() < 0.2:
        arguments["tokens"] = draw.randint(0, target.n_tokens)
    if draw.random() < 0.2:
        arguments["token_ids"] = draw.choice([range(target.n_tokens), None])
    if draw.random() < 0.2:
        arguments["start_position"] = draw.choice([0, 5, 2**31 - 100])
    info = kvtc.inspect(data)
    parts = kvtc.split_stream(data)
    assert not parts or kvtc.join_streams(parts) == data, "split and joined, the stream is another one"
    decoded = target.decode(data, **arguments)
    if isinstance(decoded, KVCache):
        assert decoded.n_tokens == arguments.get("tokens", info.n_tokens)
        decoded.describe()


@contextmanager
def limited_seconds(seconds: float):
    """Raises TimeoutError in the block when the time is up."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Report:
    """What came of a run."""

    outcomes: Counter[str]
    failures: list[str]
    seconds: float
    memory_growth: int


def run(mutations: int, seed: int, first: int = 0, verbose: bool = False) -> Report:
    """Mutations `first` to `first + mutations` of a seed. Each is drawn from the seed and its own number alone."""
    targets = make_targets()
    for target in targets:
        target.decode(target.stream)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    started, floor = time.monotonic(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(first, first + mutations):
            if number - first == min(WARM_UP, mutations // 2):
                floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            draw = draw_of(seed, number)
            target, data = mutate(draw, targets)
            try:
                with limited_seconds(SECONDS_EACH):
                    try_to_decode(draw, target, data)
                outcomes["decoded"] += 1
            except KvtcError as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:  # noqa: BLE001 - any other error at all is what is looked for
                outcomes["FAILURE"] += 1
                failures.append(
                    f"{type(error).__name__}: {error}; reproduce: python -m tests.fuzz --seed {seed} --first {number} --mutations 1"
                )
                if verbose:
                    traceback.print_exc()
                    print(failures[-1], file=sys.stderr)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - floor) * (1 if sys.platform == "darwin" else 1024)
    return Report(outcomes, failures, time.monotonic() - started, growth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation, to reproduce one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = run(options.mutations, options.seed, options.first, verbose=True)
    print(f"{options.mutations} mutations in {report.seconds:.0f} s, {options.mutations / report.seconds:.0f} a second")
    for name, count in report.outcomes.most_common():
        print(f"{count:9d}  {name}")
    print(f"peak memory grew by {report.memory_growth / 2**20:.1f} MiB")
    too_much = report.memory_growth > MEMORY_GROWTH_BYTES
    if too_much:
        print(f"FAILURE: at most {MEMORY_GROWTH_BYTES >> 20} MiB were allowed", file=sys.stderr)
    return 1 if report.failures or too_much else 0


if __name__ == "__main__":
    sys.exit(main())
