"""Streams of kvtc as plain bytes through NIXL and Mooncake: what one process gives, another reads back and decodes.

    nixl       an agent of NIXL writes a stream to a file by its POSIX plugin; an agent of another process reads it
    mooncake   a client of Mooncake's store puts a stream and one of another length; a client of another process gets both

Run in an environment of its own: `make test-engines ENGINES=transports`. Exits with 1 where something differs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lmcache_places import free_port, running
from vllm_end_to_end import Failure, expect, prompts

from kvtc import Codec, inspect
from kvtc.codec import transformers_cache as interop
from kvtc.reference import reference_calibration, reference_model

N_TOKENS, RATIO = 512, 8
SEGMENT_BYTES, BUFFER_BYTES = 64 << 20, 16 << 20


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        codec = Codec(reference_calibration(), "joint", ratio=RATIO, window_tokens=0)
        stream = make_stream(codec)
        (scratch / "stream").write_bytes(stream)
        info = inspect(stream)
        print(f"transports: {N_TOKENS} tokens, a stream of {len(stream)} bytes, total ratio {info.total_ratio:.2f}")
        for name, way in (("nixl", through_nixl), ("mooncake", through_mooncake)):
            got = way(scratch, len(stream))
            expect(f"bytes through {name}", hashlib.sha256(got).hexdigest(), hashlib.sha256(stream).hexdigest())
            print(
                f"  {name}: {len(got)} bytes come back in another process, {codec.decode_neutral(got).n_tokens} tokens decoded"
            )
    print("all as it must be")


def make_stream(codec: Codec) -> bytes:
    ids = torch.tensor([prompts()[0][:N_TOKENS]])
    model, _ = reference_model("bfloat16")
    with torch.no_grad():
        return codec.encode(interop.from_transformers(model(ids).past_key_values, codec.calibration.geometry))


def through_nixl(scratch: Path, n_bytes: int) -> bytes:
    for role in ("nixl-write", "nixl-read"):
        child(role, scratch, n_bytes)
    return (scratch / "nixl.got").read_bytes()


def through_mooncake(scratch: Path, n_bytes: int) -> bytes:
    rpc, http, metrics = free_port(), free_port(), free_port()
    master = Path(sys.prefix) / "bin" / "mooncake_master"
    command = [master, f"--rpc_port={rpc}", f"--metrics_port={metrics}", "--rpc_address=127.0.0.1"]
    command += ["--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1"]
    command += [f"--http_metadata_server_port={http}"]
    with running(*command, port=rpc):
        # The bytes lie in the memory of the client that puts them, so it stays until they have been read.
        putting = subprocess.Popen(
            command_of("mooncake-put", scratch, n_bytes, rpc, http), env=environment(), stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 120
            while not (scratch / "mooncake.put").exists() and putting.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            child("mooncake-get", scratch, n_bytes, rpc, http)
        finally:
            putting.terminate()
            putting.wait()
    return (scratch / "mooncake.got").read_bytes()


def move_by_nixl(scratch: Path, n_bytes: int, operation: str) -> None:
    """Memory to file or file to memory, by NIXL's POSIX plugin."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(operation, nixl_agent_config(backends=["POSIX"]))
    buffer = torch.zeros(n_bytes, dtype=torch.uint8)
    if operation == "WRITE":
        buffer.copy_(torch.frombuffer(bytearray((scratch / "stream").read_bytes()), dtype=torch.uint8))
    file = os.open(scratch / "nixl.file", os.O_RDWR | os.O_CREAT, 0o600)
    agent.register_memory(buffer)
    agent.register_memory([(0, n_bytes, file, "stream")], "FILE")
    places = agent.get_xfer_descs([(0, n_bytes, file)], "FILE")
    transfer = agent.initialize_xfer(operation, agent.get_xfer_descs(buffer), places, operation)
    state = agent.transfer(transfer)
    while state not in ("DONE", "ERR"):
        state = agent.check_xfer_state(transfer)
    expect(f"state of NIXL's {operation}", state, "DONE")
    agent.release_xfer_handle(transfer)
    os.close(file)
    if operation == "READ":
        (scratch / "nixl.got").write_bytes(buffer.numpy().tobytes())


def mooncake_client(rpc: int, http: int) -> Any:
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    metadata, master = f"http://127.0.0.1:{http}/metadata", f"127.0.0.1:{rpc}"
    expect(
        "set-up of Mooncake's client",
        client.setup("127.0.0.1", metadata, SEGMENT_BYTES, BUFFER_BYTES, "tcp", "", master),
        0,
    )
    return client


def put_by_mooncake(scratch: Path, rpc: int, http: int) -> None:
    client, stream = mooncake_client(rpc, http), (scratch / "stream").read_bytes()
    expect("put", client.put("kvtc/stream", stream), 0)
    expect("put of another length", client.put("kvtc/short", stream[:777]), 0)
    (scratch / "mooncake.put").touch()
    time.sleep(300)


def get_by_mooncake(scratch: Path, rpc: int, http: int) -> None:
    client = mooncake_client(rpc, http)
    expect("the other length", len(client.get("kvtc/short")), 777)
    (scratch / "mooncake.got").write_bytes(client.get("kvtc/stream"))
    client.close()


def command_of(role: str, scratch: Path, *numbers: int) -> list[str]:
    return [sys.executable, __file__, role, str(scratch), *(str(number) for number in numbers)]


def child(role: str, scratch: Path, *numbers: int) -> None:
    """Play a role in a process of its own."""
    process = subprocess.run(
        command_of(role, scratch, *numbers), env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    if process.returncode:
        raise Failure(f"{role} ended with {process.returncode}:\n{process.stdout[-2000:]}{process.stderr[-2000:]}")


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "MC_TCP_BIND_ADDRESS": "127.0.0.1"}


def play(role: str, scratch: Path, n_bytes: int, rpc: int = 0, http: int = 0) -> None:
    if role == "nixl-write":
        move_by_nixl(scratch, n_bytes, "WRITE")
    elif role == "nixl-read":
        move_by_nixl(scratch, n_bytes, "READ")
    elif role == "mooncake-put":
        put_by_mooncake(scratch, rpc, http)
    else:
        get_by_mooncake(scratch, rpc, http)


if __name__ == "__main__":
    try:
        if len(sys.argv) > 1:
            play(sys.argv[1], Path(sys.argv[2]), *(int(number) for number in sys.argv[3:]))
        else:
            main()
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
