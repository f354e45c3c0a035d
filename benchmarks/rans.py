"""Speed of the rANS coder on one core, and its bytes against the cross entropy of the tables.

Chunks of tokens as a codec has them, and one call for everything; symbols as likely as their tables say.
python benchmarks/rans.py [--columns 1000] [--runs 15]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from kvtc.coding.rans import RansTables, cost_bits, decode_symbols, encode_symbols, normalize_frequencies
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.table import format_table

N_CLASSES, N_KINDS, N_SYMBOLS = 27, 4, 17
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Row:
    """One way to call the coder. Speeds are medians, in millions of symbols a second."""

    calls: int
    tokens: int
    columns: int
    bits_a_symbol: float
    encode: float
    decode: float
    costs: float
    overhead_percent: float
    overhead_bytes_a_call: float


def make_tables() -> RansTables:
    """Two-sided geometric distributions from broad ones to nearly always zero, wider or narrower with the token's class."""
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
        slots = random.integers(0, 4096, table.shape, dtype=np.uint16)
        symbols = tables.slots[table, slots]
        entropy += float(tables.costs[table, symbols].sum(dtype=np.float64))
        chunks.append((symbols, tokens))
    coded = [encode_symbols(symbols, columns, tokens, tables) for symbols, tokens in chunks]
    n_symbols, n_bytes = n_calls * n_tokens * n_columns, sum(map(len, coded))

    def speed(run: Callable[[], object]) -> float:
        run()
        seconds = []
        for _ in range(n_runs):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return round(n_symbols / median(seconds) / 1e6, 1)

    return Row(
        calls=n_calls,
        tokens=n_tokens,
        columns=n_columns,
        bits_a_symbol=round(entropy / n_symbols, 3),
        encode=speed(lambda: [encode_symbols(symbols, columns, tokens, tables) for symbols, tokens in chunks]),
        decode=speed(
            lambda: [
                decode_symbols(data, columns, tokens, tables) for data, (_, tokens) in zip(coded, chunks, strict=True)
            ]
        ),
        costs=speed(lambda: [cost_bits(symbols, columns, tables) for symbols, _ in chunks]),
        overhead_percent=round(100 * (8 * n_bytes / entropy - 1), 4),
        overhead_bytes_a_call=round((n_bytes - entropy / 8) / n_calls, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    tables = make_tables()
    rows = [
        measure(tables, n_calls, n_tokens, options.columns, options.runs)
        for n_calls, n_tokens in [(32, CHUNK_TOKENS), (1, 32 * CHUNK_TOKENS)]
    ]
    fields = [asdict(row) for row in rows]
    print(format_table([name.replace("_", " ") for name in fields[0]], [list(field.values()) for field in fields]))
    save_result("rans", {"n_tables": tables.n_tables, "n_symbols": tables.n_symbols, "rows": fields})


if __name__ == "__main__":
    main()
