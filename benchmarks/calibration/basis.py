"""Time, memory and accuracy of the basis from a stream of rows, against the exact decomposition of
the same rows.

    python -m benchmarks.calibration.basis [--features 8192] [--rows 32768] [--rank 2048]
"""

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch

from kvtc.calibration.principal import principal_components
from kvtc.calibration.row_spool import RowSpool
from kvtc.coding.paper.distortion import measure_distortion
from kvtc.coding.transform import project
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_fields

STREAMED_ROWS = 1024


def rows(n_rows: int, features: int) -> Iterator[torch.Tensor]:
    """A stream of correlated rows: falling variances, mixed by reflections so that no axis is
    special.
    """
    generator = torch.Generator().manual_seed(0)
    deviations = 8 * (1 + torch.arange(features)) ** -0.6
    mirrors = torch.nn.functional.normalize(torch.randn(4, features, generator=generator), dim=1)
    offset = torch.randn(features, generator=generator)
    for _ in range(0, n_rows, STREAMED_ROWS):
        block = torch.randn(STREAMED_ROWS, features, generator=generator) * deviations
        for mirror in mirrors:
            block -= 2 * torch.outer(block @ mirror, mirror)
        yield block + offset


def exact_explained_variance(spool: RowSpool, rank: int) -> float:
    """Share of the spooled rows' variance in their leading components, from the full covariance."""
    gram = torch.zeros(spool.features, spool.features, dtype=torch.float64)
    total = torch.zeros(spool.features, dtype=torch.float64)
    for block in spool.blocks():
        total += block.sum(dim=0, dtype=torch.float64)
        gram += block.T @ block
    mean = total / spool.n_rows
    covariance = gram / spool.n_rows - torch.outer(mean, mean)
    values = torch.linalg.eigvalsh(covariance)
    return float(values[-rank:].sum() / values.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--rank", type=int, default=2048)
    options = parser.parse_args()
    measure_distortion(np.zeros((8, 8), np.float32))  # compile first

    started = time.perf_counter()
    with RowSpool(options.features, options.rows, seed=0) as spool:
        for block in rows(options.rows, options.features):
            spool.append(block)
        spooled = time.perf_counter()
        components = principal_components(spool, options.rank)
        fitted = time.perf_counter()
        basis = components.basis
        vectors = basis.vectors.float()
        measure_distortion(project(block, basis.mean, vectors).numpy() for block in spool.sample(options.rows, seed=0))
        measured = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        exact = exact_explained_variance(spool, options.rank)
    result = {
        "features": options.features,
        "rows": options.rows,
        "rank": options.rank,
        "spool_seconds": round(spooled - started, 1),
        "basis_seconds": round(fitted - spooled, 1),
        "distortion_seconds": round(measured - fitted, 1),
        "total_seconds": round(measured - started, 1),
        "peak_memory_gib": round(peak / 2**20, 2),
        "explained_variance": round(components.explained_variance, 6),
        "exact_explained_variance": round(exact, 6),
        "shortfall_percent": round(100 * (1 - components.explained_variance / exact), 4),
    }
    print(format_fields(list(result.items())))
    save_result("calibration_basis", result)


if __name__ == "__main__":
    main()
