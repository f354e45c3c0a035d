"""The names that prefixes are stored under: a hash chain over all that the bytes of a chunk depend
on.

    node 0 = SHA-256(namespace, identity of the model, calibration fingerprint, codec settings, ..)
    node k = SHA-256(node k-1, SHA-256(token ids of chunk k-1))

The parts of node 0 are digested as `kvtc.key_digest` does, each with its length. Node k names the
first k chunks of a text, so equal prefixes of different conversations meet in one entry, and no
entry can be reached with another namespace, model, calibration, profile or rate. Who does not know
the ids of a chunk, but their digest, can go on from a node, too: so a text that begins like a chunk
finds it. Tails, the tokens after the last whole chunk that is coded, hang on its node (`tails`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from ..cache import TokenIds
from ..key_digest import digest


@dataclass(frozen=True)
class Chain:
    """The hash chain of one model, calibration and codec: it names the chunks of every text.

    Parameters:
        root: Node 0.
        chunk_tokens: Tokens of a chunk.

    Example:
        >>> prefixes = kvtc.PrefixCache(codec, kvtc.open_store("memory:"))
        >>> nodes = prefixes.chain.nodes(token_ids.numpy())
        >>> len(nodes), nodes[0] == prefixes.chain.root
        (3, True)
    """

    root: bytes
    chunk_tokens: int

    @classmethod
    def of(
        cls, scope: bytes, fingerprint: bytes, settings: bytes, chunk_tokens: int, request: bytes | None = None
    ) -> Chain:
        """The chain of entries that depend on all of these.

        Parameters:
            scope: Namespace and identity of the model, as of `kvtc.key_digest.entry_scope`.
            fingerprint: Of the calibration.
            settings: Digest of the codec's settings.
            chunk_tokens: Tokens of a chunk.
            request: Digest of all that a request's cache depends on besides its tokens. None
                (default): it depends on nothing else.

        Returns:
            The chain.

        Example:
            >>> from kvtc.prefix_cache import Chain
            >>> one, other = (Chain.of(scope, codec.fingerprint, codec.settings_digest, 256) for scope in (b"one", b"other"))
            >>> one.root == other.root
            False
        """
        root = digest(
            "prefix",
            version=2,
            scope=scope,
            fingerprint=fingerprint,
            settings=settings,
            chunk_tokens=chunk_tokens,
            request=request,
        )
        return cls(root, chunk_tokens)

    def nodes(self, token_ids: TokenIds) -> list[bytes]:
        """The nodes of a text.

        Parameters:
            token_ids: [T] int64, of the text.

        Returns:
            Nodes 0 .. n, 32 bytes each, for its n whole chunks.

        Example:
            >>> from kvtc.prefix_cache import Chain
            >>> chain = Chain(root=bytes(32), chunk_tokens=256)
            >>> chain.nodes(token_ids.numpy())[:2] == chain.nodes(token_ids[:256].numpy())
            True
        """
        return list(accumulate(map(ids_digest, self._chunks(token_ids)), next_node, initial=self.root))

    def _chunks(self, token_ids: TokenIds) -> Iterator[TokenIds]:
        for start in range(0, len(token_ids) - self.chunk_tokens + 1, self.chunk_tokens):
            yield token_ids[start : start + self.chunk_tokens]


def chunk_key(node: bytes) -> str:
    """The key of the entry of a chunk.

    Parameters:
        node: The node at which the chunk ends: 1, 2, and so on.

    Returns:
        The key, as stores take it.

    Example:
        >>> from kvtc.prefix_cache import chunk_key
        >>> chunk_key(bytes(4))
        'chunk/00000000'
    """
    return entry_key("chunk", node)


def ids_digest(token_ids: TokenIds) -> bytes:
    """The name of a chunk or a tail among those that follow one node: 32 bytes. token_ids: [T], all of its tokens."""
    return hashlib.sha256(token_ids.astype("<i8").tobytes()).digest()


def next_node(node: bytes, name: bytes) -> bytes:
    """The node at the end of what follows a node and has this name."""
    return hashlib.sha256(node + name).digest()


def entry_key(kind: str, node: bytes) -> str:
    """The key of an entry. kind: its sort, chunk, tail or tails."""
    return f"{kind}/{node.hex()}"
