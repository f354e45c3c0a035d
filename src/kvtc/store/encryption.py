"""Encryption at rest around any store: AES-256-GCM, the entry's name bound to its value.

An encrypted value, inside the frame of the store below:

    offset  size  field
         0     4  magic "kvte"
         4     1  version, 1
         5     3  zero
         8     8  id of the key: BLAKE2b of it, personalized "kvtc key id"
        16    12  nonce, random
        28        ciphertext and, in the last 16 bytes, its tag

Authenticated with it: the 16 bytes before the nonce, and the entry's name (namespace, `=`, key).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InvalidArgument, MissingDependency, StoreFull
from ..process.log_limits import log_once
from .base import Names, Store, StoreStatistics, Value, check_value
from .frame import ENCRYPTED_MAGIC, DamagedEntry, ForeignEntry

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError as error:
    raise MissingDependency('encrypted stores need the package cryptography; pip install "kvtc[encryption]"') from error

VERSION = 1
KEY_BYTES, ID_BYTES, NONCE_BYTES, TAG_BYTES = 32, 8, 12, 16
_HEADER = struct.Struct(f"<4sB3x{ID_BYTES}s")
MAX_VALUE_BYTES = (1 << 31) - 1 - TAG_BYTES
logger = logging.getLogger(__name__)


class EncryptedStore(Store):
    """A store that keeps names and lengths in clear, and nothing else.

    An entry under a key that is not given is a miss, counted as foreign, and stays. An entry that
    fails authentication under its own key is damaged and is removed.

    Parameters:
        inner: Holds the encrypted values; it is closed with this store.
        keys: Of 32 bytes. The first encrypts; the others only read, so that keys can be changed one
            after the other.

    Raises:
        InvalidArgument: A key has another length, or is one byte repeated.
    """

    def __init__(self, inner: Store, keys: Sequence[bytes]) -> None:
        super().__init__()
        if not keys or any(not isinstance(key, bytes) or len(key) != KEY_BYTES for key in keys):
            found = ", ".join(f"{type(key).__name__} of {len(key)}" for key in keys) or "none"
            raise InvalidArgument(f"keys: {found}; expected one or more, each bytes of {KEY_BYTES}")
        if any(len(set(key)) == 1 for key in keys):
            raise InvalidArgument(
                "a key is one byte repeated, as of a file that was never filled; expected a random one"
            )
        self._inner = inner
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}
        self._current = _key_id(keys[0])
        self.namespace, self.is_of_process = inner.namespace, inner.is_of_process
        self._names = Names(inner.namespace)

    def __repr__(self) -> str:
        return f"EncryptedStore({self._inner!r})"

    @property
    def inner(self) -> Store:
        """The store that holds the encrypted values."""
        return self._inner

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self._check_open()
        sealed = self._inner.get_many(keys)
        return self._counted(
            [None if one is None else self._open(key, one) for key, one in zip(keys, sealed, strict=True)]
        )

    def put_many(self, entries: Iterable[tuple[str, Value]]) -> None:
        self._check_open()
        checked = [(self._names.name(key), key, check_value(value)) for key, value in entries]
        for _, key, value in checked:
            if memoryview(value).nbytes > MAX_VALUE_BYTES:
                raise StoreFull(
                    f"value of {key!r}: {memoryview(value).nbytes} bytes; at most {MAX_VALUE_BYTES} can be encrypted"
                )
        self._inner.put_many([(key, self._seal(name, value)) for name, key, value in checked])
        self._counters.add(puts=len(checked), bytes_written=sum(memoryview(value).nbytes for *_, value in checked))

    def contains_prefix(self, keys: Sequence[str]) -> int:
        self._check_open()
        return self._inner.contains_prefix(keys)

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        self._check_open()
        return self._inner.contains_many(keys)

    def delete(self, key: str) -> None:
        self._check_open()
        self._inner.delete(key)

    def keys(self) -> Iterator[str]:
        self._check_open()
        return self._inner.keys()

    def flush(self) -> None:
        self._check_open()
        self._inner.flush()

    def statistics(self) -> StoreStatistics:
        own, below = self._counters.snapshot(), self._inner.statistics()
        unreadable = {"damaged": own.damaged + below.damaged, "foreign": own.foreign + below.foreign}
        kept = {name: getattr(below, name) for name in ("evictions", "errors", "stored_entries", "stored_bytes")}
        return replace(own, **unreadable, **kept)

    def close(self) -> None:
        super().close()
        self._inner.close()

    def _seal(self, name: str, value: Value) -> bytes:
        header, nonce = _HEADER.pack(ENCRYPTED_MAGIC, VERSION, self._current), os.urandom(NONCE_BYTES)
        content = memoryview(value).cast("B")
        return b"".join((header, nonce, self._ciphers[self._current].encrypt(nonce, content, header + name.encode())))

    def decrypted(self, name: str, sealed: bytes) -> bytes:
        """The value of an entry by its name, of any namespace. Raises `ForeignEntry`, `DamagedEntry`."""
        view = memoryview(sealed)
        header, nonce, content = (
            view[: _HEADER.size],
            view[_HEADER.size :][:NONCE_BYTES],
            view[_HEADER.size + NONCE_BYTES :],
        )
        if len(content) < TAG_BYTES or bytes(header[:8]) != _HEADER.pack(ENCRYPTED_MAGIC, VERSION, b"")[:8]:
            raise ForeignEntry("it is not encrypted, or in a newer format")
        cipher = self._ciphers.get(bytes(header[8:]))
        if cipher is None:
            raise ForeignEntry("it is encrypted with another key")
        try:
            value: bytes = cipher.decrypt(bytes(nonce), content, bytes(header) + name.encode())
        except InvalidTag:
            raise DamagedEntry("its authentication tag does not fit") from None
        return value

    def _open(self, key: str, sealed: bytes) -> bytes | None:
        try:
            return self.decrypted(self._names.name(key), sealed)
        except ForeignEntry as error:
            self._found_foreign(key, error)
        except DamagedEntry as error:
            self._found_damaged(key, error, lambda: self._discard(key, sealed))
        return None

    def _discard(self, key: str, sealed: bytes) -> None:
        if self._inner.get(key) == sealed:
            self._inner.delete(key)


def load_keys(text: str, where: str) -> list[bytes]:
    """Keys from text: one a line, 64 hexadecimal digits or base64; the first is the one to encrypt
    with."""
    keys = [_parse_key(line.strip(), where) for line in text.splitlines() if line.strip()]
    if not keys:
        raise InvalidArgument(f"{where} holds no key; expected {KEY_BYTES} bytes in hexadecimal or base64")
    return keys


def keys_from_file(path: str) -> list[bytes]:
    """`load_keys` of a file; one that others than its owner may read is used, with a warning in the
    log."""
    try:
        with Path(path).open(encoding="ascii") as file:
            permissions = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read()
        kind = None
    except (OSError, UnicodeDecodeError) as error:
        kind = type(error).__name__
    if kind is not None:  # an error of decoding holds what it could not decode
        raise InvalidArgument(f"key file {path} cannot be read: {kind}")
    if permissions & (stat.S_IRWXG | stat.S_IRWXO):
        message = "key file %s has permissions %04o: others may use it; expected 0600 or 0400"
        log_once(logger, f"permissions of {path}", message, path, permissions)
    return load_keys(text, f"key file {path}")


def keys_from_variable(name: str) -> list[bytes]:
    """`load_keys` of an environment variable."""
    if name not in os.environ:
        raise InvalidArgument(f"environment variable {name} is not set; expected a key in hexadecimal or base64")
    return load_keys(os.environ[name], f"environment variable {name}")


def _parse_key(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:  # the text itself is a secret and stays out of the message
        raise InvalidArgument(
            f"{where} holds a line that is no key; expected {KEY_BYTES} bytes in hexadecimal or base64"
        )
    return key


def _key_id(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=ID_BYTES, person=b"kvtc key id").digest()
