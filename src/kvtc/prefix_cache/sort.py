"""What the caches of a model with windows or states hold, as the entry of the model says it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import CorruptStream

SORTS = {b"tokens and points": True, b"points alone": False}
"""How the entry of a model begins: whether its caches have groups that keep every token."""
_SORT = re.compile(rb"(%b)((?: [1-9][0-9]{0,9}){0,255})" % b"|".join(SORTS))


@dataclass(frozen=True)
class Sort:
    """What the caches of a model hold.

    Parameters:
        keeps_tokens: Whether there are groups that keep every token.
        windows: The lengths of its windows, in tokens.
    """

    keeps_tokens: bool
    windows: tuple[int, ...]

    @classmethod
    def parse(cls, data: bytes) -> Sort:
        """Inverse of `pack`; raises `CorruptStream`."""
        found = _SORT.fullmatch(data)
        if found is None:
            raise CorruptStream(
                f"the sort of a model's caches is {bytes(data[:40])!r}; expected one of {list(SORTS)} and lengths of windows"
            )
        return cls(SORTS[found[1]], tuple(map(int, found[2].split())))

    def pack(self) -> bytes:
        """In words, such as b"tokens and points 512"."""
        words = next(words for words, keeps in SORTS.items() if keeps is self.keeps_tokens)
        return b" ".join([words, *(b"%d" % extent for extent in self.windows)])
