"""Second moments of rows, gathered in one pass: from them follow all bases, at any rank, and what is predicted.

Up to `EXACT_FEATURES` features the whole matrix of products is gathered. Above, a sketch of it is: its product with a random
matrix O, from which the Nystrom approximation follows (Tropp, Yurtsever, Udell, Cevher 2017, algorithm 3):

    Y = G O    G is near  Y (O^T Y)^-1 Y^T
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coding.device import CPU
from ..coding.joint.metric import Metric
from ..coding.transform import Basis
from ..errors import InvalidArgument
from ..process.torch_state import neutral_torch_state

EXACT_FEATURES = 16_384
"""Up to here a matrix of products is gathered whole; it takes 1 GiB."""
OVERSAMPLING = 512
"""Columns of a sketch beyond the rank that is asked of it."""
_DOUBLE_FEATURES = 4096
"""Up to here products are kept in float64; the decomposition of larger matrices would take minutes more."""
_ROWS_AT_ONCE = 2048
"""Of a product: with fewer, reading and writing the sum would take as long as the product."""
_COLUMNS_AT_ONCE = 2048
_SHIFT = 1e-6
"""Of a sketch, times its size: keeps its core positive."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """Of rows of P features.

    Attributes:
        mean: [P] float32.
        matrix: [P, P], or, where `is_factor`, [P, l], whose product with its transpose is near the covariance.
        is_factor: which of both.
        n_rows: how many rows it was measured on.
    """

    mean: Tensor
    matrix: Tensor
    is_factor: bool
    n_rows: int

    def of(self, chosen: Tensor) -> Covariance:
        """The covariance of some features alone, int64 indices."""
        chosen = chosen.to(self.mean.device)
        rows = self.matrix[chosen]
        return Covariance(self.mean[chosen], rows if self.is_factor else rows[:, chosen], self.is_factor, self.n_rows)

    def weighed(self, metric: Metric) -> Covariance:
        """The covariance of rows in a metric."""
        mean, matrix = self.mean.clone(), self.matrix.clone()
        for block, root in metric.roots.map(lambda side: side.to(matrix)).columns():
            mean[block] = root.to(mean) @ mean[block]
            matrix[block] = root @ matrix[block]
            if not self.is_factor:
                matrix[:, block] = matrix[:, block] @ root
        return Covariance(mean, matrix, self.is_factor, self.n_rows)

    def components(self, rank: int) -> Basis:
        """The leading principal components, at most so many, on the CPU.

        Memory: 16 P^2 bytes (32 P^2 up to 4096 features), or of a factor 12 P l + 16 l^2.
        """
        if rank < 1:
            raise InvalidArgument(f"a basis must have a rank of at least 1; got {rank}")
        rank = min(rank, len(self.mean), self.n_rows)
        if self.is_factor:
            turn, core = torch.linalg.qr(self.matrix)
            directions, values, _ = torch.linalg.svd(core)
            vectors, values = turn @ directions[:, :rank], values.square()
        else:
            # Symmetric but for rounding; half of it is read.
            exact = self.matrix.double() if len(self.mean) <= _DOUBLE_FEATURES else self.matrix
            values, vectors = torch.linalg.eigh(exact)
            values, vectors = values.flip(0), vectors[:, -rank:].flip(1)
        spectrum = values[:rank].clamp_min(0).float()
        return Basis(self.mean.float().cpu(), _fix_signs(vectors.float()).half().cpu(), spectrum.cpu())


class Moments:
    """Sums and products of rows, and of the told features that they are predicted from.

    Parameters:
        features: P, of a row.
        told: F, told features that come with a row, the last of them 1; 0: none do.
        rank: the largest that will be asked of a basis; a sketch has `OVERSAMPLING` columns more.
        seed: of the sketch.
        device: where they are gathered.
    """

    def __init__(self, features: int, told: int = 0, rank: int = 0, seed: int = 0, device: torch.device = CPU) -> None:
        self.n_rows = 0
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        # A sketch as wide as the matrix would save nothing, and a square random matrix is nearly singular.
        is_whole = features <= max(EXACT_FEATURES, rank + OVERSAMPLING)
        self._probe = None if is_whole else _probe(features, rank + OVERSAMPLING, seed, device)
        width = features if self._probe is None else self._probe.shape[1]
        dtype = torch.float64 if self._probe is None and features <= _DOUBLE_FEATURES else torch.float32
        double = torch.float64
        self._sums: dict[str, Tensor] = {
            # Near the mean; what is far from zero would lose its digits in products.
            "origin": torch.zeros(features, dtype=torch.float32, device=device),
            "sums": torch.zeros(features, dtype=double, device=device),
            "squares": torch.zeros(features, dtype=double, device=device),
            "products": torch.zeros(features, width, dtype=dtype, device=device),
            "of_told": torch.zeros(told, told, dtype=double, device=device),
            "across": torch.zeros(told, features, dtype=dtype, device=device),
        }

    def add(self, rows: Tensor, told: Tensor | None = None) -> None:
        """Rows [n, P] float32, and their told features [n, F] float32 where there are any."""
        self._pending.append((rows.to(self.device), None if told is None else told.to(self.device)))
        if self.n_pending >= _ROWS_AT_ONCE:
            self.settle()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._sums["origin"].device

    @property
    def n_pending(self) -> int:
        """Rows that wait until there are enough of them for a product."""
        return sum(len(rows) for rows, _ in self._pending)

    @neutral_torch_state
    def settle(self) -> None:
        """Add the rows that wait."""
        while self._pending:
            parts, self._pending = self._pending, []
            rows = torch.cat([rows for rows, _ in parts])
            told = [part for _, part in parts if part is not None]
            self._accumulate(rows, torch.cat(told) if told else None)

    def _accumulate(self, rows: Tensor, told: Tensor | None) -> None:
        found = self._sums
        if not self.n_rows:
            found["origin"].copy_(rows.mean(dim=0))
        self.n_rows += len(rows)
        rows = rows - found["origin"]
        found["sums"] += rows.sum(dim=0, dtype=torch.float64)
        found["squares"] += rows.square().sum(dim=0, dtype=torch.float64)
        products, features = found["products"], rows.shape[1]
        if self._probe is not None:
            products.addmm_(rows.T, rows @ self._probe)
        else:
            for start in range(0, features, _COLUMNS_AT_ONCE):
                # The matrix is symmetric: what lies left of the diagonal's blocks is filled in when it is read.
                products[start : start + _COLUMNS_AT_ONCE, start:] += (
                    rows[:, start : start + _COLUMNS_AT_ONCE].T @ rows[:, start:]
                )
        if told is not None:
            found["of_told"] += told.T @ told
            found["across"] += told.T @ rows

    def variances(self) -> Tensor:
        """[P] float64, of each feature."""
        self.settle()
        return self._sums["squares"] / self.n_rows - (self._sums["sums"] / self.n_rows).square()

    def covariance(self) -> Covariance:
        """Of the rows. Time of a sketch: that of its factor."""
        self.settle()
        found, n = self._sums, self.n_rows
        return self._covariance(found["sums"] / n, found["origin"].double(), None)

    def regression(self, ridge: float) -> tuple[Tensor, Tensor, Covariance]:
        """What told features say of rows, linearly, and what they leave.

        Parameters:
            ridge: times the number of rows: added to the squares of told features.

        Returns:
            Weights [F, P] float32; the variances [P] float64 of what is left; and its covariance.
        """
        self.settle()
        found, n = self._sums, self.n_rows
        of_told, across = found["of_told"], found["across"].double()
        unit = torch.eye(len(of_told), dtype=torch.float64, device=of_told.device)
        weights = torch.linalg.solve(of_told + ridge * n * unit, across)
        # (X - F W)^T (X - F W) = X^T X - W^T (2 F^T X - F^T F W)
        explained = 2 * across - of_told @ weights
        # The last feature is 1, so its products are sums.
        mean = (across[-1] - of_told[-1] @ weights) / n
        variances = (found["squares"] - (weights * explained).sum(dim=0)) / n - mean.square()
        dtype = found["products"].dtype
        left = self._covariance(mean, None, (weights.to(dtype), explained.to(dtype)))
        weights[-1] += found["origin"]
        return weights.float(), variances, left

    def _covariance(self, mean: Tensor, origin: Tensor | None, less: tuple[Tensor, Tensor] | None) -> Covariance:
        """mean: from the origin. less: a and b, where a^T b is taken from the products."""
        products, n = self._sums["products"].clone(), self.n_rows
        centre = mean.to(products.dtype)
        of_mean = mean.float() if origin is None else (origin + mean).float()
        if self._probe is None:
            _mirror(products)
            if less is not None:
                products.addmm_(less[0].T, less[1], alpha=-1)
            products.div_(n).addr_(centre, centre, alpha=-1)
            return Covariance(of_mean, products, False, n)
        probe = self._probe
        if less is not None:
            products.addmm_(less[0].T, less[1] @ probe, alpha=-1)
        products.div_(n).addr_(centre, centre @ probe, alpha=-1)
        return Covariance(of_mean, _factor(products, probe), True, n)

    def told_by(self, chosen: slice) -> Moments:
        """The same moments, with some of the told features alone, the last of them 1."""
        self.settle()
        part = copy(self)
        of_told = self._sums["of_told"][chosen, chosen]
        part._sums = self._sums | {"of_told": of_told, "across": self._sums["across"][chosen]}
        return part

    def state(self) -> dict[str, Tensor]:
        """All that was gathered, nothing of which may wait. `resume` reads it."""
        if self._pending:
            raise RuntimeError(f"{self.n_pending} rows wait")
        return self._sums | {"n_rows": torch.tensor([self.n_rows], dtype=torch.int64, device="cpu")}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state` of moments of the same sizes."""
        for name, tensor in self._sums.items():
            tensor.copy_(state[name])
        self.n_rows = int(state["n_rows"])


