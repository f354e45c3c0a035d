"""Encoding and decoding for `benchmarks.gpu`: whole, by stage, against the product alone."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvtc
import kvtc.codec.codec
from benchmarks.gpu.cases import CHUNK_TOKENS, SHAPES, Drawn, Shape, caches, calibration_for
from benchmarks.gpu.clock import Clock, StageClock, begin_peak, peak_bytes
from kvtc.calibration import Calibration
from kvtc.calibration.joint_calibration import CoefficientModel
from kvtc.codec.pipeline import Decoding
from kvtc.codec.sealed_stream import StreamDraft
from kvtc.coding.joint.uniform_quantizer import column_classes
from kvtc.container.stream import parse_stream
from kvtc.profiles.rates import Step

PAPER_RATIO = 16
"""At which the profile is published."""
RATIOS = {3000: 128, 6000: 64, 10000: 32}
"""Of `joint` and `conditional` by rank, for NeMo: about 3 to 4 bits a coefficient."""
SMALL_RANKS = {3000: 24, 6000: 32, 10000: 40}


@dataclass(frozen=True)
class Case:
    """A profile at a rank on a shape. coder: of the sections that are not entropy-coded yet."""

    shape: str
    profile: str
    rank: int
    coder: str = "none"

    @property
    def name(self) -> str:
        return "-".join([self.shape, self.profile, str(self.rank), *([self.coder] * (self.coder != "none"))])


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
        """Tokens that the gate compares: more than a chunk, but where kernels are interpreted,
        which takes long.
        """
        return 300 if self.device.type == "cuda" or self.backend != "triton" else 12

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def codec(self, calibration: Calibration, case: Case) -> kvtc.Codec:
        """At the step that the calibration expects to give the ratio, so that encoding searches
        none; `paper` has no step.
        """
        return self.at_expected_step(self.searching_codec(calibration, case), case)

    def searching_codec(self, calibration: Calibration, case: Case) -> kvtc.Codec:
        """No window: every token past the sinks is coded, as engines with prefix caching need it."""
        options: dict[str, Any] = {"window_tokens": 0, "coder": case.coder, "chunk_tokens": CHUNK_TOKENS}
        options |= {"device": self.device, "backend": self.backend, "ratio": self.ratio(case)}
        return kvtc.Codec(calibration, case.profile, **options)

    def at_expected_step(self, codec: kvtc.Codec, case: Case) -> kvtc.Codec:
        """The same codec, with the matrices of the one that searches."""
        if case.profile == "paper":
            return codec
        features = codec.calibration.geometry.joint_features
        return codec.with_rate(Step(coded_model(codec).step_for(16 * features / self.ratio(case))))

    def ratio(self, case: Case) -> float:
        """With `joint` and `conditional` what takes as many bits a coefficient of this shape as of
        NeMo.
        """
        if self.is_small or case.profile == "paper":
            return PAPER_RATIO
        features, of_nemo = (SHAPES[name].geometry.joint_features for name in (case.shape, "nemo"))
        return RATIOS[case.rank] * features / of_nemo


def measure_case(case: Case, setting: Setting) -> dict[str, Any]:
    """Encode and decode of every batch of the shape."""
    calibration = calibration_for(setting.shape(case.shape), case.profile, setting.rank(case.rank), setting.device)
    searching = setting.searching_codec(calibration, case)
    codec = setting.at_expected_step(searching, case)
    found = []
    for batch in setting.shape(case.shape).batches:
        drawn_caches = list(caches(calibration, case.profile, batch, setting.device))
        found.append(measure_batch(codec, searching, drawn_caches, batch, setting))
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
    codec: kvtc.Codec, searching: kvtc.Codec, sequences: list[Drawn], batch: tuple[int, int], setting: Setting
) -> dict[str, Any]:
    """searching: the same codec, but it is given the ratio and has to find the step."""
    clock, ids = setting.clock, [part.token_ids for part in sequences]

    def encode(with_codec: kvtc.Codec = codec) -> list[bytes]:
        return [with_codec.encode(part.cache, part.token_ids) for part in sequences]

    begin_peak(setting.device)
    streams = encode()
    peaks = {"encode": peak_bytes(setting.device)}
    encode_seconds = clock.median(encode)
    search_seconds = None if searching is codec else clock.median(lambda: encode(searching))
    stages = {"encode": stage_medians(encode, encode_stages(codec), setting)}
    information = [kvtc.inspect(stream) for stream in streams]
    error = relative_error(codec.decode(streams[0], ids[0]), sequences[0].cache)
    coefficients = [decoded_widths(codec, streams[0], ids[0])]
    sequences.clear()
    setting.free()

    def decode() -> Any:
        return decode_all(codec, streams, ids)

    begin_peak(setting.device)
    decode_seconds = clock.median(decode)
    peaks["decode"] = peak_bytes(setting.device)
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
        "encode_to_ratio_seconds": search_seconds,
        "decode_seconds": decode_seconds,
        "copy_to_device_alone_seconds": copy,
        "product_alone_seconds": product,
        "decode_over_product": decode_seconds / product,
        "coefficients": coefficients[0],
        "coded": coefficients[0]
        if searching is codec
        else len(column_classes(coded_model(codec).deviations, codec.rate.step)),
        "peak_bytes": peaks,
        "stages": stages,
    }


def coded_model(codec: kvtc.Codec) -> CoefficientModel:
    """The distribution of what `joint` codes."""
    return codec.calibration.joint.coefficients


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
    encoder = codec._encoder
    return {
        "check the cache": (kvtc.KVCache, "validate"),
        "exact tokens": (kvtc.codec.codec, "draft_stream"),
        "un-rotate": (codec.backend, "gather"),
        "predict": (encoder, "predict"),
        "project": (encoder, "project"),
        "search": (encoder, "search"),
        "quantize": (encoder, "quantize"),
        "entropy-code": (encoder, "entropy_code"),
        "lossless coding, container": (StreamDraft, "seal"),
    }


def decode_stages(codec: kvtc.Codec) -> dict[str, tuple[Any, str]]:
    """Copies to the device are where the backend makes them: within reading integers, or unpacking."""
    decoder = type(codec._profiles[codec.settings.profile].decoder())
    return {
        "read the streams": (kvtc.codec.codec, "open_stream"),
        "entropy-decode, dequantize": (decoder, "entropy_decode"),
        "add prediction": (decoder, "add_prediction"),
        "inverse product": (decoder, "reconstruct"),
        "rotate, scatter": (codec.backend, "place"),
        "exact tokens": (Decoding, "write_layer"),
    }


def decoded_widths(codec: kvtc.Codec, stream: bytes, ids: Tensor) -> list[int]:
    """Coefficients that the product multiplies, of keys and of values."""
    opened = codec._open(parse_stream(stream), ids.numpy(), None)
    found = opened.decoder.entropy_decode(opened.coded)
    if codec.settings.profile == "paper":
        return [side.coefficients.shape[1] for side in found]
    return [found.restorable.of_vectors.shape[1]] * 2


def product_seconds(codec: kvtc.Codec, n_tokens: int, widths: list[int], setting: Setting) -> float:
    """The inverse product alone in bfloat16: of keys and of values, layer by layer as the decoder
    asks for it.
    """
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
