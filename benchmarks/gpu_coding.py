"""Encoding and decoding for `gpu.py`: whole, by stage, against the product alone; and the gate before anything is timed."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvtc
import kvtc.codec
from gpu_cases import CHUNK_TOKENS, SHAPES, Drawn, Shape, caches, calibration_for, drawn
from gpu_clock import Clock, StageClock
from kvtc.backends import CodedIntegers, ReferenceBackend, make_backend
from kvtc.calibration import Calibration
from kvtc.coding.allocation import allocate_bits
from kvtc.coding.uniform import column_classes
from kvtc.profiles import paper
from kvtc.profiles.coefficients import JointTransform
from kvtc.sealed_stream import StreamDraft

RATIOS = {"paper": {6000: 16, 10000: 16}, "joint": {3000: 128, 6000: 64, 10000: 32}}
RATIOS["conditional"] = RATIOS["joint"]
"""About 3 to 4 bits a coefficient; `paper` at the ratio that is published with it."""
SMALL_RANKS = {3000: 24, 6000: 32, 10000: 40}


@dataclass(frozen=True)
class Case:
    """A profile at a rank on a shape. lossless: of the sections that are not entropy-coded yet."""

    shape: str
    profile: str
    rank: int
    lossless: str = "none"

    @property
    def name(self) -> str:
        return "-".join([self.shape, self.profile, str(self.rank), *([self.lossless] * (self.lossless != "none"))])


@dataclass(frozen=True)
class Setting:
    """How pieces are run."""

    device: torch.device
    backend: str
    clock: Clock
    is_small: bool

    def shape(self, name: str) -> Shape:
        return SHAPES[name].small() if self.is_small else SHAPES[name]

    def rank(self, rank: int) -> int:
        return SMALL_RANKS[rank] if self.is_small else rank

    @property
    def gate_tokens(self) -> int:
        """Tokens that the gate compares: more than a chunk, but where kernels are interpreted, which takes long."""
        return 300 if self.device.type == "cuda" or self.backend != "triton" else 12

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def codec(self, calibration: Calibration, case: Case) -> kvtc.Codec:
        """No window: every token past the sinks is coded, as engines with prefix caching need it. The step is fixed."""
        options: dict[str, Any] = {"window_tokens": 0, "lossless": case.lossless, "chunk_tokens": CHUNK_TOKENS}
        ratio = 16 if self.is_small else RATIOS[case.profile][case.rank]
        if case.profile == "paper":
            options["ratio"] = ratio
        else:
            joint = calibration.joint
            model = joint.coefficients if case.profile == "joint" else joint.tokens.coefficients
            options["step"] = model.step_for(32 * calibration.geometry.row_features / ratio)
        return kvtc.Codec(calibration, case.profile, device=self.device, backend=self.backend, **options)


def measure_case(case: Case, setting: Setting) -> dict[str, Any]:
    """Encode and decode of every batch of the shape."""
    calibration = calibration_for(setting.shape(case.shape), case.profile, setting.rank(case.rank), setting.device)
    codec = setting.codec(calibration, case)
    found = []
    for batch in setting.shape(case.shape).batches:
        drawn_caches = list(caches(calibration, case.profile, batch, setting.device))
        found.append(measure_batch(codec, drawn_caches, batch, setting))
        del drawn_caches
        setting.free()
    geometry = calibration.geometry
    sizes = {"n_layers": geometry.n_layers, "n_kv_heads": geometry.n_kv_heads, "head_dim": geometry.head_dim}
    return {
        "case": vars(case) | {"rank": setting.rank(case.rank)},
        "backend": codec.backend.name,
        **sizes,
        "batches": found,
    }


def measure_batch(
    codec: kvtc.Codec, sequences: list[Drawn], batch: tuple[int, int], setting: Setting
) -> dict[str, Any]:
    clock, ids = setting.clock, [part.token_ids for part in sequences]

    def encode() -> list[bytes]:
        return [codec.encode(part.cache, part.token_ids) for part in sequences]

    streams = encode()
    encode_seconds = clock.median(encode)
    stages = {"encode": stage_medians(encode, encode_stages(codec), setting)}
    information = [kvtc.inspect(stream) for stream in streams]
    error = relative_error(codec.decode(streams[0], ids[0]), sequences[0].cache)
    coefficients = [decoded_widths(codec, streams[0], ids[0])]
    sequences.clear()
    setting.free()

    def decode() -> Any:
        return decode_all(codec, streams, ids)

    decode_seconds = clock.median(decode)
    stages["decode"] = stage_medians(decode, decode_stages(codec), setting)
    product = product_seconds(codec, batch[0] * batch[1], coefficients[0], setting)
    coded = sum(map(len, streams))
    original = sum(one.original_bytes for one in information)
    copy = clock.median(
        lambda: [torch.frombuffer(bytearray(one), dtype=torch.uint8).to(setting.device) for one in streams]
    )
    return {
        "sequences": batch[0],
        "tokens": batch[1],
        "coded_bytes": coded,
        "original_bytes": original,
        "body_ratio": sum(one.body_ratio or 0 for one in information) / len(information),
        "total_ratio": original / coded,
        "conversations_per_gib": {"raw": batch[0] * 2**30 / original, "coded": batch[0] * 2**30 / coded},
        "relative_error": error,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "copy_to_device_alone_seconds": copy,
        "product_alone_seconds": product,
        "decode_over_product": decode_seconds / product,
        "coefficients": coefficients[0],
        "stages": stages,
    }


def decode_all(codec: kvtc.Codec, streams: list[bytes], ids: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A batch of streams of equal length at once -> keys and values, [B, H, T, D] of each layer."""
    cache, _ = codec.decode_batch(streams, ids)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def relative_error(found: kvtc.KVCache, expected: kvtc.KVCache) -> float:
    """Frobenius, over keys and values."""
    off = sum(float((a.float() - b.float()).square().sum()) for a, b in layers_of(found, expected))
    size = sum(float(b.float().square().sum()) for _, b in layers_of(found, expected))
    return (off / size) ** 0.5


