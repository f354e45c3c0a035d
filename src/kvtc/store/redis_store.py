"""`redis://` and `rediss://` entries in a Redis or Valkey server; budget and eviction are the
server's (maxmemory, ttl)."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from ..errors import InvalidArgument, KvtcError, MissingDependency, StoreFull, StoreUnavailable
from ..process.forks import in_child
from .bounded_calls import BoundedCalls
from .frame import FRAME_BYTES, Frame, Head
from .framed import MAX_SKEW_SECONDS, PROBE_NAME, Finding, FramedStore, Listed
from .redaction import SECRET_OPTIONS, Redactor, translated, user_info
from .urls import StoreUrl, parse_seconds

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise MissingDependency('stores at redis:// need the package redis; pip install "kvtc[redis]"') from error

T = TypeVar("T")
DEFAULT_SECONDS = 5.0
MAX_FRAME_BYTES = 512 << 20  # of a Redis string
BATCH_BYTES = 32 << 20  # sent before the server's answers are read
BATCH_KEYS = 64
CONNECTION_OPTIONS = (
    "username", "password", "db", "client_name", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile",
    "ssl_cert_reqs", "ssl_check_hostname", "health_check_interval", "max_connections",
)  # fmt: skip
_PREFIX = re.compile(r"[A-Za-z0-9:._/-]*", re.ASCII)
# Atomic on the server: a sound entry that was written since must stay. Looked at: its length, and
# as much as had been read.
_DISCARD = """
if redis.call('STRLEN', KEYS[1]) == tonumber(ARGV[2])
    and redis.sha1hex(redis.call('GETRANGE', KEYS[1], 0, tonumber(ARGV[3]))) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
