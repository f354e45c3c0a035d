"""Streams cut into self-contained streams of one chunk, and joined again; nothing is recoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import CorruptStream, InvalidArgument
from .stream import Stream, assemble, parse_stream
from .tables import STREAM_WIDE, Chunk, Section, SectionType, check_order


def split_stream(data: bytes | memoryview) -> list[bytes]:
    """One self-contained stream per chunk, nothing recoded: section bytes are copied as they are."""
    stream = parse_stream(data)
    parts = []
    for index, chunk in enumerate(stream.chunks):
        chosen = [stream.find(SectionType.RATE), *(stream.find(section, index) for section in chunk.sections())]
        stored = [bytes(stream.stored(s)) for s in chosen]
        entries = [s if s.chunk == STREAM_WIDE else replace(s, chunk=0) for s in chosen]
        parts.append(assemble(stream.header, [chunk], entries, stored))
    return parts


def join_streams(parts: Sequence[bytes | memoryview]) -> bytes:
    """Streams of consecutive chunks of one encoding -> one stream; `join_streams(split_stream(s)) == s`.

    Raises `InvalidArgument` where the parts do not belong together.
    """
    if not parts:
        raise InvalidArgument("there are no streams to join")
    streams = [parse_stream(part) for part in parts]
    first = streams[0]
    chunks: list[Chunk] = []
    entries: list[Section] = []
    stored: list[bytes] = []
    for index, stream in enumerate(streams):
        if stream.header != first.header or _rate_bytes(stream) != _rate_bytes(first):
            raise InvalidArgument(
                f"stream {index} was not made by the encoding of stream 0: their headers or rates differ"
            )
        for section in stream.sections:
            if section.chunk != STREAM_WIDE or index == 0:
                chunk = section.chunk if section.chunk == STREAM_WIDE else section.chunk + len(chunks)
                entries.append(replace(section, chunk=chunk))
                stored.append(bytes(stream.stored(section)))
        chunks += stream.chunks
    try:
        check_order(chunks, first.header)
    except CorruptStream as error:
        raise InvalidArgument(f"the streams do not follow one another: {error}") from error
    return assemble(first.header, chunks, entries, stored)


def _rate_bytes(stream: Stream) -> bytes:
    return b"".join(stream.stored(s) for s in stream.sections if s.chunk == STREAM_WIDE)
