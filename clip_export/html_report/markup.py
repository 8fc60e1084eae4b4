"""HTML from Python: elements that escape whatever they are given, unless it is markup already.

Escaping is where strings become markup and nowhere else, so no caller can forget it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

__all__ = ["Content", "Html", "data_text", "element", "readable"]

# Characters that are shown; the rest is counted.
MAX_TEXT = 300  # of a caption
MAX_PROSE = 2000  # of anything

_VOID = {"img", "meta"}
# Characters that HTML may not hold (controls, lone surrogates, noncharacters), and those that reorder what follows.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 17))
    + "]"
)


class Html(str):
    """Markup: put into a page as it is. Made by `element`, and of constants."""

    __slots__ = ()


Content: TypeAlias = "str | Iterable[Content] | None"  # a plain str is text, an Html markup, None nothing


def element(tag: str, *children: Content, **attributes: str | float | bool | None) -> Html:
    """`<tag attributes>children</tag>`. `class_` is class, `aria_label` aria-label; None and False are left out."""
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(content: Content) -> Html:
    """Any content as markup. A plain string is escaped, and cut where it is longer than anybody reads."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(readable(cut(content, MAX_PROSE))))
    return Html("".join(map(join, content)))


def data_text(text: str, *, limit: int = MAX_TEXT) -> Html:
    """A text of the user's, set apart from the direction of ours; a long one is cut, an empty one is named."""
    if not text.strip():
        return element("span", "empty text" if not text else "blank text", class_="faint")
    return element("bdi", cut(_one_line(text), limit))


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its first `limit` characters and how many there are."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def readable(text: str) -> str:
    """`text` with the characters that a page may not hold, or that would turn its order, named as U+202E."""
    return _UNSAFE.sub(lambda found: f"[U+{ord(found.group()):04X}]", text)


def _one_line(text: str) -> str:
    return text.replace("\n", "[U+000A]").replace("\t", "[U+0009]")


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(readable(str(value)))}"'
