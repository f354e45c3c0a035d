"""Where serving benchmarks store: memory, a directory, Redis and S3 in servers started for the run,
and tiers of these.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import kvtc
from kvtc.store import Store

NAMES = ("memory", "file", "redis", "s3", "tiered")
INSTALLED_BY = "`make test-stores` installs it; or leave out the stores that need it"


@contextmanager
def open_stores(names: Sequence[str]) -> Iterator[dict[str, Store]]:
    """An empty store for each of these names, while the block runs. tiered: memory, then a
    directory, then Redis.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="kvtc-stores-")))
        urls = {"memory": "memory:", "file": f"file://{directory}/file"}
        if {"redis", "tiered"} & set(names):
            redis = stack.enter_context(redis_server(directory))
            urls |= {"redis": redis, "tiered": f"tiered:memory:|file://{directory}/tier|{redis}/1"}
        if "s3" in names:
            urls["s3"] = stack.enter_context(s3_server())
        yield {name: stack.enter_context(kvtc.open_store(urls[name])) for name in names}


@contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """The URL of a Redis that keeps nothing on disk."""
    port = free_port()
    program = shutil.which("redis-server")
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(directory)]
    with running("redis-server", command, port):
        yield f"redis://127.0.0.1:{port}"


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a bucket in moto's S3. KVTC_MOTO_SERVER may name the program."""
    port = free_port()
    beside = Path(sys.prefix) / "servers" / "bin" / "moto_server"
    program = os.environ.get("KVTC_MOTO_SERVER") or (str(beside) if beside.exists() else shutil.which("moto_server"))
    with running("moto_server", [program, "-H", "127.0.0.1", "-p", str(port)], port):
        endpoint = f"http://127.0.0.1:{port}"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/bucket")
        connection.getresponse().close()
        connection.close()
        yield f"s3://bucket/kvtc?endpoint={endpoint}&region=us-east-1&access_key_id=x&secret_access_key=y&timeout=60"


@contextmanager
def running(name: str, command: Sequence[str | None], port: int, seconds: float = 60) -> Iterator[None]:
    """A server on a port for as long as the block runs."""
    if command[0] is None:
        raise SystemExit(f"{name} is not installed: {INSTALLED_BY}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while not accepts(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} does not serve port {port}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
