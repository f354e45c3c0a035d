"""Peak memory of fitting `joint` at the size of a real model: metric, basis and tables.

    python -m benchmarks.calibration.memory [--layers 32] [--heads 8] [--head-dim 128] [--rows 4096] [--rank 256] [--device cuda]

Rows are synthetic. Memory is what the process came to hold beyond its libraries. `estimate` adds up
what each step holds at once; it is printed beside the measured peak, and for a basis that is too
large to be fitted here.
"""

import argparse
import resource
import time
from dataclasses import asdict, dataclass

import torch

from kvtc.cache import CacheGeometry
from kvtc.calibration.entropy import N_STEPS
from kvtc.calibration.fit import JOINT_RANK_CAP
from kvtc.calibration.joint_fit import fit_joint, joint_rows, table_rows
from kvtc.calibration.principal import OVERSAMPLING
from kvtc.calibration.row_spool import BLOCK_VALUES, FLOAT16_BYTES, RowSpool
from kvtc.calibration.rows import MAX_ROWS
from kvtc.coding.device import usable_device
from kvtc.coding.joint.metric import Metric
from kvtc.coding.rope import NO_ROTATION, Rope
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_fields, format_table

GIB = 2**30
SOURCES = 64
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Estimate:
    """GiB held at once: in power iteration, in counting tables; on disk; and of a
    device, if the fit runs on one.

    features: 2 p, keys and values.
    """

    features: int
    rank: int
    rows: int
    basis: float
    tables: float
    disk: float
    device: float

    @classmethod
    def of(cls, features: int, rank: int, rows: int) -> "Estimate":
        width = min(rank + OVERSAMPLING, features)
        # Of a block: both halves, joined, weighed, and the product's operands laid out anew.
        block = 5 * 4 * max(2 * BLOCK_VALUES, 64 * features)
        roots = 0 if features % 128 else 2 * features * 128 * 4
        # In 16 bits as found, in 8 as kept, and as numbers; of a token the coefficients of vectors and of the remainder.
        vectors, sample = features * rank * (2 + 1 + 4), min(table_rows(features), rows) * (rank + features)
        return cls(
            features,
            rank,
            rows,
            # Guess and image; then the image, its copy, and the result.
            basis=(3 * features * width * 4 + block + roots) / GIB,
            # Coefficients, a byte for each symbol at each step, and one step's magnitudes, integers and masks.
            tables=(vectors + sample * (2 * 4 + N_STEPS + 4 * 4) + roots) / GIB,
            disk=rows * features * FLOAT16_BYTES / GIB,
            # As `fit_joint` says.
            device=(16 * features * width + 36 * width**2 + block + roots) / GIB,
        )


def spool_rows(keys: RowSpool, values: RowSpool) -> None:
    """Rows of falling variances that keys and values share."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(SOURCES, 2 * keys.features, generator=generator) * (1 + torch.arange(SOURCES))[:, None] ** -0.6
    for start in range(0, keys.capacity, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, keys.capacity - start)
        rows = torch.randn(n, SOURCES, generator=generator) @ mixing
        rows += 0.1 * torch.randn(n, 2 * keys.features, generator=generator)
        slots = keys.append(rows[:, : keys.features])
        values.append(rows[:, keys.features :], slots)


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
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--device", default="cpu", help="where the fit runs")
    options = parser.parse_args()
    device = usable_device(options.device)
    rope = Rope((), (NO_ROTATION,) * options.layers)
    geometry = CacheGeometry(tuple(range(options.layers)), 0, options.heads, options.head_dim, rope)
    features = 2 * geometry.row_features
    libraries = peak_memory()
    started = time.perf_counter()
    metric = random_metric(geometry)
    with (
        RowSpool(geometry.row_features, options.rows, 0, device=device) as keys,
        RowSpool(geometry.row_features, options.rows, 0, device=device) as values,
    ):
        spool_rows(keys, values)
        spooled = time.perf_counter()
        joint = fit_joint(
            lambda: joint_rows(keys, values), options.rows, device, metric, None, options.rank, 0, "joint"
        )
    done, cpu = time.perf_counter(), time.process_time()
    predicted = Estimate.of(features, options.rank, options.rows)
    result = {
        "features": features,
        "rows": options.rows,
        "rank": joint.basis.rank,
        "spool_seconds": round(spooled - started, 1),
        "fit_seconds": round(done - spooled, 1),
        "cpu_seconds": round(cpu, 1),
        "libraries_gib": round(libraries / GIB, 2),
        "peak_memory_gib": round((peak_memory() - libraries) / GIB, 2),
        "covariance_gib": round(4 * features**2 / GIB, 2),
        "device": device.type,
    }
    if device.type == "cuda":
        result["device_peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
    print(format_fields(list(result.items())))
    estimates = [predicted, Estimate.of(features, JOINT_RANK_CAP, MAX_ROWS)]
    print()
    header = ["features", "rank", "rows", "basis", "tables", "disk", "device (GiB)"]
    print(format_table(header, [[_cell(value) for value in asdict(line).values()] for line in estimates]))
    save_result("calibration_memory", {**result, "estimates": [asdict(line) for line in estimates]})


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    main()
