"""URLs of stores: a scheme, a place, and options that are taken one by one until none is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from ..errors import InvalidArgument
from .frame import DEFAULT_ENTRY_BYTES

T = TypeVar("T")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


class StoreUrl:
    """One URL and the options given beside it, which win over those in its query."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        try:
            parts = urlsplit(url)
            self.port = parts.port
            is_sound = True
        except ValueError:  # its text may hold a password with a sign that does not belong there
            is_sound = False
        if not is_sound:
            raise InvalidArgument(
                "store URL is malformed; expected scheme://host:port/path, other signs written as %XX"
            )
        if parts.fragment:
            raise InvalidArgument("store URL holds a #; expected %23 where one is meant")
        self.scheme = parts.scheme
        self.host = parts.hostname or ""
        self.path = unquote(parts.path)
        self.base = url.partition("?")[0]
        self.has_user = "@" in parts.netloc
        self._options: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True)) | (options or {})
        self._known: list[str] = []

    def __str__(self) -> str:
        """Without user, password and options, for messages."""
        host = f"//{self.host}" if self.host else ""
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}:{host}{port}{self.path.rpartition('@')[2]}"

    def take(self, name: str, convert: Callable[[Any], T], default: Any = None) -> Any:
        """The option's value, converted and removed, or the default; `InvalidArgument` where it
        cannot be converted."""
        self._known.append(name)
        value = self._options.pop(name, None)
        if value is None:
            return default
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(f"{self}: option {name}={value!r:.80}: {error}") from error

    def take_common(self) -> tuple[str | None, int]:
        """`namespace` and `entry_bytes`, options of all stores; nothing may be left after them."""
        namespace, entry_bytes = self.take("namespace", str), self.take("entry_bytes", parse_bytes, DEFAULT_ENTRY_BYTES)
        self.expect_no_rest()
        return namespace, entry_bytes

    def with_query(self, options: dict[str, str]) -> str:
        """The URL with these options alone, for a library that parses it in its own way."""
        return f"{self.base}?{urlencode(options)}"

    def expect_no_path(self) -> None:
        if self.host or self.path:
            raise InvalidArgument(f"{self}: nothing is expected between the scheme and its options")

    def expect_no_rest(self) -> None:
        """`InvalidArgument` where an option was not taken."""
        if self._options:
            unknown, known = ", ".join(sorted(self._options)), ", ".join(sorted(self._known))
            raise InvalidArgument(f"{self}: unknown option {unknown}; expected {known}")


def parse_bytes(text: str | int) -> int:
    """`4096`, `1GB` (decimal) or `512MiB` (binary) in bytes, at least 1."""
    match = _BYTES.fullmatch(str(text).strip())
    if match is None:
        raise ValueError("expected a number of bytes such as 500MB or 2GiB")
    number, unit, binary = match.groups()
    exponent = " KMGT".index(unit.upper()) if unit else 0
    n_bytes = int(float(number) * (1024 if binary else 1000) ** exponent)
    if n_bytes < 1:
        raise ValueError("expected a positive number of bytes")
    return n_bytes


def parse_seconds(text: str | float) -> float:
    """A positive number of seconds."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError("expected a positive number of seconds")
    return seconds


def parse_mode(text: str | int) -> int:
    """`0640`, permissions in octal digits."""
    mode = text if isinstance(text, int) else int(text, 8)
    if mode & ~0o666 or mode & 0o600 != 0o600:
        raise ValueError("expected permissions such as 0600 or 0640, for the owner to read and write")
    return mode


def parse_choice(*choices: str) -> Callable[[Any], str]:
    """A converter that takes one of some words."""

    def convert(text: Any) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(text)

    return convert
