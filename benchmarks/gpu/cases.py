"""What `benchmarks.gpu` measures on: caches in the geometry of large models, and calibrations that
give them realistic symbols.

Nothing is trained. Bases are random orthonormal columns. Deviations of coefficients are those
measured for the calibration that ships with kvtc, stretched to the rank asked for by interpolation
in log-log; probability tables are the shipped ones, for they belong to a ratio of deviation to step
and not to a model. Caches are bases times coefficients drawn with these deviations (normal, each
token's scale log-normal): at the shipped rank and equal steps their symbols cost 2 to 12 % more bits
than those of the texts it was calibrated on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

import kvtc
from kvtc.cache import CacheGeometry, KVCache
from kvtc.calibration import Calibration, SideCalibration
from kvtc.calibration.joint_calibration import CoefficientModel, JointCalibration
from kvtc.coding.joint.basis import JointBasis, joint_in_bytes
from kvtc.coding.joint.blocks import HeadBlocks
from kvtc.coding.joint.metric import Metric
from kvtc.coding.joint.rounding import round_coefficients
from kvtc.coding.joint.uniform_quantizer import N_ACTIVITIES, column_classes
from kvtc.coding.paper.distortion import measure_distortion
from kvtc.coding.rope import Rope, RopeTable, turn_in_place
from kvtc.coding.transform import Basis

CHUNK_TOKENS = 256
TOKEN_SPREAD = 0.3
"""Standard deviation of the logarithm of a token's scale."""
DISTORTION_ROWS, CURVE_ROWS = 128, 64
STEPS = 28


@dataclass(frozen=True)
class Shape:
    """A model's sizes, or those of one of its ranks."""

    name: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_heads: int
    hidden: int
    mlp: int
    vocabulary: int
    batches: tuple[tuple[int, int], ...] = ((8, 8192), (2, 16384))

    @property
    def geometry(self) -> CacheGeometry:
        frequencies = 1e6 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        rope = Rope((RopeTable(tuple(frequencies.tolist())),), (0,) * self.n_layers)
        return CacheGeometry(tuple(range(self.n_layers)), 0, self.n_kv_heads, self.head_dim, self.head_dim, rope)

    def small(self) -> "Shape":
        """A model of the same form on which a CPU can run everything."""
        return Shape(f"{self.name} (small)", 3, min(2, self.n_kv_heads), 16, 4, 64, 128, 512, ((2, 300), (1, 520)))


SHAPES = {
    "nemo": Shape("Mistral NeMo 12B", 40, 8, 128, 32, 5120, 14336, 131072),
    "llama8": Shape("Llama 3.1 8B", 32, 8, 128, 32, 4096, 14336, 128256, ((8, 8192),)),
    "llama70": Shape("Llama 3.3 70B, one of 8 ranks", 80, 1, 128, 8, 8192, 3584, 128256, ((8, 8192),)),
}


@cache
def shipped() -> Calibration:
    return kvtc.reference_calibration()


def stretched(deviations: np.ndarray, rank: int) -> np.ndarray:
    """Deviations [r0], falling -> [rank], from the same first to the same last one; float32."""
    places = np.log(np.linspace(1, len(deviations), rank))
    known = np.log(np.arange(1, len(deviations) + 1))
    return np.exp(np.interp(places, known, np.log(deviations.astype(np.float64)))).astype(np.float32)


