"""Prefixes of conversations and documents in a store: saved once, shared by all that begin alike,
loaded as far as they match."""

from .chain import Chain, chunk_key
from .prefix_cache import PrefixCache, SaveReport

__all__ = ["Chain", "PrefixCache", "SaveReport", "chunk_key"]
