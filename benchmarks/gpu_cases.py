"""Geometries of large models, with calibrations and caches made up for them, for `gpu.py`.

A calibration's bases are random Gaussian columns made orthonormal, its metric is the identity. How coefficients fall, and the
tables that code them, are those of the reference model's calibration, stretched to the rank by interpolation in log-log. A cache is
drawn from that: Gaussian coefficients of these deviations (with `conditional`, plus what token ids predict) times the basis, so the
encoder meets the symbols that the tables are for. Bytes say what such a spectrum takes, not what the model named takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kvtc
from kvtc.calibration import KindCalibration
from kvtc.calibration.joint import CoefficientModel, JointCalibration, TokenCoding
from kvtc.coding.distortion import measure_distortion
from kvtc.coding.metric import Metric
from kvtc.coding.prediction import FEATURE_UNIT, N_TOKENS_SEEN, Predictor, token_triples
from kvtc.coding.rope import Rope, RopeTable
from kvtc.coding.transform import Basis

CHUNK = 256
SLICE_TOKENS = 2048
"""Tokens whose rows exist in float32 at once while a cache is drawn."""
EMBEDDING_FEATURES, HIDDEN_FEATURES = 192, 384
PREDICTED = 0.5
"""Deviation of each part of a prediction over that of what it leaves."""
DISTORTION_ROWS = 256


@dataclass(frozen=True)
class Geometry:
    """A decoder, as far as its caches and its speed go. head_dim is that of queries too."""

    name: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    n_heads: int
    mlp: int
    vocabulary: int
    rope_base: float

    @property
    def features(self) -> int:
        """p: of the keys, or the values, of a token."""
        return self.n_layers * self.n_kv_heads * self.head_dim

    def of_cache(self) -> kvtc.CacheGeometry:
        pairs = range(0, self.head_dim, 2)
        table = RopeTable(tuple(float(np.float32(self.rope_base ** (-i / self.head_dim))) for i in pairs))
        rope = Rope((table,), (0,) * self.n_layers)
        return kvtc.CacheGeometry(0, self.n_layers, 0, self.n_kv_heads, self.head_dim, rope)


NEMO = Geometry("Mistral NeMo 12B", 40, 8, 128, 5120, 32, 14336, 131072, 1e6)
LLAMA_8B = Geometry("Llama 3.1 8B", 32, 8, 128, 4096, 32, 14336, 128256, 5e5)
# Of a layer the rank holds an eighth: 8 of 64 query heads, 3584 of 28672 features of the MLP.
LLAMA_70B_RANK = Geometry("Llama 3.3 70B, one of 8 tensor-parallel ranks", 80, 1, 128, 8192, 8, 3584, 128256, 5e5)
TINY = Geometry("tiny", 3, 2, 16, 64, 4, 96, 512, 1e4)


def stretched(falling: np.ndarray, rank: int) -> np.ndarray:
    """Values [n] -> [rank], the same shape over the relative index: interpolated in log-log."""
    at = (np.arange(rank) + 0.5) * len(falling) / rank
    known = np.log(np.maximum(falling, np.finfo(np.float32).tiny).astype(np.float64))
    return np.exp(np.interp(np.log(at), np.log(np.arange(len(falling)) + 0.5), known)).astype(np.float32)


def stretched_model(model: CoefficientModel, rank: int) -> CoefficientModel:
    """A stretched spectrum costs, at any step, as many times the bits as it has coefficients."""
    factor = rank / len(model.deviations)
    return CoefficientModel(stretched(model.deviations, rank), model.tables, model.steps, model.bits * factor)


def orthonormal(features: int, rank: int, generator: torch.Generator) -> Tensor:
    """Random Gaussian columns [features, rank], made orthonormal by Cholesky, float32 on the generator's device."""
    columns = torch.randn(features, rank, generator=generator, device=generator.device) / features**0.5
    factor = torch.linalg.cholesky(columns.T @ columns)
    return torch.linalg.solve_triangular(factor, columns.T, upper=False).T


