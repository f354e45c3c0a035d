"""A process that writes to a store and reports every key once `put` has returned; values follow from namespace and key.

Run as a program: `python -m tests.stores.writer URL first-key-number how-many`.
"""

from __future__ import annotations

import random
import sys

from kvtc.store import open_store

MAX_BYTES = 100_000


def value_of(key: str, namespace: str | None = None) -> bytes:
    """Up to 100 kB that no other key has; one value in eight is short."""
    generator = random.Random(f"{namespace}={key}")
    return f"{namespace}={key};".encode() + generator.randbytes(
        generator.randrange(MAX_BYTES >> 3 * generator.randrange(2))
    )


def main(url: str, first: int, count: int) -> None:
    with open_store(url) as store:
        for number in range(first, first + count):
            key = f"chain/{number}"
            store.put(key, value_of(key, store.namespace))
            sys.stdout.write(f"{key}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
