"""Random damage to streams and files: only errors of the package may come of it, quickly and in little memory.

    python -m tests.fuzz --mutations 100000 --seed 0

Most inputs are small streams with damage; half of them get right checksums again, so that the parser and the decoders behind it are
reached. Some are streams of few bytes that claim much (`claims`), some are calibration and cache files with odd numbers and
metadata (`fuzz_files`), all under right checksums. What each may take in memory and time follows from its bytes.
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
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import kvtc
from kvtc.cache import CACHE_DTYPES, KVCache
from kvtc.codec.codec import Codec
from kvtc.codec.opened_stream import positions_of
from kvtc.coding.exact.channels import LEAST_TOKENS
from kvtc.coding.lossless import CODER_IDS, PROFILE, compress
from kvtc.container.groups import WINDOW
from kvtc.container.stream import Stream, parse_stream
from kvtc.container.tables import LOSSLESS, REGIONS, SectionType
from kvtc.errors import KvtcError
from kvtc.profiles.rates import Truncation

from . import claims, fuzz_files
from .builders import (
    CHUNK_BYTES,
    GOLDEN_TOKEN_IDS,
    GROUP_BYTES,
    HEADER_BYTES,
    N_GROUPS_AT,
    RUN_BYTES,
    SECTION_BYTES,
    counts_of,
    gappy_cache,
    golden_cache,
    golden_codec,
    golden_conditional_cache,
    golden_joint_codec,
    golden_latent_cache,
    golden_latent_codec,
    groups_end,
    joint_calibration,
    joint_codec,
    random_cache,
    reseal,
    section_table_at,
    sections_of,
    tiny_codec,
    told_cache,
    told_gappy_cache,
    told_ids,
    with_section,
)
from .tiny_architectures import mixed_cache, mixed_calibration, random_ids, tiny_model, windowed_calibration

# What one input may take: so much, and so much more for each of its bytes. Time is the processor's; memory is what is resident.
# At rest the slowest input takes a fifth of its time; beside other processes it has taken half of it.
SECONDS, SECONDS_A_BYTE = 6.0, 1.2e-5
MEMORY, MEMORY_A_BYTE = 40 << 20, 24
GROUPED = ("gemma3_text", "mistral", "nemotron_h", "deepseek_v32", "falcon_h1", "mamba2", "minimax", "deepseek_v4")
"""Tiny models that together have groups of every kind."""
MAX_TOKENS = 2048
"""That a stream may make a codec decode."""
SECONDS_UNTIL_STUCK = 60
MEMORY_GROWTH_BYTES = 64 << 20
WARM_UP = 1000
SEVERAL_LANES_TOKENS = 700

# (offset, layout) of the fields of docs/format.md; checksums are left out, the reseal sees to them.
HEADER_FIELDS = [
    (0, "I"), (4, "B"), (5, "B"), (6, "B"), (7, "B"), (8, "Q"), (24, "I"), (28, "I"), (32, "I"),
]  # fmt: skip
GROUP_FIELDS = [
    (0, "B"), (1, "B"), (2, "H"), (4, "H"), (6, "H"), (8, "H"), (10, "H"), (12, "H"), (14, "H"), (16, "I"),
]  # fmt: skip
CHUNK_FIELDS = [(0, "I"), (4, "H"), (6, "H"), (8, "H"), (10, "H"), (12, "Q")]
SECTION_FIELDS = [(0, "B"), (1, "B"), (2, "H"), (4, "I"), (8, "I"), (12, "I")]
RUN_FIELDS = [(0, "I"), (4, "H"), (6, "H"), (8, "B")]


@dataclass(frozen=True)
class Target:
    """A valid stream, its parts for mutations that know them, and the codec that decodes it.

    final: the sections that no lossless coder may be applied to. token_ids: those without which it does not decode.
    is_point: whether it is a resume point alone.
    """

    codec: Codec
    stream: bytes
    raw_sections: tuple[bytes, ...]
    final: frozenset[int]
    n_tokens: int
    token_ids: Sequence[int] | None
    is_point: bool = False

    def decode(self, data: bytes, **arguments: Any) -> Any:
        """`Codec.decode`, with token ids where they are needed, or `Codec.decode_point`."""
        if self.is_point:
            return self.codec.decode_point(data)
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
        (golden_joint_codec("conditional"), golden_conditional_cache(), GOLDEN_TOKEN_IDS),
        (golden_latent_codec(), golden_latent_cache(), GOLDEN_TOKEN_IDS),
        (joint_codec("joint", step=0.05, chunk_tokens=64), told_cache(45), None),
        (joint_codec("joint", step=20.0), *told_gappy_cache(20)),
        # Tokens enough for a second lane of the coder.
        (joint_codec("joint", step=2.0, chunk_tokens=1024), told_cache(SEVERAL_LANES_TOKENS), None),
        (joint_codec("conditional", step=0.5, window_tokens=0), told_cache(20, torch.bfloat16), told_ids(20)),
        (joint_codec("conditional", ratio=8, sink_format="fp8"), told_cache(30, torch.bfloat16), told_ids(30)),
        (joint_codec("joint", ratio=8, fixed_size=True), told_cache(30, torch.bfloat16), told_ids(30)),
        (
            joint_codec("conditional", window_tokens=9, window_format="coded"),
            told_cache(30, torch.bfloat16),
            told_ids(30),
        ),
        (joint_codec("joint", window_tokens=9, window_format="coded"), *told_gappy_cache(30)),
    ):
        known = None if ids is None else list(map(int, ids))
        needed = known if codec.settings.profile == "conditional" else None
        made.append((codec, codec.encode(cache, known), needed))
    for options, cache, ids in (
        ({"coder": "deflate", "sink_format": "fp8"}, random_cache(9, torch.bfloat16), range(9)),
        ({"coder": "none", "window_tokens": 0}, gappy_cache(9, torch.float16), None),
        ({"coder": "zstd", "chunk_tokens": 32}, random_cache(40, torch.bfloat16, first_position=20), None),
        ({"coder": "lz4", "ratio": None, "rate": Truncation(4)}, random_cache(7, torch.float8_e4m3fn), range(7)),
        ({"coder": "deflate", "sink_tokens": 0}, gappy_cache(6, torch.float8_e5m2), range(6)),
        ({"coder": "deflate", "chunk_tokens": 64}, random_cache(5), None),
        ({"coder": "lz4"}, model_cache, None),
        ({}, random_cache(0), None),
        *(({"lossless": True, "ratio": None}, gappy_cache(9, dtype), None) for dtype in CACHE_DTYPES),
        # Tokens enough for the coder of channels.
        ({"lossless": True, "ratio": None}, random_cache(LEAST_TOKENS, torch.bfloat16), None),
    ):
        codec = tiny_codec(**(small | options))
        made.append((codec, codec.encode(cache, ids), None))
    of_points: list[bytes] = []
    for name in GROUPED:
        # States alone do not say how many tokens they have read.
        ids, points = random_ids(1, 21), kvtc.ResumePoints(8)
        model_cache = kvtc.prefill(tiny_model(name), ids, points)
        codec = Codec(lossless=True, chunk_tokens=8, coder="none" if name == "gemma3_text" else "deflate")
        made.append((codec, codec.encode(model_cache, ids), None))
        made.append((codec, codec.encode(model_cache, ids, points=points), None))
        rounding = Codec(lossless=True, chunk_tokens=8, states="int8" if name == "mamba2" else "int6")
        made.append((rounding, rounding.encode(model_cache, ids, points=points), None))
        if points.taken[16]:
            chunk = [one.span(10, 16, 16) for one in points.taken[16] if one.group.kind == WINDOW]
            for groups in (points.taken[16], chunk) if chunk else (points.taken[16],):
                of_points.append(codec.encode_point(groups, 16))
                made.append((codec, of_points[-1], None))
    calibrated = Codec(mixed_calibration(), ratio=3, sink_tokens=1, window_tokens=1, chunk_tokens=16)
    made.append((calibrated, calibrated.encode(mixed_cache(30)), None))
    for options in ({"window_format": "coded"}, {"sink_tokens": 6, "sink_format": "fp8"}):
        windowed = Codec(windowed_calibration(), **({"step": 0.1, "window_tokens": 2, "chunk_tokens": 8} | options))
        points = kvtc.ResumePoints(8)
        points.take(mixed_cache(8, part_of=21))
        made.append((windowed, windowed.encode(mixed_cache(21), points=points), None))
        for groups in (points.taken[8], [one.span(5, 8, 8) for one in points.taken[8] if one.group.kind == WINDOW]):
            of_points.append(windowed.encode_point(groups, 8))
            made.append((windowed, of_points[-1], None))
    targets = []
    for whole, stream, needed in made:
        codec = copy(whole)
        codec.max_tokens = MAX_TOKENS
        parsed = parse_stream(stream)
        raw = tuple(raw_section(parsed, number) for number in range(len(parsed.sections)))
        is_final = parsed.header.profile not in ("paper", LOSSLESS)
        finished = {SectionType.BODY, SectionType.PADDING} if is_final else set()
        finished |= {SectionType.WINDOW} if any(chunk.coded_window for chunk in parsed.chunks) else set()
        final = frozenset(
            i for i, s in enumerate(parsed.sections) if (s.type in finished and not s.group) or s.coder == PROFILE
        )
        targets.append(Target(codec, stream, raw, final, parsed.n_tokens, needed, stream in of_points))
    return targets


def raw_section(stream: Stream, number: int) -> bytes:
    """What a section holds, before lossless coding."""
    section = stream.sections[number]
    if section.group not in stream.header.others or section.type not in (*REGIONS, SectionType.STATE):
        return stream.read(section.type, section.chunk, section.raw_bytes)
    found = stream.read_group(section.group, section.chunk, section.chunk + 1)
    return next(data for one, data in found if one.type is section.type)


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


def set_group_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    """A field of an entry of the group table, or of a run of layers behind the entries."""
    n_groups = max(1, data[N_GROUPS_AT])
    if draw.random() < 0.2:
        place = HEADER_BYTES + GROUP_BYTES * n_groups
        set_field(draw, data, place + 2 * draw.randrange(2 * n_groups), "H")
    else:
        offset, layout = draw.choice(GROUP_FIELDS)
        set_field(draw, data, HEADER_BYTES + GROUP_BYTES * draw.randrange(n_groups) + offset, layout)


def add_group(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    """One entry more in the group table, of any kind, or one that is only claimed."""
    set_field(draw, data, N_GROUPS_AT, "B")
    end = groups_end(data)
    if draw.random() < 0.5 and 0 < data[N_GROUPS_AT] < 255 and len(data) >= end:
        entry = (
            bytes([draw.choice([*range(8), draw.randrange(256)])]) + data[HEADER_BYTES + 1 : HEADER_BYTES + GROUP_BYTES]
        )
        run = data[end - RUN_BYTES : end]
        struct.pack_into("<H", run, 0, draw.randrange(8))
        data[end:end] = run
        place = HEADER_BYTES + GROUP_BYTES * data[N_GROUPS_AT]
        data[place:place] = entry
        struct.pack_into("<H", data, place + 2, 1)
        data[N_GROUPS_AT] += 1


def set_chunk_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    n_chunks = min(counts_of(data)[0], 8)
    if n_chunks:
        offset, layout = draw.choice(CHUNK_FIELDS)
        set_field(draw, data, groups_end(data) + CHUNK_BYTES * draw.randrange(n_chunks) + offset, layout)


def move_tokens(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    """Tokens from one region of a chunk to another: the total stays right."""
    if counts_of(data)[0] and len(data) >= groups_end(data) + CHUNK_BYTES:
        counts = list(struct.unpack_from("<3H", data, groups_end(data) + 4))
        source, sink = draw.sample(range(3), 2)
        moved = draw.randint(0, counts[source])
        counts[source], counts[sink] = counts[source] - moved, (counts[sink] + moved) % 65536
        struct.pack_into("<3H", data, groups_end(data) + 4, *counts)


def set_section_field(draw: random.Random, data: bytearray, _: list[Target]) -> None:
    n_chunks, n_sections = counts_of(data)
    if 0 < n_sections < 100 and n_chunks < 100:
        offset, layout = draw.choice(SECTION_FIELDS)
        entry = section_table_at(data) + SECTION_BYTES * draw.randrange(n_sections)
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
            (n_tokens,) = struct.unpack_from("<H", data, groups_end(data) + CHUNK_BYTES * chunk + 6)
            # The length, up to two lanes, and the first words behind them.
            set_field(draw, data, start + -(-n_tokens // 4) + 4 * draw.randrange(5), "I")


def replace_section(draw: random.Random, target: Target) -> bytearray:
    """A section that decodes well, to bytes that are wrong in content or in number."""
    number = draw.choice([index for index, raw in enumerate(target.raw_sections) if raw])
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
    if is_final and parse_stream(target.stream).sections[number].coder == PROFILE:
        # What it claims are its rows.
        return bytearray(with_section(target.stream, number, bytes(stored)))
    return bytearray(with_section(target.stream, number, bytes(stored), CODER_IDS[coder], claimed))


MUTATIONS: list[Callable[[random.Random, bytearray, list[Target]], None]] = [
    flip_bit, set_byte, insert, delete, cut, repeat, splice, set_header_field, set_group_field, add_group, set_chunk_field,
    move_tokens,
    set_section_field, set_allocation_field, set_step, set_coder_state,
]  # fmt: skip


def mutate(draw: random.Random, targets: list[Target]) -> tuple[Target, bytes]:
    target = draw.choice(targets)
    data = replace_section(draw, target) if draw.random() < 0.2 else bytearray(target.stream)
    for _ in range(draw.choice([0, 1, 1, 2, 4]) if data != target.stream else draw.choice([1, 1, 1, 2, 4])):
        if len(data) >= HEADER_BYTES:
            draw.choice(MUTATIONS)(draw, data, targets)
    return target, reseal(data) if draw.random() < 0.5 and counts_of_fit(data) else bytes(data)


def draw_claim(draw: random.Random) -> bytes:
    """A stream of few bytes that claims much."""
    calibration, coder = joint_calibration(), draw.choice(list(claims.BLOCKS))
    n_tokens, n_chunks = draw.choice([1, 3, 256, 2048, 2049, 32768]), int(10 ** draw.uniform(0, 4))
    n_bytes = int(2 ** draw.uniform(8, 27))
    makers: list[Callable[[], bytes]] = [
        lambda: claims.inflated_rate(calibration, n_bytes, coder, draw.choice([claims.PAPER, claims.JOINT])),
        lambda: claims.many_tokens(calibration, 1 + n_chunks // 4, n_tokens, coder),
        lambda: claims.many_chunks(calibration, n_chunks, draw.choice([claims.PAPER, claims.JOINT])),
        lambda: claims.large_rate_of_many_parts(calibration, n_chunks, n_bytes >> 8),
        lambda: claims.uncoded_columns(calibration, 1 + n_chunks // 100, n_tokens),
        lambda: claims.states_alone(calibration, n_tokens),
        lambda: claims.exact_zeros(calibration, n_tokens, coder),
        lambda: claims.padded(calibration, n_bytes >> 6, draw.choice([None, 0, 1 << 31, 2**32 - 1])),
        lambda: claims.padded(calibration, n_bytes, coder=coder),
        lambda: claims.oversized_block(calibration, n_bytes >> 3, coder),
    ]
    return draw.choice(makers)()


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
    with suppress(KvtcError):
        parse_stream(data).verify()
        assert len(positions_of(data)) == info.n_tokens
    parts = kvtc.split_stream(data)
    assert not parts or kvtc.join_streams(parts) == data, "split and joined, the stream is another one"
    with suppress(KvtcError):
        target.codec.decode_point(data)
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
class Attempt:
    """One input, and what reads it."""

    kind: str
    n_bytes: int
    use: Callable[[], None]

    @property
    def seconds(self) -> float:
        """That it may take of the processor."""
        return SECONDS + SECONDS_A_BYTE * self.n_bytes

    @property
    def memory(self) -> float:
        """Bytes that it may take."""
        return MEMORY + MEMORY_A_BYTE * self.n_bytes


def draw_attempt(draw: random.Random, targets: list[Target], directory: Path) -> Attempt:
    """What to try: everything about it follows from the draw. directory: for files."""
    kind = draw.random()
    if kind < 0.04:
        damaged = fuzz_files.draw_file(draw)
        return Attempt("file", len(damaged.data), partial(fuzz_files.try_to_use, draw, damaged, directory))
    if kind < 0.08:
        target, claim = draw.choice(targets_of_claims(targets)), draw_claim(draw)
        return Attempt("claim", len(claim), partial(try_to_decode, draw, target, claim))
    target, data = mutate(draw, targets)
    return Attempt("stream", len(data), partial(try_to_decode, draw, target, data))


def targets_of_claims(targets: list[Target]) -> list[Target]:
    """Those whose codec is of the calibration that claims are made with."""
    return [target for target in targets if target.codec.calibration is joint_calibration()]


@contextmanager
def watched(attempt: Attempt, most: dict[str, float]):
    """Raises AssertionError behind the block if it took more memory or time than it may. most: the largest shares of that."""
    forget_peak()
    before, started = resident_bytes("VmRSS"), time.process_time()
    yield
    seconds, memory = time.process_time() - started, resident_bytes("VmHWM") - before
    for name, taken, allowed in (("time", seconds, attempt.seconds), ("memory", memory, attempt.memory)):
        most[name] = max(most.get(name, 0.0), taken / allowed)
    assert seconds <= attempt.seconds, (
        f"{seconds:.1f} s for {attempt.n_bytes} bytes; {attempt.seconds:.1f} were allowed"
    )
    assert memory <= attempt.memory, (
        f"{memory / 2**20:.0f} MiB for {attempt.n_bytes} bytes; {attempt.memory / 2**20:.0f} were allowed"
    )


def forget_peak() -> None:
    """From here on the peak is that of what follows (Linux; elsewhere it is that of the whole run)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(name: str) -> int:
    """VmRSS: resident now; VmHWM: at most since `forget_peak`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return peak_bytes()


def peak_bytes() -> int:
    """Resident at most, over the whole run."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Report:
    """What came of a run. most: the largest shares of the time and of the memory allowed that one input took."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    most: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    memory_growth: int = 0


def run(mutations: int, seed: int, first: int = 0, verbose: bool = False) -> Report:
    """Mutations `first` to `first + mutations` of a seed. Each is drawn from the seed and its own number alone."""
    targets = make_targets()
    for target in targets:
        target.decode(target.stream)
    report, started, floor = Report(), time.monotonic(), resident_bytes("VmRSS")
    with warnings.catch_warnings(), TemporaryDirectory() as directory:
        warnings.simplefilter("error")
        for number in range(first, first + mutations):
            if number - first == min(WARM_UP, mutations // 2):
                floor = resident_bytes("VmRSS")
            attempt = draw_attempt(draw_of(seed, number), targets, Path(directory))
            report.kinds[attempt.kind] += 1
            try:
                with limited_seconds(SECONDS_UNTIL_STUCK), watched(attempt, report.most):
                    outcome = outcome_of(attempt)
                report.outcomes[outcome] += 1
            except Exception as error:  # noqa: BLE001 - any other error at all is what is looked for
                report.outcomes["FAILURE"] += 1
                report.failures.append(
                    f"{attempt.kind}: {type(error).__name__}: {error}; "
                    f"reproduce: python -m tests.fuzz --seed {seed} --first {number} --mutations 1"
                )
                if verbose:
                    traceback.print_exc()
                    print(report.failures[-1], file=sys.stderr)
    report.seconds, report.memory_growth = time.monotonic() - started, resident_bytes("VmRSS") - floor
    return report


def outcome_of(attempt: Attempt) -> str:
    """The name of the package's error that came of it, or "used" where it is sound."""
    try:
        attempt.use()
    except KvtcError as error:
        return type(error).__name__
    return "used"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation, to reproduce one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = run(options.mutations, options.seed, options.first, verbose=True)
    print(f"{options.mutations} mutations in {report.seconds:.0f} s, {options.mutations / report.seconds:.0f} a second")
    for counter in (report.kinds, report.outcomes):
        print(*(f"{count:9d}  {name}" for name, count in counter.most_common()), "", sep="\n")
    print(
        *(f"one input took at most {share:.0%} of the {name} it was allowed" for name, share in report.most.items()),
        sep="\n",
    )
    print(f"memory grew by {report.memory_growth / 2**20:.1f} MiB over the run")
    too_much = report.memory_growth > MEMORY_GROWTH_BYTES
    if too_much:
        print(f"FAILURE: at most {MEMORY_GROWTH_BYTES >> 20} MiB were allowed", file=sys.stderr)
    return 1 if report.failures or too_much else 0


if __name__ == "__main__":
    sys.exit(main())
