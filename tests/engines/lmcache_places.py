"""Where LMCache's server stores in these tests: how a place is configured, what lies in it; local servers for Redis and S3."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HOSTS = Path("/etc/hosts")
BUCKET_HOST = "kvtc.localhost"


class Place(ABC):
    """One L2 adapter of LMCache. adapter: its configuration."""

    name: str
    adapter: dict[str, Any]

    @abstractmethod
    def sizes(self) -> list[int]:
        """Bytes of everything that lies there, object by object."""


class PluginPlace(Place):
    """kvtc's own adapter with a store of files."""

    def __init__(self, scratch: Path, options: dict[str, Any], name: str = "plugin, file store") -> None:
        self.name, self.directory = name, scratch / name.replace(", ", "-").replace(" ", "-")
        self.adapter = plugin(f"file://{self.directory}", options)

    def files(self) -> list[Path]:
        return [file for file in (self.directory / "entries").rglob("*") if file.is_file()]

    def sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.files()]


class PluginRedisPlace(Place):
    """kvtc's own adapter with its store in Redis, in a database of its own."""

    name = "plugin, Redis store"

    def __init__(self, port: int, options: dict[str, Any]) -> None:
        self._port = port
        self.adapter = plugin(f"redis://127.0.0.1:{port}/1", options)

    def sizes(self) -> list[int]:
        return redis_sizes(self._port, 1)


class PluginS3Place(Place):
    """kvtc's own adapter with its store in S3, in a bucket of its own."""

    name = "plugin, S3 store (moto)"

    def __init__(self, port: int, options: dict[str, Any]) -> None:
        endpoint = f"http://127.0.0.1:{port}"
        self._bucket = f"{endpoint}/kvtc-plugin"
        # Large values on a busy machine: moto answers one request after the other.
        query = f"endpoint={endpoint}&region=us-east-1&access_key_id=x&secret_access_key=y&timeout=60"
        self.adapter = plugin(f"s3://kvtc-plugin/chunks?{query}", options)
        make_bucket(self._bucket)

    def sizes(self) -> list[int]:
        return s3_sizes(self._bucket)


class FilePlace(Place):
    """LMCache's `fs`."""

    name = "serde on fs"

    def __init__(self, scratch: Path, options: dict[str, Any]) -> None:
        self.directory = scratch / "fs"
        self.adapter = {"type": "fs", "base_path": str(self.directory), "serde": {"type": "kvtc", **options}}

    def sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.directory.rglob("*.data")]


class RedisPlace(Place):
    """LMCache's `resp`."""

    name = "serde on Redis (resp)"

    def __init__(self, port: int, options: dict[str, Any]) -> None:
        self._port = port
        self.adapter = {"type": "resp", "host": "127.0.0.1", "port": port, "serde": {"type": "kvtc", **options}}

    def sizes(self) -> list[int]:
        return redis_sizes(self._port, 0)


class S3Place(Place):
    """LMCache's `s3`, which addresses a bucket as a host."""

    name = "serde on S3 (moto)"

    def __init__(self, port: int, options: dict[str, Any]) -> None:
        self._url = f"http://127.0.0.1:{port}/kvtc"
        self.adapter = {
            "type": "s3",
            "s3_endpoint": f"s3://{BUCKET_HOST}:{port}",
            "s3_region": "us-east-1",
            "disable_tls": True,
            "s3_prefer_http2": False,
            "aws_access_key_id": "x",
            "aws_secret_access_key": "y",
            "serde": {"type": "kvtc", **options},
        }
        make_bucket(self._url)

    def sizes(self) -> list[int]:
        return s3_sizes(self._url)


def plugin(store: str, options: dict[str, Any]) -> dict[str, Any]:
    """Configuration of kvtc's own adapter with a store at a URL."""
    return {
        "type": "plugin",
        "module_path": "kvtc.engines.lmcache.l2",
        "class_name": "KvtcL2Adapter",
        "adapter_params": {**options, "kvtc.store": store},
    }


def redis_sizes(port: int, database: int) -> list[int]:
    """Bytes of every value of a database."""
    import redis

    with redis.Redis(port=port, db=database) as client:
        return [int(client.strlen(key)) for key in client.keys("*")]


def make_bucket(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()  # noqa: S310


def s3_sizes(url: str) -> list[int]:
    """Bytes of every object of a bucket."""
    with urllib.request.urlopen(f"{url}?list-type=2") as answer:  # noqa: S310
        tree = ElementTree.fromstring(answer.read())  # noqa: S314
    return [int(element.text or 0) for element in tree.iter() if element.tag.endswith("Size")]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Until a server accepts connections; RuntimeError if it ends before, or does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} does not serve port {port}")


@contextmanager
def running(*command: str | Path, port: int, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server for as long as the block runs."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **options}
    process = subprocess.Popen([str(part) for part in command], **options)
    try:
        wait_for_port(port, process)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def redis_server(scratch: Path) -> Iterator[int]:
    """Its port."""
    port = free_port()
    command = ("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", scratch)
    with running(*command, port=port):
        yield port


@contextmanager
def s3_server() -> Iterator[int]:
    """Port of moto's S3."""
    port = free_port()
    moto = os.environ.get("KVTC_MOTO_SERVER") or Path(sys.prefix) / "servers" / "bin" / "moto_server"
    with running(moto, "-H", "127.0.0.1", "-p", str(port), port=port):
        yield port


@contextmanager
def bucket_host() -> Iterator[None]:
    """The bucket's host name resolves, if need be by an entry in the hosts file that is removed again."""
    try:
        socket.getaddrinfo(BUCKET_HOST, None)
        yield
        return
    except socket.gaierror:
        before = HOSTS.read_text()
    HOSTS.write_text(f"{before.rstrip()}\n127.0.0.1 {BUCKET_HOST}\n")
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(f"127.0.0.1 {BUCKET_HOST}\n", ""))
