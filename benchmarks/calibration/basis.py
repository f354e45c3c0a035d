"""Time, memory and accuracy of the joint fit at the size of a real model: moments, basis and tables.

    python -m benchmarks.calibration.basis [--layers 32] [--heads 8] [--head-dim 128] [--rows 4096] [--rank 1024] [--sketch]

Rows are synthetic. Memory is what the process came to hold beyond its libraries, and on a GPU what
was allocated there. --sketch: products are sketched, as they are above 16 384 features; the
variance that the basis explains is printed beside what an exact one of the same rows explains,
where there are few enough features.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from kvtc.cache import CacheGeometry
from kvtc.calibration import moments
from kvtc.calibration.joint_fit import fit_joint, table_rows
from kvtc.coding.device import usable_device
from kvtc.coding.joint.metric import Metric
from kvtc.coding.rope import NO_ROTATION, Rope
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_fields

GIB = 2**30
SOURCES = 512
ROWS_AT_ONCE = 1024


def drawn_rows(n_rows: int, features: int) -> Iterator[torch.Tensor]:
    """Rows of falling variances that keys and values share."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(SOURCES, features, generator=generator) * (1 + torch.arange(SOURCES))[:, None] ** -0.6
    for start in range(0, n_rows, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, n_rows - start)
        rows = torch.randn(n, SOURCES, generator=generator) @ mixing
        yield rows + 0.1 * torch.randn(n, features, generator=generator)


def random_metric(geometry: CacheGeometry) -> Metric:
    generator = torch.Generator().manual_seed(1)
    shape = (geometry.n_layers, geometry.n_kv_heads, geometry.head_dim, geometry.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    return Metric.from_sensitivity(keys @ keys.mT, values @ values.mT, power=0.75, ridge=0.01)


def peak_memory() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--sketch", action="store_true", help="whatever the number of features")
    parser.add_argument("--device", default="cpu", help="where the fit runs")
    options = parser.parse_args()
    device = usable_device(options.device)
    rope, dims = Rope((), (NO_ROTATION,) * options.layers), (options.head_dim, options.head_dim)
    geometry = CacheGeometry(tuple(range(options.layers)), 0, options.heads, *dims, rope)
    features = geometry.joint_features
    is_exact = features <= moments.EXACT_FEATURES
    if options.sketch:
        moments.EXACT_FEATURES = 0
    metric = random_metric(geometry)
    libraries, started = peak_memory(), time.perf_counter()
    gathered = moments.Moments(features, 0, options.rank, 0, device)
    for block in drawn_rows(options.rows, features):
        gathered.add(block)
    gathered.settle()
    read = time.perf_counter()
    joint = fit_joint(
        gathered.covariance(), next(drawn_rows(table_rows(features), features)), metric, None, options.rank
    )
    fitted = time.perf_counter()
    result = {
        "features": features,
        "rows": options.rows,
        "rank": joint.basis.rank,
        "gather_seconds": round(read - started, 1),
        "fit_seconds": round(fitted - read, 1),
        "libraries_gib": round(libraries / GIB, 2),
        "peak_memory_gib": round((peak_memory() - libraries) / GIB, 2),
        "covariance_gib": round(4 * features**2 / GIB, 2),
        "device": device.type,
    }
    if device.type == "cuda":
        result["device_peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
    if options.sketch and is_exact:
        sketched = gathered.covariance().components(options.rank).vectors.double()
        moments.EXACT_FEATURES = features
        whole = moments.Moments(features)
        for block in drawn_rows(options.rows, features):
            whole.add(block)
        covariance = whole.covariance()
        total = float(whole.variances().sum())
        caught = float((sketched * (covariance.matrix.double() @ sketched)).sum())
        result["explained_variance"] = round(caught / total, 6)
        exact = float(covariance.components(options.rank).spectrum.double().sum())
        result["exact_explained_variance"] = round(exact / total, 6)
    print(format_fields(list(result.items())))
    save_result("calibration_basis", result)


if __name__ == "__main__":
    main()