def layers_of(found: kvtc.KVCache, expected: kvtc.KVCache):
    for sides in ((found.keys, expected.keys), (found.values, expected.values)):
        yield from zip(*sides, strict=True)


def stage_medians(run: Any, stages: dict[str, tuple[Any, str]], setting: Setting) -> dict[str, float]:
    """Seconds of each stage, medians of runs of their own: hooks cost a little."""
    clock = StageClock(setting.device)
    runs = []

    def hooked_run() -> None:
        run()
        runs.append(clock.seconds())

    with clock.hooked(stages):
        counted = len(setting.clock.times(hooked_run))
    runs = runs[-counted:]
    return {name: statistics.median(found[name] for found in runs) for name in runs[0]}


def encode_stages(codec: kvtc.Codec) -> dict[str, tuple[Any, str]]:
    """What is not in one of the others stands under the stage around it."""
    shared = {
        "check the cache": (kvtc.KVCache, "validate"),
        "exact tokens": (kvtc.codec, "draft_stream"),
        "un-rotate": (codec.backend, "gather"),
        "lossless coding, container": (StreamDraft, "seal"),
        "rest of the profile": (codec._coder, "encode_all"),
    }
    if codec.settings.profile == "paper":
        return shared | {"transform": (paper, "project_from"), "quantize and pack": (codec.backend, "pack_groups")}
    return shared | {
        "transform and prediction": (JointTransform, "choices"),
        "round by cost": (codec.backend, "round"),
        "entropy-code": (codec.backend, "write_integers"),
    }


def decode_stages(codec: kvtc.Codec) -> dict[str, tuple[Any, str]]:
    """Copies to the device are where the backend makes them: within reading integers, or unpacking."""
    shared = {
        "read the streams": (kvtc.codec, "open_stream"),
        "inverse product": (codec._coder, "restore"),
        "rotate, scatter": (codec.backend, "place"),
        "exact tokens": (kvtc.codec.Restoration, "write_layer"),
    }
    if codec.settings.profile == "paper":
        return shared | {"unpack, dequantize": (codec.backend, "unpack_groups"), "join": (codec._coder, "decode")}
    return shared | {
        "entropy-decode, dequantize": (codec.backend, "read_integers"),
        "prediction": (codec._coder, "decode"),
    }


def decoded_widths(codec: kvtc.Codec, stream: bytes, ids: Tensor) -> list[int]:
    """Coefficients that the product multiplies, of keys and of values."""
    opened = kvtc.codec.open_stream(stream, codec.calibration, codec._coder_of, ids.numpy(), None)
    found = opened.coder.decode(opened.coded)
    return [part[0].shape[1] for part in found] if isinstance(found, list) else [found.shape[1]] * 2