def _probe(features: int, width: int, seed: int, device: torch.device) -> Tensor:
    # Drawn on the CPU: every device has the same.
    return torch.randn(features, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(device)


def _mirror(products: Tensor) -> None:
    """Fill in what lies left of the diagonal's blocks."""
    for start in range(0, len(products), _COLUMNS_AT_ONCE):
        stop = start + _COLUMNS_AT_ONCE
        products[stop:, start:stop] = products[start:stop, stop:].T


def _factor(sketch: Tensor, probe: Tensor) -> Tensor:
    """[P, l], whose product with its transpose is near the matrix of which `sketch` is the product with `probe`."""
    shift = _SHIFT * float(sketch.norm()) / probe.shape[0] ** 0.5 + torch.finfo(torch.float32).tiny ** 0.5
    sketch = sketch.add_(probe, alpha=shift)
    core = probe.T.double() @ sketch.double() if len(probe) <= EXACT_FEATURES else (probe.T @ sketch).double()
    lower = torch.linalg.cholesky_ex((core + core.T) / 2).L.to(sketch.dtype)
    factor: Tensor = torch.linalg.solve_triangular(lower.T, sketch, upper=True, left=False)
    return factor


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make the largest entry of each column positive, in place: a basis of its own does not depend on the solver's signs."""
    is_positive = vectors.amax(dim=0) >= -vectors.amin(dim=0)
    return vectors.mul_(torch.where(is_positive, 1.0, -1.0))
