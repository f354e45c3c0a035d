"""Lists of layers, which need not be neighbours, as runs of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def layer_runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending layers as (first, count) of neighbours, as few as there can be."""
    starts = [at for at, layer in enumerate(layers) if not at or layer != layers[at - 1] + 1]
    return [(layers[start], stop - start) for start, stop in pairwise([*starts, len(layers)])]


def describe_layers(layers: Sequence[int]) -> str:
    """Layers in words, for messages: `0..4, 6`."""
    runs = layer_runs(layers)
    return ", ".join(str(first) if count == 1 else f"{first}..{first + count - 1}" for first, count in runs)
