"""HTML and SVG put together from elements: text is escaped where it is put in, and there is no
other way to put it in.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from ..display import shown_lines

_VOID = frozenset({"meta"})


@dataclass(frozen=True)
class Markup:
    """Markup as it is written to a page. Only `element`, `join` and constants of the source make
    it.
    """

    source: str


Content = Markup | str


def element(name: str, /, *content: Content, **attributes: object) -> Markup:
    """An element.

    Parameters:
        name: the name of its tag.
        content: text, which is escaped, or markup.
        attributes: attributes; None leaves one out. `class_` and `stroke_width` stand for class and
            stroke-width.
    """
    written = "".join(
        f' {attribute.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for attribute, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>" + ("" if name in _VOID else f"{join(*content).source}</{name}>"))


def join(*content: Content) -> Markup:
    """One after the other."""
    return Markup("".join(part.source if isinstance(part, Markup) else _escape(part) for part in content))


def _escape(text: object) -> str:
    return escape(shown_lines(text), quote=True)
