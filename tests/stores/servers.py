"""Servers that tests start for themselves, on free local ports, and stop again."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{process.args} does not answer on port {port}")


class Server:
    """A process listening on a port; it can be killed and started again."""

    def __init__(self, command: list[str], port: int, **popen) -> None:
        self.command, self.port, self._popen = command, port, popen
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._popen
        )
        wait_for(self.port, self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(path: Path, *arguments: str, port: int | None = None):
    """A Redis server that keeps nothing on disk; skips the test where none is installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    port = port or free_port()
    listening = [] if "--tls-port" in arguments else ["--port", str(port)]
    command = [binary, "--bind", "127.0.0.1", "--save", "", "--dir", str(path), *listening, *arguments]
    server = Server(command, port)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def s3_server():
    """moto's S3, in memory, with a bucket `bucket`; skips the test where it is not installed.

    KVTC_MOTO_SERVER may name its program.
    """
    beside = Path(sys.executable).with_name("moto_server")
    binary = os.environ.get("KVTC_MOTO_SERVER") or shutil.which("moto_server") or (beside if beside.exists() else None)
    if binary is None:
        pytest.skip("moto_server is not installed")
    port = free_port()
    server = Server([str(binary), "-H", "127.0.0.1", "-p", str(port)], port)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/bucket")
        connection.getresponse().close()
        connection.close()
        yield server
    finally:
        server.kill()


@contextmanager
def socket_server(answer):
    """A server that gives every connection to `answer(connection, ends)` in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    ends = threading.Event()

    def serve():
        while not ends.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    def handle(connection):
        with connection, suppress(OSError):
            answer(connection, ends)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ends.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def answer_nothing(_, ends):
    ends.wait(60)