"""


class RedisStore(FramedStore):
    """Entries as strings of a Redis server, under `prefix` and their name.

    Parameters:
        url: `redis://` or `rediss://`. Options: `timeout`, seconds that a caller waits for a batch
            of up to 64 entries, connecting included (see `BoundedCalls`; a lost connection is made
            again once); `ttl`, seconds after `put` until the server forgets an entry, where it
            should not be as the server is configured; `prefix` of the strings' keys;
            `CONNECTION_OPTIONS`, of redis-py.
    """

    def __init__(self, url: StoreUrl) -> None:
        self._place, self._url = str(url), url.base
        self._timeout = url.take("timeout", parse_seconds, DEFAULT_SECONDS)
        ttl = url.take("ttl", parse_seconds)
        self._ttl_milliseconds = None if ttl is None else max(1, round(1000 * ttl))
        self._prefix = url.take("prefix", str, "kvtc:")
        if _PREFIX.fullmatch(self._prefix) is None:
            raise InvalidArgument(f"prefix {self._prefix!r:.80}: expected characters of a-z A-Z 0-9 : . _ / -")
        options = {name: text for name in CONNECTION_OPTIONS if (text := url.take(name, str)) is not None}
        super().__init__(url)
        self._redactor = Redactor([*user_info(url.base), *(options[name] for name in SECRET_OPTIONS & options.keys())])
        self._connection = translated(lambda: redis.connection.parse_url(url.with_query(options)), self._refusal)
        for fixed in ("host", "port", "connection_class"):  # stay in the URL
            self._connection.pop(fixed, None)
        translated(self._connect, self._refusal)
        in_child(self._connect)
        self._calls = BoundedCalls(self._place, self._timeout, partial(self._exists, [PROBE_NAME]), self._meaning)

    def __repr__(self) -> str:
        return f"RedisStore({self._place!r})"

    def close(self) -> None:
        super().close()
        self._client.connection_pool.disconnect()

    def _connect(self) -> None:
        """A client of this process's own; it connects when it is first used."""
        self._client = redis.Redis.from_url(
            self._url,
            socket_timeout=self._timeout,
            socket_connect_timeout=self._timeout,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            **self._connection,
        )
        self._client.auto_close_connection_pool = (
            False  # else a child, forgetting its parent's client, waits for that one's locks
        )

    def _read(self, names: Sequence[str]) -> list[Frame | None]:
        frames: list[Frame | None] = []
        for start in range(0, len(names), BATCH_KEYS):
            frames += self._calls.run(partial(self._get, names[start : start + BATCH_KEYS]))
        return frames

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        batch: list[tuple[str, bytes]] = []
        n_waiting = 0
        try:
            for name, frame in zip(names, frames, strict=True):
                if len(frame) > MAX_FRAME_BYTES:
                    raise StoreFull(f"{self._place}: an entry of {len(frame)} bytes; Redis takes {MAX_FRAME_BYTES}")
                batch.append((name, frame))
                n_waiting += len(frame)
                if n_waiting >= BATCH_BYTES:
                    full, batch, n_waiting = batch, [], 0
                    self._calls.run(partial(self._set, full))
        finally:  # what comes before an entry that is too large is kept
            self._calls.run(partial(self._set, batch))

    def _leading(self, names: Sequence[str]) -> int:
        found = self._present(names)
        return found.index(False) if False in found else len(found)

    def _present(self, names: Sequence[str]) -> list[bool]:
        return [found > 0 for found in self._calls.run(partial(self._exists, names))]

    def _remove(self, name: str) -> None:
        self._calls.run(lambda: self._client.delete(self._prefix + name))

    def _discard(self, name: str, frame: Frame) -> None:
        head, size = frame if isinstance(frame, Head) else (frame, len(frame))
        digest = hashlib.sha1(head, usedforsecurity=False).hexdigest()
        self._calls.run(lambda: self._client.eval(_DISCARD, 1, self._prefix + name, digest, size, len(head) - 1))

    def diagnose(self) -> list[Finding]:
        found = super().diagnose()
        memory = self._calls.run(lambda: self._client.info("memory"))
        most, policy, used = (
            memory.get("maxmemory", 0),
            memory.get("maxmemory_policy", "?"),
            memory.get("used_memory", 0),
        )
        keeps_all = policy == "noeviction" and self._ttl_milliseconds is None
        wrong = "; it evicts nothing and the URL has no ttl" if keeps_all else "" if most else "; no limit is set"
        told = f"{used:,} bytes in use, maxmemory {most:,}, maxmemory-policy {policy}{wrong}"
        found.append(Finding("memory of the server", not wrong or self._ttl_milliseconds is not None, told))
        seconds, microseconds = self._calls.run(lambda: self._client.time())
        skew = seconds + microseconds / 1e6 - time.time()
        return [
            *found,
            Finding("clock of the server", abs(skew) < MAX_SKEW_SECONDS, f"{skew:+.1f} seconds from this machine's"),
        ]

    def _list(self) -> Iterator[Listed]:
        cursor, seen = None, set[bytes]()
        while cursor != 0:
            scan = partial(self._client.scan, cursor or 0, match=f"{self._prefix}*", count=1000)
            cursor, keys = self._calls.run(scan)
            news = [key for key in keys if key not in seen]
            seen.update(news)
            for key, (size, idle) in zip(news, self._calls.run(partial(self._facts, news)), strict=True):
                # Keys of other programs may be any bytes; what is no text is no name.
                name = key.decode("utf-8", "replace").removeprefix(self._prefix)
                if isinstance(size, int):  # a string
                    yield Listed(name, size, time.time() - idle if isinstance(idle, int) else None)

    def _facts(self, keys: Sequence[bytes]) -> list[tuple[Any, Any]]:
        """Length and seconds without use of each key; errors where it is no string, or the server counts
        uses in another way."""
        with self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.strlen(key)
                pipeline.object("IDLETIME", key)
            found = pipeline.execute(raise_on_error=False)
        return list(zip(found[::2], found[1::2], strict=True))

    def _heads(self, names: Sequence[str], n_bytes: int) -> list[bytes]:
        return [
            head
            for start in range(0, len(names), BATCH_KEYS)
            for head in self._calls.run(partial(self._get_ranges, names[start : start + BATCH_KEYS], n_bytes))
        ]

    def _get_ranges(self, names: Sequence[str], n_bytes: int) -> list[bytes]:
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.getrange(self._prefix + name, 0, n_bytes - 1)
            return [head if isinstance(head, bytes) else b"" for head in pipeline.execute(raise_on_error=False)]

    def _get(self, names: Sequence[str]) -> list[Frame | None]:
        """Lengths first, so that no value is read that is longer than allowed; MGET knows the
        absent from the empty."""
        keys = [self._prefix + name for name in names]
        with self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.strlen(key)
            sizes = pipeline.execute(raise_on_error=False)
            for size in sizes:
                if isinstance(size, redis.RedisError) and not str(size).startswith("WRONGTYPE"):  # no string: no entry
                    raise size
            is_long = [isinstance(size, int) and size > FRAME_BYTES + self.entry_bytes for size in sizes]
            pipeline.mget([key for key, long in zip(keys, is_long, strict=True) if not long] or [self._prefix])
            for key, long in zip(keys, is_long, strict=True):
                if long:
                    pipeline.getrange(key, 0, FRAME_BYTES - 1)
            whole, *heads = pipeline.execute()
        values, long_heads = iter(whole), iter(heads)
        return [
            Head(next(long_heads), size) if long else next(values) for size, long in zip(sizes, is_long, strict=True)
        ]

    def _set(self, batch: Sequence[tuple[str, bytes]]) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for name, frame in batch:
                pipeline.set(self._prefix + name, frame, px=self._ttl_milliseconds)
            pipeline.execute()

    def _exists(self, names: Sequence[str]) -> list[int]:
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.exists(self._prefix + name)
            found: list[int] = pipeline.execute()
        return found

    def _refusal(self, error: BaseException) -> InvalidArgument:
        return InvalidArgument(f"{self._place}: {self._redactor.message(error)}")

    def _meaning(self, error: BaseException) -> BaseException:
        if isinstance(error, KvtcError | MemoryError):
            return error
        if isinstance(error, redis.OutOfMemoryError):
            return StoreFull(f"{self._place}: the server has no memory left: {self._redactor.cut(str(error))}")
        return StoreUnavailable(f"{self._place}: {self._redactor.message(error)}")
