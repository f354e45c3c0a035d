"""Aligned plain text: the one table that the command line, the demo and the benchmarks print."""

from __future__ import annotations

from collections.abc import Sequence

from ..display import shown

GAP = "  "
_NUMBER_MARKS = str.maketrans("", "", " ,.+-%x/")


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Rows under a header and a rule, aligned.

    Columns in which all cells are numbers are aligned to the right, others to the left. Empty cells
    and a lone "-" count as numbers.

    Parameters:
        header: the names of the columns.
        rows: cells of any type; `shown` shows them, so that numbers must be rounded before.
        indent: what every line begins with.
    """
    names, *cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    columns = list(zip(names, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        return (indent + GAP.join(aligned)).rstrip()

    rule = indent + GAP.join("-" * width for width in widths)
    return "\n".join([line(names), rule, *map(line, cells)])


def format_fields(fields: Sequence[tuple[str, object]], indent: str = "") -> str:
    """Names and values, one pair a line, values aligned."""
    lines = [(shown(name), shown(value)) for name, value in fields]
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{indent}{name.ljust(width)}{GAP}{value}".rstrip() for name, value in lines)


def format_bytes(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"; whole bytes below 1 KiB."""
    if n_bytes < 1024:
        return f"{n_bytes:.0f} bytes"
    size, unit = n_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.{1 if size >= 10 else 2}f} {unit}"


def format_seconds(seconds: float) -> str:
    """0.0421 -> "42 ms"; seconds from one on."""
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms" if seconds < 1 else f"{seconds:.1f} s"


def format_ratio(ratio: float | None) -> str:
    """17.03 -> "17.0x"; "-" where there is none."""
    return "-" if ratio is None else f"{ratio:.1f}x"


def _is_number(cell: str) -> bool:
    bare = cell.translate(_NUMBER_MARKS)
    return not bare or bare.isdigit() or bare.lower() in ("inf", "nan")
