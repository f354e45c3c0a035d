"""Stores and codecs that fail in ways nobody announced."""

from __future__ import annotations

from asyncio import CancelledError
from typing import Any

import pytest
import torch

from kvtc.codec import codec as codec_module
from kvtc.errors import StoreUnavailable

OPERATIONS = ("get_many", "resident_many", "put", "put_many", "contains", "contains_prefix", "contains_many", "delete")


class PrivateError(Exception):
    """Of a store that somebody else has written."""


class Panic(BaseException):
    """Of a library in another language: no `Exception`."""


ERRORS = [StoreUnavailable, MemoryError, RuntimeError, OSError, PrivateError, Panic, CancelledError, GeneratorExit]
DECODE_ERRORS = [torch.OutOfMemoryError, MemoryError, RuntimeError, PrivateError, Panic]


def raising(error: type[BaseException]) -> Any:
    def fail(*_: object, **__: object) -> Any:
        raise error("the cause")

    return fail


def break_store(monkeypatch: pytest.MonkeyPatch, store: Any, error: type[BaseException], *operations: str) -> None:
    """The store raises an error in these operations, or in all."""
    for name in operations or OPERATIONS:
        monkeypatch.setattr(store, name, raising(error))


def break_decoding(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Every codec raises an error instead of decoding."""
    monkeypatch.setattr(codec_module, "open_stream", raising(error))
