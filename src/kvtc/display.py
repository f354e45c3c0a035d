"""Text that somebody else wrote, shown: nothing in it steers a terminal, ends a line of a log or hides what stands there.

Names, metadata and messages come from files, stores and libraries. Whatever kvtc prints, logs or raises passes through here.
"""

from __future__ import annotations

import re

# A password may hold anything but what ends the part of an address that names the server.
_CREDENTIALS = re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://)[^/?#\s]*@", re.IGNORECASE)


def shown(text: object) -> str:
    r"""A text as one line of printable characters; controls, line ends and marks of direction as Python writes them: \x1b."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def shown_lines(text: object) -> str:
    """The same of a text whose line ends and tabs are its own."""
    return "\n".join("\t".join(map(shown, line.split("\t"))) for line in str(text).split("\n"))


def without_credentials(text: str) -> str:
    """A text without the user names and passwords of the addresses in it."""
    return _CREDENTIALS.sub(r"\1", text)
