"""The metric in which rows are coded: how much a change of each feature changes what the model predicts.

A sensitivity is a positive matrix [D, D] for each layer and head, of keys and of values. Its power, split evenly over the two sides
of the squared error, is a symmetric root M for each of them; errors are measured, and the transform is fitted, on rows times M.
The root is block diagonal, so it folds into the basis and costs nothing when a cache is coded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import InvalidArgument
from ..product import inverses
from .blocks import HeadBlocks


@dataclass(frozen=True, eq=False)
class Metric:
    """roots float32, symmetric and positive, and their inverses.

    unit: what the roots of the sensitivity were divided by; 1 where that is not known.
    """

    roots: HeadBlocks
    inverses: HeadBlocks
    unit: float = 1.0

    @classmethod
    def from_sensitivity(
        cls, keys: Tensor, values: Tensor, power: float, ridge: float, unit: float | None = None
    ) -> Metric:
        """Sensitivities of keys [L, H, Dk, Dk] and of values [L, H, Dv, Dv] -> the roots of their `power`.

        ridge: share of the mean diagonal of all that is added to every direction, so that none counts for nothing.
        unit: of another group's metric, in which the same step does the same harm; None: one of its own.
        Raises `InvalidArgument` where some direction still does, or a sensitivity is not finite.
        """
        blocks = HeadBlocks(keys.flatten(0, 1).double(), values.flatten(0, 1).double())
        if not all(bool(side.isfinite().all()) for side in blocks.sides):
            raise InvalidArgument("a sensitivity is not finite")
        diagonals = [side.diagonal(dim1=1, dim2=2).reshape(-1) for side in blocks.sides]
        floor = ridge * torch.cat(diagonals).mean()

        def root(side: Tensor) -> Tensor:
            scales, directions = torch.linalg.eigh(side)
            scales = (scales.clamp_min(0) + floor).pow(power / 2)
            if not bool((scales > 0).all()):
                raise InvalidArgument("some direction has no sensitivity at all; give a ridge above 0, or other texts")
            found: Tensor = (directions * scales[:, None]) @ directions.mT
            return found

        roots = blocks.map(root)
        # One overall scale is free: with unit determinant on average steps are comparable between models.
        if unit is None:
            logs = torch.cat([torch.linalg.slogdet(side).logabsdet for side in roots.sides])
            unit = float(logs.sum().div(sum(roots.side_features)).exp())
        # The inverses of what a file keeps: a calibration codes alike before and after it is saved.
        return replace(cls.from_roots(roots.map(lambda side: (side / unit).float())), unit=unit)

    @classmethod
    def from_roots(cls, roots: HeadBlocks) -> Metric:
        """The metric of stored roots. Raises `InvalidArgument` where one is not positive."""
        return cls(
            roots.map(Tensor.float), roots.map(lambda side: inverses(side.float()).to(side.device, torch.float32))
        )

    def behind(self, n_layers: int, n_kept: int) -> Metric:
        """The same without the first n_layers layers, of the n_kept layers behind them."""

        def kept(side: Tensor) -> Tensor:
            return side.reshape(n_layers + n_kept, -1, *side.shape[1:])[n_layers:].flatten(0, 1).clone()

        return Metric(self.roots.map(kept), self.inverses.map(kept))

    def to(self, device: torch.device) -> Metric:
        """The same on a device."""
        roots, inverse = (blocks.map(lambda side: side.to(device)) for blocks in (self.roots, self.inverses))
        return Metric(roots, inverse)

    def weigh(self, rows: Tensor) -> Tensor:
        """Joint rows [T, P] -> rows times the roots."""
        return self.roots.times(rows)

    def unweigh(self, rows: Tensor) -> Tensor:
        """Inverse of `weigh`."""
        return self.inverses.times(rows)