def product_seconds(codec: kvtc.Codec, n_tokens: int, widths: list[int], setting: Setting) -> float:
    """The inverse product alone in bfloat16: of keys and of values, layer by layer as the decoder asks for it."""
    geometry, dtype = codec.calibration.geometry, torch.bfloat16
    size = geometry.n_kv_heads * geometry.head_dim
    operands = []
    for width in widths:
        rows = torch.randn(n_tokens, width, device=setting.device, dtype=dtype)
        operands.append((rows, torch.randn(size, width, device=setting.device, dtype=dtype)))
    mean = torch.randn(size, device=setting.device, dtype=dtype)

    def run() -> None:
        for _ in range(geometry.n_layers):
            for rows, columns in operands:
                torch.addmm(mean, rows, columns.T)

    return setting.clock.median(run)


def gate(setting: Setting) -> dict[str, Any]:
    """Whether the backend does what the reference does on this device; `passed` is False where anything differs."""
    small = Setting(setting.device, setting.backend, setting.clock, is_small=True)
    checks = {"entropy coding": _same_integers(small), "groups": _same_groups(small)}
    for profile in ("paper", "joint", "conditional"):
        checks[f"decoded, {profile}"] = _same_cache(Case("nemo", profile, 6000), small)
    backend = make_backend(setting.device, setting.backend)
    return {"backend": backend.name, "checks": checks, "passed": all(check["passed"] for check in checks.values())}


def _same_integers(setting: Setting) -> dict[str, Any]:
    """One set of coefficients, coded by both: equal bytes, and each reads the other's."""
    calibration = calibration_for(setting.shape("nemo"), "joint", 40, setting.device)
    model = calibration.joint.coefficients
    n, step = setting.gate_tokens, float(model.steps[len(model.steps) // 3])
    coefficients = drawn(model.deviations, n, torch.Generator(setting.device).manual_seed(3))
    classes = column_classes(model.deviations, step)
    spans = [slice(0, n // 4), slice(n // 4, n)]
    coded, values = [], []
    backends = ReferenceBackend(setting.device), make_backend(setting.device, setting.backend)
    for backend in backends:
        rounded = backend.round(coefficients, step, classes, model.tables)
        coded.append(backend.write_integers(rounded, spans, classes, model.tables))
    for backend in backends:
        chunks = [
            CodedIntegers(t.stop - t.start, c.activities, c.symbols, c.escapes, classes, model.tables, step)
            for t, c in zip(spans, coded[0], strict=True)
        ]
        values.append(backend.read_integers(chunks, len(classes)))
    off = float((values[0] - values[1]).abs().max()) / step
    return {"passed": coded[0] == coded[1] and off < 1e-3, "equal_bytes": coded[0] == coded[1], "off_in_steps": off}


def _same_groups(setting: Setting) -> dict[str, Any]:
    kind = calibration_for(setting.shape("nemo"), "paper", 40, setting.device).key
    allocation = allocate_bits(kind.distortion, 160)
    deviations = kind.basis.spectrum.sqrt().numpy()
    n = setting.gate_tokens
    coefficients = drawn(deviations, n, torch.Generator(setting.device).manual_seed(4))
    counts = [n // 4, n - n // 4]
    spans = [slice(0, counts[0]), slice(counts[0], n)]
    backends = ReferenceBackend(setting.device), make_backend(setting.device, setting.backend)
    packed = [backend.pack_groups(coefficients, spans, allocation) for backend in backends]
    values = [backend.unpack_groups(packed[0], counts, allocation) for backend in backends]
    off = float((values[0] - values[1]).abs().max()) / float(values[0].abs().max())
    return {"passed": packed[0] == packed[1] and off < 1e-6, "equal_bytes": packed[0] == packed[1], "off": off}


def _same_cache(case: Case, setting: Setting) -> dict[str, Any]:
    """One stream decoded by both, and encoded by either."""
    calibration = calibration_for(setting.shape(case.shape), case.profile, setting.rank(case.rank), setting.device)
    (sequence,) = caches(calibration, case.profile, (1, setting.gate_tokens), setting.device)
    reference = Setting(setting.device, "reference", setting.clock, is_small=True).codec(calibration, case)
    mine = setting.codec(calibration, case)
    stream = reference.encode(sequence.cache, sequence.token_ids)
    expected = reference.decode(stream, sequence.token_ids)
    off = relative_error(mine.decode(stream, sequence.token_ids), expected)
    own = mine.decode(mine.encode(sequence.cache, sequence.token_ids), sequence.token_ids)
    kept, lost = relative_error(own, sequence.cache), relative_error(expected, sequence.cache)
    # bfloat16 resolves 2 ** -8; products of other shapes round otherwise, an integer here and there differs.
    return {
        "passed": off < 4e-3 and abs(kept - lost) < 0.02 * lost + 1e-4,
        "off": off,
        "error": kept,
        "reference": lost,
    }
