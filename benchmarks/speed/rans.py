"""Speed of the rANS coder on one core, and its bytes against the cross entropy of the tables.

    python -m benchmarks.speed.rans [--columns 1000] [--runs 31]

Chunks of tokens as a codec has them, one call for as many tokens, and short chunks; symbols as
likely as their tables say. Encoding, decoding and costs take turns, and each run codes everything
once. Speeds are of one thread, in the time a core worked for it; those by the clock, which other
programs on the machine slow down, stand beside them. If any other thread of the process works in a
run, the benchmark ends without a result.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from kvtc.coding.rans import RansTables, cost_bits, count_lanes, decode_symbols, encode_symbols, normalize_frequencies
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_table

N_CLASSES, N_KINDS, N_SYMBOLS = 27, 4, 17
CHUNK_TOKENS = 256
OTHER_THREADS_SECONDS = 2e-3
"""What the process may take beside the thread in a run: reading two clocks one after the other
differs by less.
"""


@dataclass(frozen=True)
class Speed:
    """Millions of symbols a second: of the core's time the median, the slowest and the fastest run;
    of the clock's the median.
    """

    median: float
    slowest: float
    fastest: float
    clock_median: float

    @classmethod
    def of(cls, n_symbols: int, seconds: list[tuple[float, float]]) -> "Speed":
        """seconds: of the core and of the clock for each run."""
        core, clock = (n_symbols / np.array(times) / 1e6 for times in zip(*seconds, strict=True))
        speeds = (np.median(core), core.min(), core.max(), np.median(clock))
        return cls(*(round(float(speed), 1) for speed in speeds))


@dataclass(frozen=True)
class Row:
    """One way to call the coder."""

    calls: int
    tokens: int
    columns: int
    lanes: int
    bits_a_symbol: float
    overhead_percent: float
    overhead_bytes_a_call: float
    encode: Speed
    decode: Speed
    costs: Speed


def make_tables() -> RansTables:
    """Two-sided geometric distributions from broad ones to nearly always zero, wider or narrower
    with the token's class.
    """
    distance = np.abs(np.arange(N_SYMBOLS) - N_SYMBOLS // 2)
    widths = np.geomspace(4, 0.05, N_CLASSES) * np.linspace(0.6, 1.5, N_KINDS)[:, None]
    return RansTables(normalize_frequencies(np.exp(-distance / widths.reshape(-1, 1))), N_CLASSES)


def measure(tables: RansTables, n_calls: int, n_tokens: int, n_columns: int, n_runs: int) -> Row:
    random = np.random.default_rng(0)
    columns = np.sort(random.integers(0, N_CLASSES, n_columns)).astype(np.uint8)
    chunks, entropy = [], 0.0
    for _ in range(n_calls):
        tokens = random.integers(0, N_KINDS, n_tokens).astype(np.uint8)
        # The symbol of a random slot is as likely as its table says.
        table = tokens.astype(np.intp) * N_CLASSES + columns[:, None]
        symbols = tables.slots[table, random.integers(0, 4096, table.shape, dtype=np.uint16)]
        entropy += float(tables.costs[table, symbols].sum(dtype=np.float64))
        chunks.append((symbols, tokens, encode_symbols(symbols, columns, tokens, tables)))
    n_symbols, n_bytes = n_calls * n_tokens * n_columns, sum(len(data) for _, _, data in chunks)

    def encode() -> None:
        for symbols, tokens, _ in chunks:
            encode_symbols(symbols, columns, tokens, tables)

    def decode() -> None:
        for _, tokens, data in chunks:
            decode_symbols(data, columns, tokens, tables)

    def costs() -> None:
        for symbols, _, _ in chunks:
            cost_bits(symbols, columns, tables)

    for symbols, tokens, data in chunks:
        if not np.array_equal(decode_symbols(data, columns, tokens, tables), symbols):
            sys.exit("decoding gave other symbols")
    return Row(
        calls=n_calls,
        tokens=n_tokens,
        columns=n_columns,
        lanes=count_lanes(n_columns, n_tokens),
        bits_a_symbol=round(entropy / n_symbols, 3),
        overhead_percent=round(100 * (8 * n_bytes / entropy - 1), 4),
        overhead_bytes_a_call=round((n_bytes - entropy / 8) / n_calls, 1),
        **speeds({"encode": encode, "decode": decode, "costs": costs}, n_symbols, n_runs),
    )


def speeds(work: dict[str, Callable[[], None]], n_symbols: int, n_runs: int) -> dict[str, Speed]:
    """Of each kind of work, in turns, after one run of each that is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(n_runs + 1):
        for name, run in work.items():
            process, thread, clock = time.process_time(), time.thread_time(), time.perf_counter()
            run()
            of_thread, of_clock = time.thread_time() - thread, time.perf_counter() - clock
            beside = time.process_time() - process - of_thread
            if seconds[name] and beside > OTHER_THREADS_SECONDS:
                sys.exit(f"{name}: other threads of this process worked {beside:.4f} s; these are speeds of one thread")
            seconds[name].append((of_thread, of_clock))
    return {name: Speed.of(n_symbols, runs[1:]) for name, runs in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=31)
    options = parser.parse_args()
    tables = make_tables()
    rows = [
        measure(tables, n_calls, n_tokens, options.columns, options.runs)
        for n_calls, n_tokens in [(32, CHUNK_TOKENS), (1, 32 * CHUNK_TOKENS), (64, CHUNK_TOKENS // 8)]
    ]
    cells = []
    for row in rows:
        shape = [row.calls, row.tokens, row.columns, row.lanes, row.bits_a_symbol, row.overhead_percent]
        for name in ("encode", "decode", "costs"):
            speed = getattr(row, name)
            cells.append([*shape, name, speed.median, f"{speed.slowest} .. {speed.fastest}", speed.clock_median])
    head = ["calls", "tokens", "columns", "lanes", "bits a symbol", "overhead %"]
    print(format_table([*head, "", "M symbols/s", "slowest .. fastest", "by the clock"], cells))
    load = [round(each, 1) for each in os.getloadavg()]
    print(f"one thread; medians of {options.runs} runs; load {load[0]} on {os.cpu_count()} cores")
    save_result(
        "rans",
        {
            "n_tables": tables.n_tables,
            "n_symbols": tables.n_symbols,
            "runs": options.runs,
            "threads": 1,
            "load_average": load,
            "rows": [asdict(row) for row in rows],
        },
    )


if __name__ == "__main__":
    main()
