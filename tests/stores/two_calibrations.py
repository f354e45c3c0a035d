"""A process that saves prefixes with a calibration of its own, loads them again, and finds its own values every time.

Run as a program: `python -m tests.stores.two_calibrations URL calibration-file how-many-rounds`.
"""

from __future__ import annotations

import sys

from kvtc.calibration import load_calibration
from kvtc.codec.codec import Codec
from kvtc.prefix_cache import PrefixCache
from kvtc.store import open_store

from ..builders import same_cache, told_cache, told_ids, told_model

N_TEXTS, N_TOKENS = 5, 200


def make_codec(path: str) -> Codec:
    return Codec(load_calibration(path), "conditional", model=told_model(), ratio=4, window_tokens=16, chunk_tokens=32)


def main(url: str, path: str, n_rounds: int) -> None:
    codec, texts = make_codec(path), range(N_TEXTS)
    with open_store("memory:") as own, PrefixCache(codec, own, min_tokens=1) as alone:
        for text in texts:
            alone.save(told_ids(N_TOKENS, text), told_cache(N_TOKENS, seed=text)).result()
        expected = [alone.load_neutral(told_ids(N_TOKENS, text), whole=True)[0] for text in texts]
    with open_store(url) as store, PrefixCache(codec, store, min_tokens=1) as prefixes:
        for turn in range(n_rounds):
            for text in texts:
                prefixes.save(told_ids(N_TOKENS, text), told_cache(N_TOKENS, seed=text)).result()
                found, n_tokens = prefixes.load_neutral(told_ids(N_TOKENS, text), whole=True)
                assert n_tokens == N_TOKENS, (turn, text, n_tokens)
                assert same_cache(found, expected[text]), (turn, text)
            prefixes.delete(told_ids(N_TOKENS, turn % N_TEXTS))
        assert (prefixes.statistics["damaged"], prefixes.statistics["other"], store.statistics().damaged) == (0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
