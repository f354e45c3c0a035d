"""Stores of opaque bytes, opened by URL: `open_store("file:///var/cache/kvtc?bytes=100GB")`. See docs/stores.md."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import InvalidArgument
from .base import Store, StoreStatistics
from .urls import StoreUrl

__all__ = ["Store", "StoreStatistics", "open_store"]

_SCHEMES = {
    "memory": "memory:MemoryStore",
    "file": "file:FileStore",
    "redis": "redis_store:RedisStore",
    "rediss": "redis_store:RedisStore",
    "s3": "object_store:ObjectStore",
}


def open_store(url: str, **options: Any) -> Store:
    """Open the store that a URL names; options win over those in the URL's query.

    Raises `InvalidArgument` for a URL or option that means nothing, `MissingDependency` for a store whose package is not installed,
    `StoreUnavailable` where the place cannot be used.
    """
    parsed = StoreUrl(url, options)
    if parsed.scheme not in _SCHEMES:
        raise InvalidArgument(f"store URL {str(parsed)!r}: expected a scheme of {', '.join(sorted(_SCHEMES))}")
    module, _, name = _SCHEMES[parsed.scheme].partition(":")
    opener = getattr(importlib.import_module(f".{module}", __name__), name)
    store: Store = opener.from_url(parsed)
    return store