class MadeUp:
    """A geometry with a calibration for one profile, and caches of it on a device.

    rank: of each kind with `paper`, of joint rows with the others.
    """

    def __init__(self, geometry: Geometry, profile: str, rank: int, device: torch.device) -> None:
        self.geometry, self.profile, self.rank, self.device = geometry, profile, rank, device
        generator = torch.Generator(device).manual_seed(0)
        cache_geometry, reference = geometry.of_cache(), kvtc.reference_calibration()
        joint = reference.joint
        if profile == "paper" or joint is None or joint.tokens is None:
            made = [_kind(kind, geometry.features, rank, generator) for kind in (reference.key, reference.value)]
            self.calibration = kvtc.Calibration(cache_geometry, *made)
            self._bases = [kind.basis.vectors.to(device) for kind in made]
            self._deviations = [kind.basis.spectrum.sqrt().to(device) for kind in made]
            return
        model = stretched_model(joint.coefficients, rank)
        basis = _basis(2 * geometry.features, np.square(model.deviations), generator)
        blocks = 2 * geometry.n_layers * geometry.n_kv_heads
        metric = Metric.from_roots(torch.eye(geometry.head_dim).expand(blocks, -1, -1).contiguous())
        tokens = _tokens(joint.tokens, geometry, rank, generator) if profile == "conditional" else None
        unused = _kind(reference.key, geometry.features, 1, generator)
        self.calibration = kvtc.Calibration(
            cache_geometry, unused, unused, joint=JointCalibration(basis, metric, model, tokens)
        )
        coded = model if tokens is None else tokens.coefficients
        self._bases = [basis.vectors.to(device)]
        self._deviations = [torch.from_numpy(coded.deviations).to(device)]

    def draw(self, n_tokens: int, seed: int) -> tuple[kvtc.KVCache, np.ndarray]:
        """A bfloat16 cache on the device, and its token ids [n_tokens]."""
        generator = torch.Generator(self.device).manual_seed(1000 + seed)
        ids = np.random.default_rng(seed).integers(self.geometry.vocabulary, size=n_tokens)
        shape = (self.geometry.n_layers, self.geometry.n_kv_heads, n_tokens, self.geometry.head_dim)
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        rope = self.calibration.geometry.rope
        for start in range(0, n_tokens, SLICE_TOKENS):
            here = slice(start, min(start + SLICE_TOKENS, n_tokens))
            places = torch.arange(here.start, here.stop)
            rows = self._rows(ids, places, generator).view(len(places), 2, *shape[:2], shape[3])
            for layer in range(shape[0]):
                keys[layer, :, here] = rope.turn_layer(layer, rows[:, 0, layer].transpose(0, 1), places, n_tokens).to(
                    torch.bfloat16
                )
                values[layer, :, here] = rows[:, 1, layer].transpose(0, 1).to(torch.bfloat16)
        return kvtc.KVCache(keys, values), ids

    def _rows(self, ids: np.ndarray, places: Tensor, generator: torch.Generator) -> Tensor:
        """Joint rows [n, 2 p] float32 before rotation."""
        sides = []
        for basis, deviations in zip(self._bases, self._deviations, strict=True):
            drawn = torch.randn(len(places), len(deviations), generator=generator, device=self.device) * deviations
            tokens = self.calibration.joint.tokens if self.calibration.joint else None
            if tokens is not None:
                triples = token_triples(ids[places.numpy()], places.numpy(), CHUNK)
                drawn += tokens.predictor.to(self.device).predict(triples)
                drawn = drawn @ tokens.rotation.to(self.device).float().T
            sides.append(drawn @ basis.float().T)
        return torch.cat(sides, dim=1)


def coded_widths(plan: object, calibration: kvtc.Calibration, profile: str) -> Iterator[int]:
    """Coefficients that a stream really codes: of keys and of values, or of joint rows."""
    from kvtc.coding.uniform import column_classes

    if profile == "paper":
        yield from (allocation.n_coefficients for allocation in plan.allocations)
        return
    joint = calibration.joint
    model = joint.tokens.coefficients if profile == "conditional" else joint.coefficients
    yield len(column_classes(model.deviations, plan.step))


def _basis(features: int, spectrum: np.ndarray, generator: torch.Generator) -> Basis:
    vectors = orthonormal(features, len(spectrum), generator).to(torch.float16).cpu().contiguous()
    return Basis(torch.zeros(features), vectors, torch.from_numpy(spectrum))


def _kind(reference: KindCalibration, features: int, rank: int, generator: torch.Generator) -> KindCalibration:
    spectrum = stretched(reference.basis.spectrum.numpy(), rank)
    sample = np.random.default_rng(0).standard_normal((DISTORTION_ROWS, rank), dtype=np.float32) * np.sqrt(spectrum)
    basis = _basis(features, spectrum, generator)
    return KindCalibration(basis, measure_distortion(sample), float(spectrum.sum(dtype=np.float64)))


def _tokens(reference: TokenCoding, geometry: Geometry, rank: int, generator: torch.Generator) -> TokenCoding:
    """Prediction of chance; the rotation is a reflection, which is orthonormal and has no zeros."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).cpu()

    model = stretched_model(reference.coefficients, rank)
    deviations = PREDICTED * torch.from_numpy(model.deviations)
    n_features = N_TOKENS_SEEN * EMBEDDING_FEATURES + 1
    table = (FEATURE_UNIT * drawn(geometry.vocabulary, EMBEDDING_FEATURES)).round().clamp(-127, 127).to(torch.int8)
    weights = drawn(n_features, rank) * deviations / n_features**0.5
    hidden = drawn(n_features, HIDDEN_FEATURES) / n_features**0.5
    outputs = drawn(HIDDEN_FEATURES, rank) * deviations / HIDDEN_FEATURES**0.5
    normal = torch.nn.functional.normalize(drawn(rank), dim=0)
    reflection = torch.eye(rank) - 2 * torch.outer(normal, normal)
    predictor = Predictor(table, weights.half(), hidden.half(), outputs.half())
    return TokenCoding(predictor, reflection.half(), model, torch.zeros(geometry.n_layers, 2))
