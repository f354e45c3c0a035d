"""Secrets of a store, and the one way by which errors of other libraries become messages without
them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar
from urllib.parse import quote, quote_plus, unquote

from ..errors import PROGRAM_ENDS

T = TypeVar("T")
SECRET_OPTIONS = frozenset({"username", "password", "access_key_id", "secret_access_key", "session_token"})
MESSAGE_LENGTH = 400
HIDDEN = "***"
SHORTEST_TO_CUT = 4  # a shorter one may stand in any text by chance


def user_info(url: str) -> list[str]:
    """User and password of a URL, as written there. Whatever stands before the last `@` counts,
    however malformed."""
    before, found, _ = url.partition("?")[0].rpartition("@")
    written = before.rpartition("//")[2] if "//" in before else before.partition(":")[2] or before
    return [written, *written.split(":", 1)] if found else []


class Redactor:
    """Knows the secrets of a store, and cuts them from texts."""

    def __init__(self, secrets: Iterable[object]) -> None:
        texts = {str(secret) for secret in secrets if secret not in (None, "")}
        forms = {form for text in texts for form in (text, unquote(text), quote(text, safe=""), quote_plus(text))}
        lines = {" ".join(form.split()) for form in forms} - {""}  # as they stand in a message
        self._forms = sorted(lines, key=len, reverse=True)  # the longest first: one may be part of another

    def cut(self, text: str) -> str:
        """The text with `***` in place of each secret, on one line and not long."""
        text = " ".join(text.split())
        for form in self._forms:
            if len(form) < SHORTEST_TO_CUT and form in text:
                return HIDDEN
            text = text.replace(form, HIDDEN)
        return text[:MESSAGE_LENGTH]

    def message(self, error: BaseException) -> str:
        """What kind of error it was, and its text without secrets."""
        return f"{type(error).__name__}: {self.cut(str(error))}"


def translated(call: Callable[[], T], meaning: Callable[[BaseException], BaseException]) -> T:
    """What the call returns. An error is replaced by its meaning and not chained to it: its own
    text may hold secrets."""
    try:
        return call()
    except PROGRAM_ENDS:
        raise
    except BaseException as error:  # noqa: BLE001  panics of libraries in other languages are no Exception
        failure = meaning(error)
    raise failure
