"""Text on a picture: fonts that have the characters asked for, wrapping, and an ellipsis where room ends.

Pillow's own font has the letters of English and little more. Texts in another script are set in a font of the system
that has them, where there is one; a character that no font has is drawn as a box.
"""

from __future__ import annotations

import functools
import unicodedata

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Color = tuple[int, int, int]

# By file name: Pillow looks for them where the system keeps its fonts. Broad ones first, then those of CJK.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "malgun.ttf",
)
_ELLIPSIS = "…"
_LEADING = 1.25
_NEVER_ASSIGNED = "\U0010ffff"


class Lettering:
    """Sets text with the fonts of this machine. Sizes and widths are in pixels."""

    def width(self, text: str, size: int) -> int:
        """How wide `text` is on one line."""
        clean = _clean(text)
        return round(_font_for(clean, size).getlength(clean))

    def write(
        self, draw: ImageDraw.ImageDraw, text: str, box: Box, size: int, color: Color, *, right: bool = False
    ) -> None:
        """`text` in `box`, centred in its height, on as many lines as fit; one line always.

        `right` sets the lines to the right edge.
        """
        left, top, edge, bottom = box
        clean = _clean(text)
        font = _font_for(clean, size)
        line_height = round(size * _LEADING)
        lines = _wrapped(clean, font, edge - left, max(1, (bottom - top) // line_height))
        y = (top + bottom) / 2 - line_height * (len(lines) - 1) / 2 if bottom > top else top + line_height / 2
        for line in lines:
            draw.text((edge if right else left, y), line, fill=color, font=font, anchor="rm" if right else "lm")
            y += line_height

    def number(self, draw: ImageDraw.ImageDraw, text: str, box: Box, size: int, color: Color) -> None:
        """A short `text` in the middle of `box`, smaller where it would not fit."""
        left, top, right, bottom = box
        while size > 6 and self.width(text, size) > (right - left) * 0.86:
            size -= 1
        place = ((left + right) / 2, (top + bottom) / 2)
        draw.text(place, text, fill=color, font=_font_for(text, size), anchor="mm")


def lacks_glyphs(text: str) -> bool:
    """Whether no font of this machine has all characters of `text`, so that boxes would be drawn in their place."""
    return _best_font(_clean(text), 24)[1] > 0


def _clean(text: str) -> str:
    """One line without what no font draws: control characters, format characters, lone surrogates."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def _wrapped(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """`text` on at most `max_lines` lines, broken at spaces, inside words only where a word is wider than a line."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < max_lines:
        if len(lines) == max_lines - 1 and font.getlength(rest) > width:
            lines.append(_cut(rest, font, width))
            break
        head = _fitting(rest, font, width)
        lines.append(head.rstrip())
        rest = rest[len(head) :].lstrip()
    return lines or [""]


def _fitting(text: str, font: Font, width: int) -> str:
    """The longest start of `text` within `width` that ends at a space, or that fits at all; at least a character."""
    if font.getlength(text) <= width:
        return text
    count = _fitting_count(text, font, width)
    space = text.rfind(" ", 0, count + 1)
    return text[:space] if space > 0 else text[: max(count, 1)]


def _cut(text: str, font: Font, width: int) -> str:
    count = _fitting_count(text, font, width - round(font.getlength(_ELLIPSIS)))
    return text[:count].rstrip() + _ELLIPSIS


def _fitting_count(text: str, font: Font, width: int) -> int:
    """How many characters of `text` fit, by bisection: a label may be a page long."""
    low, high = 0, min(len(text), 4096)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _font_for(text: str, size: int) -> Font:
    """The first font that has every character of `text`, or the one that lacks the fewest."""
    font = _font(_best_font(text, size)[0], size)
    assert font is not None  # Pillow's own is always there
    return font


def _best_font(text: str, size: int) -> tuple[str, int]:
    """The name of that font, and how many characters of `text` it lacks."""
    wanted = set(text[:4096])
    names = ("", *_SYSTEM_FONTS)
    lacking = {}
    for name in names:
        if _font(name, size) is not None:
            lacking[name] = sum(1 for character in wanted if not _has(name, character))
            if lacking[name] == 0:
                break
    best = min(lacking, key=lacking.__getitem__)
    return best, lacking[best]


@functools.cache
def _font(name: str, size: int) -> Font | None:
    if name == "":
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None  # not on this machine


@functools.cache
def _has(name: str, character: str) -> bool:
    """Whether the font has a glyph: what it lacks, it draws as the box that stands for every unassigned character."""
    if character.isspace():
        return True
    font = _font(name, 24)
    return font is not None and bytes(font.getmask(character)) != bytes(font.getmask(_NEVER_ASSIGNED))
