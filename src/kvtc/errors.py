"""Every error kvtc raises on purpose, named by what went wrong.

A message says what was expected, what was found, and where. Callers catch the class they can act on; `KvtcError`
catches all.

    >>> try:
    ...     codec.decode(stream[:-1], token_ids)
    ... except kvtc.errors.TruncatedStream:
    ...     print("the stream was cut off")
    the stream was cut off
"""

from __future__ import annotations

from .display import shown_lines, without_credentials

PROGRAM_ENDS = (KeyboardInterrupt, SystemExit)
"""What passes every boundary, before `except BaseException`: code of others raises, and libraries in other languages panic with,
what is no `Exception`."""


class KvtcError(Exception):
    """Root of all errors of this package. What a message quotes is shown as text, and passwords of addresses are left out."""

    def __str__(self) -> str:
        return without_credentials(shown_lines(super().__str__()))


class InvalidArgument(KvtcError, ValueError):
    """An argument has a value that can never work; the caller is at fault."""


class InvalidCache(KvtcError, ValueError):
    """The cache itself cannot be coded: wrong shape or dtype, or values that are NaN or infinite."""


class GeometryMismatch(KvtcError, ValueError):
    """The cache or stream covers other layers, heads or head size than the calibration."""


class CalibrationMismatch(KvtcError):
    """The stream was made with another calibration, or the calibration for another model than is served."""


class TokenMismatch(KvtcError):
    """The token ids given on decode are not those the stream was made from."""


class TruncatedStream(KvtcError):
    """The stream ends before its own tables say it should."""


class CorruptStream(KvtcError):
    """The stream contradicts itself or fails a checksum."""


class StreamTooLarge(KvtcError):
    """A sound stream asks for more than the caller has agreed to; the message names what allows more."""


class CorruptCalibration(KvtcError):
    """The calibration file is damaged or is not a calibration file."""


class UnsupportedVersion(KvtcError):
    """The stream or calibration has a format version, or a kind of layer group, that this library does not read."""


class UnsupportedModel(KvtcError):
    """The model keeps a cache that kvtc cannot transform; the message names the layer."""


class UnsupportedLayout(KvtcError):
    """A serving engine lays out its cache in a way kvtc does not read; the message says what the engine said."""


class MissingDependency(KvtcError, ImportError):
    """An optional package is needed for this call; the message says which extra installs it."""


class BackendUnavailable(KvtcError):
    """The backend that was asked for cannot run on that device here; the message says why."""


class StoreError(KvtcError):
    """A store could not do what was asked; the two classes below say why. No store returns wrong bytes instead."""


class StoreUnavailable(StoreError):
    """The store cannot be reached or used: no server, no answer in time, no permission, closed."""


class StoreFull(StoreError):
    """There is no room for the value: it exceeds the byte budget, or the disk or server is full."""


class InvalidPlan(KvtcError, ValueError):
    """A plan, or a file that it names, cannot be worked out; the message names the file and the field."""


class MissingMeasurement(KvtcError, LookupError):
    """The plan needs a number that its measurement file does not hold; the message names it and its unit."""
