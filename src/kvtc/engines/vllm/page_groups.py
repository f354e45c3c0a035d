"""Groups of an engine's layers: in which block tables their pages stand, and how long each page is needed.

Imports no engine.

    full attention, latents   every token before a position is needed to go on from it
    windows                   the tokens that the window reaches back to; the engine drops those before them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

_GRAIN = 64
"""Tokens. Of a window that is shorter than a chunk, a multiple is kept, so that entries do not depend on an engine's pages."""


@dataclass(frozen=True)
class PageGroup:
    """Layers that are coded together, and whose tokens are needed equally long.

    Parameters:
        layer_names: As the engine calls them, in the order of their numbers.
        layers: Their numbers in the model.
        tables: For each layer, the number of the engine's block table in which its pages stand.
        page_tokens: Tokens of a page of the engine.
        reach: Tokens before a position that are needed to go on from it; None: all.
        is_plain: Whether pages hold keys and values of heads, numbers without scales of their own.
        n_kv_heads, head_dim: Of a worker, where pages are plain.
        latent_width: Numbers of a latent and its rotary part, where pages hold these; else 0.
    """

    layer_names: tuple[str, ...]
    layers: tuple[int, ...]
    tables: tuple[int, ...]
    page_tokens: int
    reach: int | None = None
    is_plain: bool = True
    n_kv_heads: int = 1
    head_dim: int = 0
    latent_width: int = 0

    @property
    def kind(self) -> str:
        """In words, for logs."""
        window = "full attention" if self.reach is None else f"a window of {self.reach + 1} tokens"
        kind = "" if self.is_plain else ", latents" if self.latent_width else ", pages of another kind"
        return f"{len(self.layers)} layers of {window}{kind}"

    def of_layers(self, layers: Sequence[int]) -> PageGroup:
        """Some of its layers."""
        at = [self.layers.index(layer) for layer in layers]
        names, tables = tuple(self.layer_names[place] for place in at), tuple(self.tables[place] for place in at)
        return replace(self, layers=tuple(layers), layer_names=names, tables=tables)

    def first_needed(self, stop: int) -> int:
        """The first token of the pages that must be there to go on from a position."""
        if self.reach is None:
            return 0
        return max(0, stop - self.reach) // self.page_tokens * self.page_tokens

    def first_kept(self, start: int, stop: int) -> int:
        """Of a chunk, the first token that some position at its end or behind it needs."""
        if self.reach is None or self.reach >= stop - start:
            return start
        grain = max(_GRAIN, self.page_tokens)
        return max(start, (stop - self.reach) // grain * grain)
