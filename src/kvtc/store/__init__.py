"""Stores of opaque bytes, opened by URL: `open_store("file:///var/cache/kvtc?bytes=100GB")`. See
docs/stores.md."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from .base import Store, StoreStatistics
from .urls import StoreUrl, parse_bytes

if TYPE_CHECKING:
    from .framed import FramedStore
    from .place import Place

__all__ = ["Store", "StoreStatistics", "encrypted", "open_place", "open_store"]

# Imported when one is opened: a package may be missing, and what lies on devices is in a layer above.
_SCHEMES = {
    "memory": ".memory:MemoryStore",
    "file": ".files.file_store:FileStore",
    "redis": ".redis_store:RedisStore",
    "rediss": ".redis_store:RedisStore",
    "s3": ".object_store:ObjectStore",
    "cuda": "..device_store:DeviceStore",
    "device": "..device_store:DeviceStore",
}
_TIERED = "tiered:"


def open_store(url: str | Sequence[str | Store], **options: Any) -> Store:
    """Open the store that a URL names, or several stores as tiers.

    Parameters:
        url: `memory:?bytes=1GB`, `cuda:0?bytes=8GB` (`device:` with the name of any device of
            torch), `file:///path?bytes=100GB`, `redis://host`, `rediss://host`,
            `s3://bucket/prefix?endpoint=...`; for tiers `tiered:memory:|file:///path`, or a
            list of URLs and stores, the fastest first. Options of the tiers themselves come
            first: `tiered:?write=back|memory:|...`.
        options: By name, in place of those in the query of the URL. All but tiers take
            `namespace`, `entry_bytes` (the longest value, 512MiB), and `key_file` or
            `key_variable` for encryption; docs/stores.md lists the others.

    Returns:
        The store. Close it, or use it in a `with` block.

    Raises:
        InvalidArgument: The URL or an option is not understood.
        MissingDependency: The package that such a store needs is not installed.
        StoreUnavailable: The place of storage cannot be used.

    Example:
        >>> from pathlib import Path
        >>> with kvtc.open_store(["memory:?bytes=1MB", f"file://{Path.cwd()}/store?bytes=1GB"]) as store:
        ...     store.put("chunk/1", stream[:1000])
        ...     store.get("chunk/1") == stream[:1000]
        True
    """
    store = _open(url, dict(options))
    if isinstance(url, str) or all(isinstance(tier, str) for tier in url):
        store._opened_by = (url if isinstance(url, str) else tuple(url), options)
    return store


def encrypted(store: Store, *keys: bytes) -> Store:
    """A store around another one, which encrypts its values.

    Parameters:
        store: Holds the encrypted values; closed with the new store.
        keys: Of 32 bytes each. The first encrypts; entries under any of them can be read.

    Returns:
        The store that reads and writes plain values.

    Raises:
        InvalidArgument: A key has another length, or is one byte repeated.
        MissingDependency: The package cryptography is not installed.

    Example:
        >>> import secrets
        >>> from kvtc.store import encrypted
        >>> inner = kvtc.open_store("memory:")
        >>> store = encrypted(inner, secrets.token_bytes(32))
        >>> store.put("name", b"plain text")
        >>> store.get("name"), b"plain text" in inner.get("name")
        (b'plain text', False)
    """
    from .encryption import EncryptedStore

    return EncryptedStore(store, keys)


def _open(url: str | Sequence[str | Store], options: dict[str, Any]) -> Store:
    if not isinstance(url, str):
        return _open_tiers(url, StoreUrl(_TIERED, options))
    if url.startswith(_TIERED):
        first, *rest = url.removeprefix(_TIERED).split("|")
        own, tiers = (first, rest) if first.startswith("?") else ("", [first, *rest])
        return _open_tiers(tiers, StoreUrl(_TIERED + own, options))
    return _open_one(StoreUrl(url, options))


def open_place(url: str, *, recovers: bool = False, **options: Any) -> Place:
    """The place that a URL names, to look after what is there: see `kvtc.store.place.Place`.

    Parameters:
        url, options: As of `open_store`, of one store that does not lie in the memory of a process.
        recovers: Whether the place is made and cleaned up, as `open_store` does; otherwise opening it changes nothing.

    Returns:
        The place; it is closed at the end of a `with` block.

    Raises:
        InvalidArgument: The URL is of tiers or of a process's memory, or is not understood.
        MissingDependency, StoreUnavailable: As `open_store`; without `recovers` also where there is no such directory.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.maintenance.verification import verify
        >>> from kvtc.store import open_place
        >>> url = f"file://{Path.cwd()}/store"
        >>> with kvtc.open_store(url) as store:
        ...     store.put("chats/1", stream)
        >>> with open_place(url) as place:
        ...     [entry.key for entry in place.entries()], dict(verify(place).forms)
        (['chats/1'], {'stream': 1})
    """
    from .place import Place

    parsed = StoreUrl(url, options)
    if url.startswith(_TIERED):
        raise InvalidArgument("the URL names several tiers; expected the URL of one of them")
    store, keys = _opened(parsed)
    if store.is_of_process:
        raise InvalidArgument(f"{parsed}: its entries lie in the memory of the process that has put them there")
    (store.recover if recovers else store.check_place)()
    return Place(store, keys)


def _open_one(url: StoreUrl) -> Store:
    store, keys = _opened(url)
    store.recover()
    return encrypted(store, *keys) if keys else store


def _opened(url: StoreUrl) -> tuple[FramedStore, list[bytes]]:
    """A store as it was left, and the keys of its values, if they are encrypted."""
    if url.scheme not in _SCHEMES:
        raise InvalidArgument(f"store URL {str(url)!r}: expected a scheme of tiered, {', '.join(sorted(_SCHEMES))}")
    module, _, name = _SCHEMES[url.scheme].partition(":")
    keys = _take_keys(url)
    opener = getattr(importlib.import_module(module, __name__), name)
    store: FramedStore = opener(url)
    return store, keys


def _take_keys(url: StoreUrl) -> list[bytes]:
    file, variable = url.take("key_file", str), url.take("key_variable", str)
    if file is None and variable is None:
        return []
    if file is not None and variable is not None:
        raise InvalidArgument(f"{url}: key_file and key_variable are both given; expected one")
    from .encryption import keys_from_file, keys_from_variable

    return keys_from_file(file) if file is not None else keys_from_variable(variable)


def _open_tiers(tiers: Sequence[str | Store], url: StoreUrl) -> Store:
    from .tiered import DEFAULT_QUEUE_BYTES, TieredStore

    write = url.take("write", str, "through")
    queue_bytes = url.take("queue_bytes", parse_bytes, DEFAULT_QUEUE_BYTES)
    url.expect_no_rest()
    with ExitStack() as opened:
        stores = [tier if isinstance(tier, Store) else opened.enter_context(open_store(tier)) for tier in tiers]
        store = TieredStore(stores, write, queue_bytes)
        opened.pop_all()  # theirs to close from here on
        return store
