"""Disaggregated serving: one process computes a cache and sends it over loopback to another, which
goes on from it.

    python -m benchmarks.serving.between_processes --text FILE [--tokens 3500] [--answer-tokens 32] [--repeats 3]

Raw, and coded by kvtc; seconds from the last token computed to a cache ready in the other process,
and the speed of a link below which the coded cache is there first. The answer is generated in the
receiving process and compared with the sender's own.
"""

import argparse
import multiprocessing
import socket
import struct
from functools import partial
from statistics import median

import numpy as np
import torch

import kvtc
from benchmarks.shared.first_token import add_codec_arguments, answer, first_token, raw_bytes, start, token_ids
from benchmarks.shared.timing import timed
from kvtc.evaluate.provenance import save_result
from kvtc.report.table import format_bytes, format_table

LENGTH = struct.Struct("<Q")
SHAPE = struct.Struct("<5I")
PATIENCE_SECONDS = 300
"""For the other process to load its model, and for each of its answers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_codec_arguments(parser)
    parser.add_argument("--tokens", type=int, default=3500)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer, codec = start(options)
    ids = token_ids(tokenizer, options.text[0], 0.2, options.tokens)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_SECONDS)
        context = multiprocessing.get_context("spawn")
        receiver = context.Process(target=receive, args=(server.getsockname()[1], ids.tolist(), options), daemon=True)
        receiver.start()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_SECONDS)
            rows = [send(model, codec, ids, connection, options, coded) for coded in (False, True)]
        receiver.join()
    raw, coded = rows
    spared = raw["bytes"] - coded["bytes"]
    worked = coded["encode"] + coded["rebuild"] - raw["encode"] - raw["rebuild"]
    link = 8e-9 * spared / worked if worked > 0 else float("inf")
    header = ["cache", "bytes", "prefill", "encode", "transfer", "decode", f"same of {options.answer_tokens} tokens"]
    times = ("prefill", "encode", "transfer", "rebuild")
    table = [
        [row["cache"], format_bytes(row["bytes"]), *(f"{1e3 * row[name]:.0f} ms" for name in times), row["same"]]
        for row in rows
    ]
    print(format_table(header, table))
    print(f"the coded cache is there first on links below {link:.2f} Gbit/s")
    settings = {"tokens": len(ids), "profile": options.profile, "ratio": options.ratio}
    save_result(
        "between_processes", {"kind": "between_processes", **settings, "rows": rows, "break_even_gbit_per_second": link}
    )


def send(model, codec, ids, connection, options, coded: bool) -> dict:
    """Compute, code and send `repeats` times; the receiver answers each with its own times and its
    answer.
    """
    runs = []
    for _ in range(options.repeats):
        logits, cache, prefill = first_token(model, ids, None)
        size = raw_bytes(cache)
        data, encode = timed(lambda c=cache: codec.encode(c, ids) if coded else pack_raw(c))
        said = answer(model, logits, cache, options.answer_tokens)
        message = struct.pack("<B", coded) + data
        connection.sendall(LENGTH.pack(len(message)) + message)
        reply = struct.Struct(f"<2d{options.answer_tokens}q")
        transfer, rebuild, *found = reply.unpack(exactly(connection, reply.size))
        same = int((torch.tensor(found) == said).sum())
        runs.append({"prefill": prefill, "encode": encode, "transfer": transfer, "rebuild": rebuild, "same": same})
    times = {name: median(run[name] for run in runs) for name in ("prefill", "encode", "transfer", "rebuild")}
    same = min(run["same"] for run in runs)
    name = f"{options.profile} {options.ratio:g}x" if coded else "raw"
    return {"cache": name, "bytes": len(data), "raw_bytes": size, **times, "same": same}


def receive(port: int, ids: list[int], options: argparse.Namespace) -> None:
    """The decode process: rebuild what comes and go on from it, until the sender closes."""
    model, _, codec = start(options)
    tokens = torch.tensor(ids)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while head := connection.recv(LENGTH.size, socket.MSG_WAITALL):
            message, transfer = timed(partial(exactly, connection, LENGTH.unpack(head)[0]))
            coded, data = bool(message[0]), memoryview(message)[1:]
            cache, rebuild = timed(partial(codec.decode, data, tokens) if coded else partial(unpack_raw, data))
            # One token is fed again for its predictions, so it is taken off first.
            cache.crop(-1)
            logits, cache, _ = first_token(model, tokens, cache)
            found = answer(model, logits, cache, options.answer_tokens).tolist()
            connection.sendall(struct.pack(f"<2d{len(found)}q", transfer, rebuild, *found))


def pack_raw(cache) -> bytes:
    """Shape, then keys and values layer by layer, 16 bits a value."""
    first = cache.layers[0].keys
    sides = (side for layer in cache.layers for side in (layer.keys, layer.values))
    data = [side.contiguous().view(torch.int16).numpy().tobytes() for side in sides]
    return b"".join([SHAPE.pack(len(cache.layers), *first.shape), *data])


def unpack_raw(data: memoryview):
    layers, *shape = SHAPE.unpack_from(data)
    values = np.frombuffer(data, dtype=np.int16, offset=SHAPE.size).reshape(layers, 2, *shape)
    cache = kvtc.codec.transformers_cache.new_transformers_cache()
    for index, (keys, rest) in enumerate(values):
        cache.update(*(torch.from_numpy(side.copy()).view(torch.bfloat16) for side in (keys, rest)), index)
    return cache


def exactly(connection: socket.socket, n: int) -> bytes:
    buffer = bytearray(n)
    view = memoryview(buffer)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionError("the other process is gone")
        view = view[got:]
    return bytes(buffer)


if __name__ == "__main__":
    main()
