"""Time and memory of the bit allocation at the size of an 8 B model: measuring every possible
group, then the dynamic program.

    python -m benchmarks.speed.allocation [--rank 10000] [--rows 1024] [--budget 32768]
"""

import argparse
import resource
import time

import numpy as np

from kvtc.coding.paper.allocation import allocate_bits, distortion_of
from kvtc.coding.paper.distortion import measure_distortion
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=32_768, help="bits a row")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    # Coefficients as calibrations show them: deviations falling by a power law, tails heavier than a Gaussian's.
    deviations = 40 * (1 + np.arange(options.rank)) ** -0.75
    coefficients = (random.standard_t(6, (options.rows, options.rank)) * deviations).astype(np.float32)
    compiled = measure_distortion(coefficients[:32, :1100])
    allocate_bits(compiled, 64)

    started = time.perf_counter()
    table = measure_distortion(coefficients)
    measured = time.perf_counter()
    allocation = allocate_bits(table, options.budget)
    allocated = time.perf_counter()
    result = {
        "rank": options.rank,
        "rows": options.rows,
        "budget_bits": options.budget,
        "measure_seconds": round(measured - started, 2),
        "dynamic_program_seconds": round(allocated - measured, 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "bits_used": allocation.bits_per_row,
        "runs": len(allocation.runs),
        "relative_error": round(
            float(np.sqrt(distortion_of(allocation, table) / table.energy.sum(dtype=np.float64))), 4
        ),
    }
    print(format_fields(list(result.items())))
    save_result("allocation", result)


if __name__ == "__main__":
    main()
