"""`s3://bucket/prefix` entries as objects of S3 or of any server that speaks its protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidArgument, KvtcError, MissingDependency, StoreFull, StoreUnavailable
from ..process.forks import in_child
from .bounded_calls import MAX_THREADS, BoundedCalls
from .frame import FRAME_BYTES, Frame, Head
from .framed import PROBE_NAME, FramedStore, Listed
from .redaction import SECRET_OPTIONS, Redactor, translated, user_info
from .urls import StoreUrl, parse_seconds

try:
    import obstore
    from obstore.store import S3Store
except ImportError as error:
    raise MissingDependency('stores at s3:// need the package obstore; pip install "kvtc[s3]"') from error

T = TypeVar("T")
DEFAULT_SECONDS = 20.0
MAX_RETRIES = 3
MAX_FRAME_BYTES = 5 << 30  # of one upload in one request
SUFFIX = ".entry"
SERVER_OPTIONS = (
    "endpoint", "region", "access_key_id", "secret_access_key", "session_token", "skip_signature", "virtual_hosted_style_request",
)  # fmt: skip


class _Client:
    """Whether obstore, whose threads serve all stores of a process, has been used by this process's
    parent: then it hangs here."""

    def __init__(self) -> None:
        self.is_used = self.is_left_behind = False
        in_child(self._renew)

    def _renew(self) -> None:
        self.is_left_behind |= self.is_used


_client = _Client()


class ObjectStore(FramedStore):
    """Entries as objects `prefix/<name>.entry` of an S3 server, up to 16 requests at once.

    In the child of a process that has used such a store it raises `StoreUnavailable`: the threads
    of its client are not there.

    Parameters:
        url: `s3://bucket/prefix`. Options: `timeout`, seconds that a caller waits for a group of up
            to 16 entries, retries included (see `BoundedCalls`); `endpoint`, `region`, credentials
            and others of `SERVER_OPTIONS`; `ca_file`, PEM certificates of authorities to trust
            beside the usual ones.
    """

    def __init__(self, url: StoreUrl) -> None:
        if not url.host or url.has_user:
            raise InvalidArgument(f"{url}: expected s3://bucket/prefix, and credentials as options")
        self._bucket, self._prefix = url.host, url.path.strip("/")
        self._place = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._timeout = url.take("timeout", parse_seconds, DEFAULT_SECONDS)
        self._server = {name: text for name in SERVER_OPTIONS if (text := url.take(name, str)) is not None}
        self._ca_file = url.take("ca_file", str)
        super().__init__(url)
        self._redactor = Redactor(_secrets(self._server))
        self._objects = translated(
            self._connect, lambda error: InvalidArgument(f"{self._place}: {self._redactor.message(error)}")
        )
        self._calls = BoundedCalls(self._place, self._timeout, partial(self._is_there, PROBE_NAME), self._meaning)

    def __repr__(self) -> str:
        return f"ObjectStore({self._place!r})"

    def _connect(self) -> Any:
        # Retries begin in the first half of the time, and the last one ends in the second.
        attempt = timedelta(seconds=self._timeout / 2)
        client: dict[str, Any] = {
            "timeout": attempt,
            "connect_timeout": attempt,
            "allow_http": str(self._server.get("endpoint", "")).startswith("http://"),
        }
        if self._ca_file is not None:
            client["root_certificate"] = Path(self._ca_file).read_bytes()
        return S3Store(
            self._bucket,
            prefix=self._prefix or None,
            client_options=client,
            retry_config={
                "max_retries": MAX_RETRIES,
                "retry_timeout": attempt,
                "backoff": {"init_backoff": attempt / 50, "max_backoff": attempt / 5, "base": 2},
            },
            **self._server,
        )

    def _read(self, names: Sequence[str]) -> list[Frame | None]:
        return [frame for group in _groups(names) for frame in self._run(partial(self._get, name) for name in group)]

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        for group in _groups(names):
            puts: list[Callable[[], None]] = []
            try:
                for name in group:
                    puts.append(partial(self._put, name, next(frames)))  # noqa: PERF401  those before an error count
            finally:
                self._run(puts)

    def _leading(self, names: Sequence[str]) -> int:
        n_found = 0
        for group in _groups(names):
            found = self._run(partial(self._is_there, name) for name in group)
            if not all(found):
                return n_found + found.index(False)
            n_found += len(group)
        return n_found

    def _present(self, names: Sequence[str]) -> list[bool]:
        return [
            found for group in _groups(names) for found in self._run(partial(self._is_there, name) for name in group)
        ]

    def _remove(self, name: str) -> None:
        self._run([lambda: obstore.delete(self._objects, name + SUFFIX)])

    def _discard(self, name: str, frame: Frame) -> None:
        if self._read([name]) == [frame]:  # the protocol has no surer way that every server knows
            self._remove(name)

    def _list(self) -> Iterator[Listed]:
        """Page by page. A name that obstore cannot parse, such as with an empty part, ends it with
        an error that shows the name."""
        (pages,) = self._run([lambda: iter(obstore.list(self._objects))])
        while page := self._run([lambda: next(pages, None)])[0]:
            for entry in page:
                if entry["path"].endswith(SUFFIX):
                    name = entry["path"].removesuffix(SUFFIX)
                    yield Listed(name, entry["size"], entry["last_modified"].timestamp())

    def _heads(self, names: Sequence[str], n_bytes: int) -> list[bytes]:
        return [
            head for group in _groups(names) for head in self._run(partial(self._head, name, n_bytes) for name in group)
        ]

    def _head(self, name: str, n_bytes: int) -> bytes:
        try:
            return bytes(obstore.get_range(self._objects, name + SUFFIX, start=0, length=n_bytes))
        except FileNotFoundError:
            return b""

    def _get(self, name: str) -> Frame | None:
        try:
            found = obstore.get(self._objects, name + SUFFIX)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None
        size = found.meta["size"]
        if size <= FRAME_BYTES + self.entry_bytes:
            return bytes(found.bytes())
        return Head(bytes(obstore.get_range(self._objects, name + SUFFIX, start=0, length=FRAME_BYTES)), size)

    def _put(self, name: str, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise StoreFull(f"{self._place}: an entry of {len(frame)} bytes; one upload takes {MAX_FRAME_BYTES}")
        obstore.put(self._objects, name + SUFFIX, frame, use_multipart=False)

    def _is_there(self, name: str) -> bool:
        try:
            obstore.head(self._objects, name + SUFFIX)
        except FileNotFoundError:
            return False
        return True

    def _run(self, calls: Iterable[Callable[[], T]]) -> list[T]:
        if _client.is_left_behind:
            raise StoreUnavailable(
                f"{self._place}: this process was forked from one that has used a store at s3://, whose client cannot be used "
                "here; start processes with spawn, or use the store in the children alone"
            )
        _client.is_used = True
        return self._calls.run_all(list(calls))

    def _meaning(self, error: BaseException) -> BaseException:
        if isinstance(error, KvtcError | MemoryError):
            return error
        return StoreUnavailable(f"{self._place}: {self._redactor.message(error)}")


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + MAX_THREADS] for start in range(0, len(names), MAX_THREADS))


def _secrets(server: dict[str, Any]) -> Iterator[object]:
    """What must not be shown of a server's options and of the environment, which the client reads
    too."""
    environment = {
        name.removeprefix("AWS_").lower(): text for name, text in os.environ.items() if name.startswith("AWS_")
    }
    for options in (server, environment):
        for name, value in options.items():
            if name in SECRET_OPTIONS:
                yield value
            elif name.startswith("endpoint"):
                yield from user_info(str(value))
