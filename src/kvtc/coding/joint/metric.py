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
from ..product import inverses, product


@dataclass(frozen=True, eq=False)
class Metric:
    """roots [2 L H, D, D] float32, symmetric and positive: blocks of the joint row in its order, keys first, and their inverses.

    unit: what the roots of the sensitivity were divided by; 1 where that is not known.
    """

    roots: Tensor
    inverses: Tensor
    unit: float = 1.0

    @classmethod
    def from_sensitivity(
        cls, keys: Tensor, values: Tensor, power: float, ridge: float, unit: float | None = None
    ) -> Metric:
        """Sensitivities of keys and of values [L, H, D, D] -> the roots of their `power`.

        ridge: share of the mean diagonal of all that is added to every direction, so that none counts for nothing.
        unit: of another group's metric, in which the same step does the same harm; None: one of its own.
        Raises `InvalidArgument` where some direction still does, or a sensitivity is not finite.
        """
        blocks = torch.cat([keys.flatten(0, 1), values.flatten(0, 1)]).double()
        if not bool(blocks.isfinite().all()):
            raise InvalidArgument("a sensitivity is not finite")
        floor = ridge * blocks.diagonal(dim1=1, dim2=2).mean()
        scales, directions = torch.linalg.eigh(blocks)
        scales = (scales.clamp_min(0) + floor).pow(power / 2)
        if not bool((scales > 0).all()):
            raise InvalidArgument("some direction has no sensitivity at all; give a ridge above 0, or other texts")
        # One overall scale is free: with unit determinant on average steps are comparable between models.
        root = (directions * scales[:, None]) @ directions.mT
        if unit is None:
            unit = float(torch.linalg.slogdet(root).logabsdet.mean().div(root.shape[-1]).exp())
        # The inverses of what a file keeps: a calibration codes alike before and after it is saved.
        return replace(cls.from_roots((root / unit).float()), unit=unit)

    @classmethod
    def from_roots(cls, roots: Tensor) -> Metric:
        """The metric of stored roots. Raises `InvalidArgument` where one is not positive."""
        return cls(roots.float(), inverses(roots.float()).to(roots.device, torch.float32))

    def behind(self, n_layers: int, n_kept: int) -> Metric:
        """The same without the first n_layers layers, of the n_kept layers behind them."""
        roots, inverse = (
            blocks.reshape(2, n_layers + n_kept, -1, *blocks.shape[1:])[:, n_layers:].flatten(0, 2).clone()
            for blocks in (self.roots, self.inverses)
        )
        return Metric(roots, inverse)

    def to(self, device: torch.device) -> Metric:
        """The same on a device."""
        return Metric(self.roots.to(device), self.inverses.to(device))

    def weigh(self, rows: Tensor) -> Tensor:
        """Joint rows [T, 2 p] -> rows times the roots."""
        return times_blocks(rows, self.roots)

    def unweigh(self, rows: Tensor) -> Tensor:
        """Inverse of `weigh`."""
        return times_blocks(rows, self.inverses)


def times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Joint rows [T, 2 p], each block of them times its matrix, blocks [B, D, D] float32."""
    n_blocks, size, _ = blocks.shape
    if rows.device.type == "cpu":
        sides = rows.reshape(-1, n_blocks, size).unbind(dim=1)
        return torch.cat([product(side, block) for side, block in zip(sides, blocks, strict=True)], dim=1)
    return torch.einsum("tbd,bde->tbe", rows.reshape(-1, n_blocks, size), blocks).reshape(rows.shape)