def drawn(deviations: np.ndarray, n_tokens: int, generator: torch.Generator) -> Tensor:
    """Coefficients [n_tokens, r] float32 on the generator's device."""
    device = generator.device
    scales = (TOKEN_SPREAD * torch.randn(n_tokens, 1, generator=generator, device=device)).exp()
    noise = torch.randn(n_tokens, len(deviations), generator=generator, device=device)
    return noise * scales * torch.from_numpy(deviations).to(device)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] float16 on the generator's device; by Cholesky, as a QR decomposition of this
    size takes long.
    """
    random = torch.randn(rows, columns, generator=generator, device=generator.device)
    if rows < 4 * columns:
        return torch.linalg.qr(random).Q.half()
    factor = torch.linalg.cholesky(random.T @ random)
    return torch.linalg.solve_triangular(factor, random.T, upper=False).T.half()


def coefficient_model(measured: CoefficientModel, rank: int) -> CoefficientModel:
    """The shipped model stretched to a rank; its curve is measured again, on coefficients drawn for
    it.
    """
    deviations = stretched(measured.deviations, rank)
    sample = drawn(deviations, CURVE_ROWS, torch.Generator().manual_seed(0))
    steps, bits = [], []
    for step in float(deviations[0]) * np.exp2(1 - np.arange(STEPS) / 2):
        classes = column_classes(deviations, float(step))
        if len(classes):
            steps.append(float(step))
            rounded = round_coefficients(sample, float(step), classes, measured.tables)
            bits.append(float(rounded.bits.mean()) + np.log2(N_ACTIVITIES))
    return CoefficientModel(deviations, measured.tables, np.array(steps), np.maximum.accumulate(bits))


def calibration_for(shape: Shape, profile: str, rank: int, device: torch.device) -> Calibration:
    """A calibration that serves a profile at a rank, its large tensors on the device."""
    generator = torch.Generator(device).manual_seed(rank)
    geometry = shape.geometry
    p = geometry.side_features[0]
    kind_rank = min(rank if profile == "paper" else 16, p)
    key, value = (_kind(p, kind_rank, generator) for _ in range(2))
    calibration = Calibration(geometry, key, value, {})
    if profile == "paper":
        return calibration
    return replace(calibration, joint=_joint(shape, min(rank, geometry.joint_features), generator))


def _kind(features: int, rank: int, generator: torch.Generator) -> SideCalibration:
    deviations = stretched(shipped().key.basis.spectrum.clamp_min(1e-12).sqrt().numpy(), rank)
    sample = drawn(deviations, DISTORTION_ROWS, torch.Generator().manual_seed(0))
    spectrum = torch.from_numpy(deviations).square()
    basis = Basis(_mean(features, generator), orthonormal(features, rank, generator), spectrum)
    return SideCalibration(basis, measure_distortion(sample.numpy()), float(spectrum.sum()))


def _mean(features: int, generator: torch.Generator) -> Tensor:
    return torch.randn(features, generator=generator, device=generator.device)


def _joint(shape: Shape, rank: int, generator: torch.Generator) -> JointCalibration:
    geometry, measured = shape.geometry, shipped().joint
    device = generator.device
    eye = torch.eye(geometry.head_dim, device=device).repeat(geometry.n_layers * geometry.n_kv_heads, 1, 1)
    roots = HeadBlocks(eye, eye)
    plain = coefficient_model(measured.coefficients, rank)
    features = geometry.joint_features
    vectors, scales = joint_in_bytes(orthonormal(features, rank, generator), roots)
    # Of the remainder nothing varies, and so nothing is coded.
    order = torch.arange(rank + features, dtype=torch.int32, device=device)
    basis = JointBasis(_mean(features, generator), vectors, scales, roots.map(Tensor.half), order)
    model = replace(plain, deviations=np.pad(plain.deviations, (0, features)))
    return JointCalibration(basis, Metric.from_roots(roots), model)


@dataclass(frozen=True)
class Drawn:
    """A cache and the token ids [T] it goes with."""

    cache: KVCache
    token_ids: Tensor


def caches(calibration: Calibration, profile: str, batch: tuple[int, int], device: torch.device) -> Iterator[Drawn]:
    """Sequences of a batch, bfloat16 on the device, one by one."""
    geometry = calibration.geometry
    generator = torch.Generator(device).manual_seed(1)
    positions = torch.arange(batch[1], device=device)
    turn = geometry.rope.turns(positions, batch[1])[0]
    for index in range(batch[0]):
        ids = torch.randint(512, (batch[1],), generator=torch.Generator().manual_seed(index))
        sides = []
        for kind, (coefficients, mean, vectors) in enumerate(_sources(calibration, profile, batch[1], generator)):
            shape = (geometry.n_layers, geometry.n_kv_heads, batch[1], geometry.head_dim)
            side = torch.empty(shape, dtype=torch.bfloat16, device=device)
            size = geometry.n_kv_heads * geometry.head_dim
            for layer in range(geometry.n_layers):
                here = slice(layer * size, (layer + 1) * size)
                rows = torch.addmm(mean[here], coefficients, vectors[here].float().T)
                heads = rows.reshape(batch[1], geometry.n_kv_heads, geometry.head_dim).transpose(0, 1)
                if kind == 0 and turn is not None:
                    turn_in_place(heads, turn)
                side[layer] = heads
            sides.append(side)
        yield Drawn(KVCache(*sides), ids)


def _sources(calibration: Calibration, profile: str, n: int, generator: torch.Generator):
    """Of keys and of values: plain coefficients, and the mean and columns that lead to rows."""
    joint, p = calibration.joint, calibration.geometry.side_features[0]
    if profile == "paper" or joint is None:
        for kind in (calibration.key, calibration.value):
            deviations = kind.basis.spectrum.sqrt().numpy()
            yield drawn(deviations, n, generator), kind.basis.mean, kind.basis.vectors
        return
    coefficients = drawn(joint.coefficients.deviations[: joint.basis.rank], n, generator)
    vectors = joint.basis.matrix(generator.device)
    for here in (slice(0, p), slice(p, 2 * p)):
        yield coefficients, joint.basis.mean[here], vectors[here]
