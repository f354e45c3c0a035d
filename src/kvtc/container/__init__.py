"""The container: what a stream consists of (`tables`), writing and parsing it (`stream`), cutting and joining it (`parts`)."""

from .parts import join_streams, split_stream
from .stream import CodedSection, Payload, Stream, Wanted, code_payloads, parse_stream, token_digest, write_stream
from .tables import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    MAX_CHUNK_TOKENS,
    MAX_POSITION,
    PROFILES,
    SECTION_BYTES,
    STREAM_WIDE,
    Chunk,
    Header,
    Section,
    SectionType,
    table_bytes,
)

__all__ = [
    "CHUNK_BYTES",
    "DIGEST_BYTES",
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_CHUNK_TOKENS",
    "MAX_POSITION",
    "PROFILES",
    "SECTION_BYTES",
    "STREAM_WIDE",
    "Chunk",
    "CodedSection",
    "Header",
    "Payload",
    "Section",
    "SectionType",
    "Stream",
    "Wanted",
    "code_payloads",
    "join_streams",
    "parse_stream",
    "split_stream",
    "table_bytes",
    "token_digest",
    "write_stream",
]
