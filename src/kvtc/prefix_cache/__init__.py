"""Prefixes of conversations and documents in a store: saved once, shared by all that begin alike, loaded as far as they match."""

from .chain import Chain, as_token_ids, chunk_key
from .prefix_cache import PrefixCache, SaveReport

__all__ = ["Chain", "PrefixCache", "SaveReport", "as_token_ids", "chunk_key"]
