"""`redis://` and `rediss://` entries in a Redis or Valkey server; budget and eviction are the server's (maxmemory, ttl)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import InvalidArgument, MissingDependency, StoreFull, StoreUnavailable
from .framed import FramedStore
from .urls import StoreUrl, parse_seconds

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise MissingDependency('stores at redis:// need the package redis; pip install "kvtc[redis]"') from error

DEFAULT_SECONDS = 5.0
MAX_FRAME_BYTES = 512 << 20  # of a Redis string
BATCH_BYTES = 32 << 20  # sent before the server's answers are read
BATCH_KEYS = 64
CONNECTION_OPTIONS = (
    "username", "password", "db", "client_name", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile",
    "ssl_cert_reqs", "ssl_check_hostname", "health_check_interval", "max_connections",
)  # fmt: skip
_PREFIX = re.compile(r"[A-Za-z0-9:._/-]*", re.ASCII)
# Atomic on the server: a sound entry that was written since must stay.
_DISCARD = (
    "if redis.sha1hex(redis.call('GET', KEYS[1]) or '') == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)


class RedisStore(FramedStore):
    """Entries as strings under `prefix` + name.

    timeout: seconds for connecting and for every wait on the socket. A lost connection is made anew once per operation.
    ttl: seconds until the server forgets an entry, counted from `put`; None: the server's own policy.
    """

    def __init__(
        self,
        url: str,
        timeout: float = DEFAULT_SECONDS,
        ttl: float | None = None,
        prefix: str = "kvtc:",
        connection: dict[str, Any] | None = None,
        namespace: str | None = None,
        on_error: str = "raise",
    ) -> None:
        super().__init__(namespace, on_error)
        if _PREFIX.fullmatch(prefix) is None:
            raise InvalidArgument(f"prefix {prefix!r:.80}: expected characters of a-z A-Z 0-9 : . _ / -")
        self._place = str(StoreUrl(url))
        self._prefix = prefix
        self._ttl_milliseconds = None if ttl is None else max(1, round(1000 * ttl))
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
                **(connection or {}),
            )
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"{self._place}: {error}") from error

    @classmethod
    def from_url(cls, url: StoreUrl) -> RedisStore:
        timeout = url.take("timeout", parse_seconds, DEFAULT_SECONDS)
        ttl = url.take("ttl", parse_seconds)
        prefix = url.take("prefix", str, "kvtc:")
        options = {name: url.take(name, str) for name in CONNECTION_OPTIONS}
        try:
            connection = redis.connection.parse_url(
                url.with_query({name: text for name, text in options.items() if text is not None})
            )
        except ValueError as error:
            raise InvalidArgument(f"{url}: {error}") from error
        for fixed in ("host", "port", "connection_class"):  # stay in the URL
            connection.pop(fixed, None)
        return cls(url.base, timeout, ttl, prefix, connection, **url.take_common())

    def __repr__(self) -> str:
        return f"RedisStore({self._place!r})"

    def close(self) -> None:
        super().close()
        self._client.close()
        self._client.connection_pool.disconnect()

    def _read(self, names: Sequence[str]) -> list[bytes | None]:
        frames: list[bytes | None] = []
        with self._translating():
            for start in range(0, len(names), BATCH_KEYS):
                frames += self._client.mget([self._prefix + name for name in names[start : start + BATCH_KEYS]])
        return frames

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        with self._translating(), self._client.pipeline(transaction=False) as pipeline:
            n_waiting = 0
            for name, frame in zip(names, frames, strict=True):
                if len(frame) > MAX_FRAME_BYTES:
                    raise StoreFull(f"{self._place}: an entry of {len(frame)} bytes; Redis takes {MAX_FRAME_BYTES}")
                pipeline.set(self._prefix + name, frame, px=self._ttl_milliseconds)
                n_waiting += len(frame)
                if n_waiting >= BATCH_BYTES:
                    pipeline.execute()
                    n_waiting = 0
            pipeline.execute()

    def _leading(self, names: Sequence[str]) -> int:
        with self._translating(), self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.exists(self._prefix + name)
            found = pipeline.execute()
        return found.index(0) if 0 in found else len(found)

    def _remove(self, name: str) -> None:
        with self._translating():
            self._client.delete(self._prefix + name)

    def _discard(self, name: str, frame: bytes) -> None:
        with self._translating():
            self._client.eval(_DISCARD, 1, self._prefix + name, hashlib.sha1(frame, usedforsecurity=False).hexdigest())

    def _list(self) -> Iterator[str]:
        with self._translating():
            seen = {key.decode() for key in self._client.scan_iter(match=f"{self._prefix}*", count=1000)}
        return (key.removeprefix(self._prefix) for key in seen)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except redis.OutOfMemoryError as error:
            raise StoreFull(f"{self._place}: the server has no memory left: {error}") from error
        except (redis.RedisError, OSError) as error:
            raise StoreUnavailable(f"{self._place}: {type(error).__name__}: {error}") from error
