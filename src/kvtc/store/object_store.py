"""`s3://bucket/prefix` entries as objects of S3 or of any server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidArgument, MissingDependency, StoreFull, StoreUnavailable
from .framed import FramedStore
from .urls import StoreUrl, parse_seconds

try:
    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import S3Store
except ImportError as error:
    raise MissingDependency('stores at s3:// need the package obstore; pip install "kvtc[s3]"') from error

T = TypeVar("T")
DEFAULT_SECONDS = 20.0
MAX_RETRIES = 3
CONCURRENCY = 16
MAX_FRAME_BYTES = 5 << 30  # of one upload in one request
SUFFIX = ".entry"
MESSAGE_LENGTH = 400
SERVER_OPTIONS = (
    "endpoint", "region", "access_key_id", "secret_access_key", "session_token", "skip_signature", "virtual_hosted_style_request",
)  # fmt: skip


class ObjectStore(FramedStore):
    """Entries as objects `prefix/<name>.entry`, each request of many in flight at once.

    timeout: seconds after which an operation on one entry has succeeded or failed, retries included.
    ca_file: PEM certificates of authorities to trust beside the usual ones.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        timeout: float = DEFAULT_SECONDS,
        server: dict[str, Any] | None = None,
        ca_file: str | None = None,
        namespace: str | None = None,
        on_error: str = "raise",
    ) -> None:
        super().__init__(namespace, on_error)
        self._place = f"s3://{bucket}/{prefix}".rstrip("/")
        server = server or {}
        attempt = timedelta(seconds=timeout / 2)  # retries begin in the first half, and the last one ends in the second
        client: dict[str, Any] = {
            "timeout": attempt,
            "connect_timeout": attempt,
            "allow_http": str(server.get("endpoint", "")).startswith("http://"),
        }
        try:
            if ca_file is not None:
                client["root_certificate"] = Path(ca_file).read_bytes()
            self._objects = S3Store(
                bucket,
                prefix=prefix or None,
                client_options=client,
                retry_config={
                    "max_retries": MAX_RETRIES,
                    "retry_timeout": attempt,
                    "backoff": {"init_backoff": attempt / 50, "max_backoff": attempt / 5, "base": 2},
                },
                **server,
            )
        except (BaseError, OSError, ValueError, TypeError) as error:
            raise InvalidArgument(f"{self._place}: {str(error)[:MESSAGE_LENGTH]}") from error
        self._pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="kvtc-s3")

    @classmethod
    def from_url(cls, url: StoreUrl) -> ObjectStore:
        if not url.host:
            raise InvalidArgument(f"{url}: expected s3://bucket/prefix")
        timeout = url.take("timeout", parse_seconds, DEFAULT_SECONDS)
        options = {name: url.take(name, str) for name in SERVER_OPTIONS}
        server = {name: text for name, text in options.items() if text is not None}
        ca_file = url.take("ca_file", str)
        return cls(url.host, url.path.strip("/"), timeout, server, ca_file, **url.take_common())

    def __repr__(self) -> str:
        return f"ObjectStore({self._place!r})"

    def close(self) -> None:
        super().close()
        self._pool.shutdown(cancel_futures=True)

    def _read(self, names: Sequence[str]) -> list[bytes | None]:
        return self._for_all(self._get, names)

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        for start in range(0, len(names), CONCURRENCY):
            group = names[start : start + CONCURRENCY]
            self._for_all(self._put, group, [next(frames) for _ in group])

    def _leading(self, names: Sequence[str]) -> int:
        for start in range(0, len(names), CONCURRENCY):
            group = names[start : start + CONCURRENCY]
            found = self._for_all(self._is_there, group)
            if not all(found):
                return start + found.index(False)
        return len(names)

    def _remove(self, name: str) -> None:
        with self._translating():
            obstore.delete(self._objects, name + SUFFIX)

    def _discard(self, name: str, frame: bytes) -> None:
        if self._get(name) == frame:  # the protocol has no surer way that every server knows
            self._remove(name)

    def _list(self) -> Iterator[str]:
        with self._translating():
            paths = [entry["path"] for batch in obstore.list(self._objects) for entry in batch]
        return (path.removesuffix(SUFFIX) for path in paths if path.endswith(SUFFIX))

    def _for_all(self, call: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
        """All at once; the first error ends the batch and is raised."""
        if len(arguments[0]) == 1:
            return [call(*(values[0] for values in arguments))]
        return list(self._pool.map(call, *arguments))

    def _get(self, name: str) -> bytes | None:
        with self._translating():
            try:
                return bytes(obstore.get(self._objects, name + SUFFIX).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def _put(self, name: str, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise StoreFull(f"{self._place}: an entry of {len(frame)} bytes; one upload takes {MAX_FRAME_BYTES}")
        with self._translating():
            obstore.put(self._objects, name + SUFFIX, frame, use_multipart=False)

    def _is_there(self, name: str) -> bool:
        with self._translating():
            try:
                obstore.head(self._objects, name + SUFFIX)
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            text = " ".join(str(error).split())[:MESSAGE_LENGTH]
            raise StoreUnavailable(f"{self._place}: {type(error).__name__}: {text}") from error
