"""Principal components of spooled rows by a randomized SVD (Halko et al. 2011; paper, section 1.2).

No p x p matrix and no more than one block of rows is ever held: with X the centred rows and Q an orthonormal guess [p, l],

    repeat:  Q <- orthonormalize(X^T (X Q))        one pass over the rows each
    finally: eigenvectors of (X Q)^T (X Q)         rotate Q into principal directions

For few features the guess is the whole space, and the last step alone is the exact decomposition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..coding.transform import Basis
from ..process.progress import Advance, task


class Rows(Protocol):
    """Rows that can be read again and again, block by block, on one device."""

    n_rows: int
    device: torch.device

    def blocks(self, columns: slice = ...) -> Iterator[Tensor]:
        """The chosen columns of the rows in order, float32 blocks of bounded size that the reader may change."""
        ...


POWER_ITERATIONS = 8
OVERSAMPLING = 64
EXACT_FEATURES = 16384
"""Up to here one pass with all features is cheaper than nine with a part; a matrix of them takes 2 GiB in float64."""
_DOUBLE_FEATURES = 4096
"""Up to here the decomposition is in float64; of larger matrices it would take minutes more."""


@dataclass(frozen=True)
class PrincipalComponents:
    """A basis and the variance it was drawn from: `total_variance` is summed over all features."""

    basis: Basis
    total_variance: float

    @property
    def explained_variance(self) -> float:
        """Share of the variance that the basis can express, 0 .. 1."""
        return float(self.basis.spectrum.double().sum()) / self.total_variance if self.total_variance else 1.0


def principal_components(
    spool: Rows, rank: int, columns: slice = slice(None), seed: int = 0, name: str = "basis"
) -> PrincipalComponents:
    """The leading `rank` components (fewer if rows or features are fewer) of the spooled rows' `columns`. name: for progress.

    The arithmetic runs where the rows are; the components are on the CPU. Time 4 * n * p * l operations a pass, nine passes, with
    l = rank + `OVERSAMPLING`. Memory at most 12 p l + 4 l^2 bytes (a guess's image, its factors and their copy), or 4 p l + 40 l^2
    (a guess and the eigenvectors of its Gram matrix in float64), and a block of rows with its intermediate results; up to
    `EXACT_FEATURES` features 2 * n * p * p operations and 40 p^2 bytes, or 24 p^2 where the decomposition is in float32.
    """
    mean = _mean(spool, columns)
    features = mean.numel()
    rank = min(rank, features, spool.n_rows)
    width = min(rank + OVERSAMPLING, features)
    n_passes = POWER_ITERATIONS + 1 if width < features and features > EXACT_FEATURES else 1
    with task(name, n_passes * spool.n_rows, "rows") as advance:
        return _components(spool, mean, rank, columns, width, seed, n_passes - 1, advance)


def _components(
    spool: Rows, mean: Tensor, rank: int, columns: slice, width: int, seed: int, n_iterations: int, advance: Advance
) -> PrincipalComponents:
    features = mean.numel()
    guess: Tensor | None = None
    if n_iterations:
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU: every device begins with the same guess.
        drawn = torch.randn(features, width, generator=generator, dtype=torch.float32)
        guess = _orthonormalize(drawn.to(spool.device))
        del drawn
        for _ in range(n_iterations):
            image = torch.zeros(features, width, dtype=torch.float32, device=spool.device)
            for block in spool.blocks(columns):
                block -= mean
                image.addmm_(block.T, block @ guess)
                advance(len(block))
            del guess  # one matrix fewer while the next one is found
            guess = _orthonormalize(image)
    n_directions = features if guess is None else width
    gram = torch.zeros(n_directions, n_directions, dtype=torch.float64, device=spool.device)
    energy = 0.0
    for block in spool.blocks(columns):
        block -= mean
        energy += float(block.square().sum(dtype=torch.float64))
        image = block if guess is None else block @ guess
        gram += image.T @ image
        advance(len(block))
    if n_directions > _DOUBLE_FEATURES:
        gram = gram.float()
    values, directions = torch.linalg.eigh(gram)
    leading = directions.flip(1)[:, :rank].float()
    spectrum = values.flip(0)[:rank].clamp_min(0).float() / spool.n_rows
    vectors = _fix_signs(leading if guess is None else guess @ leading).to(torch.float16)
    return PrincipalComponents(Basis(mean.cpu(), vectors.cpu(), spectrum.cpu()), energy / spool.n_rows)


def block_diagonal(parts: list[PrincipalComponents], rank: int) -> PrincipalComponents:
    """Bases of consecutive feature ranges as one basis of all features, components by falling variance, at most `rank`."""
    spectrum = torch.cat([part.basis.spectrum for part in parts])
    order = spectrum.argsort(descending=True, stable=True)[:rank]
    features = sum(part.basis.vectors.shape[0] for part in parts)
    vectors = torch.zeros(features, spectrum.numel(), dtype=torch.float16)
    row = column = 0
    for part in parts:
        height, width = part.basis.vectors.shape
        vectors[row : row + height, column : column + width] = part.basis.vectors
        row, column = row + height, column + width
    mean = torch.cat([part.basis.mean for part in parts])
    return PrincipalComponents(
        Basis(mean, vectors[:, order].contiguous(), spectrum[order]), sum(part.total_variance for part in parts)
    )


def _mean(spool: Rows, columns: slice) -> Tensor:
    total: Tensor | None = None
    for block in spool.blocks(columns):
        partial = block.sum(dim=0, dtype=torch.float64)
        total = partial if total is None else total + partial
    if total is None:
        raise RuntimeError("the spool holds no rows")
    return (total / spool.n_rows).float()


def _orthonormalize(columns: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(columns).Q
    return orthonormal


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make the largest entry of each column positive, in place: a basis of its own does not depend on the solver's signs."""
    is_positive = vectors.amax(dim=0) >= -vectors.amin(dim=0)
    return vectors.mul_(torch.where(is_positive, 1.0, -1.0))
