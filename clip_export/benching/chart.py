"""A benchmark as a picture: inputs a second over batch sizes, both logarithmic, a panel for each tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from clip_export.benching.results import Result, Row
from clip_export.errors import InputError
from clip_export.lettering import Lettering
from clip_export.plot import save_picture

Color = tuple[int, int, int]
Point = tuple[float, float]

# Told apart by lightness too, for print and for eyes that see few colours.
_COLORS: tuple[Color, ...] = (
    (42, 43, 96),
    (240, 116, 30),
    (54, 130, 163),
    (150, 40, 90),
    (110, 170, 90),
    (200, 160, 40),
    (120, 120, 130),
    (80, 60, 200),
)
_INK: Color = (33, 37, 41)
_FAINT: Color = (200, 204, 208)
_SCALE = 2  # pixels to a point: for sharp screens
_PANEL = (520, 330)  # points, as all that follows
_MARGIN = 70
_HEAD = 50
_LEGEND = 22


def draw(result: Result, path: Path) -> None:
    """Write the chart to `path`. Raises InputError where nothing was measured, OutputError where it cannot be."""
    save_picture(picture(result), path)


def picture(result: Result) -> Image.Image:
    """The chart, RGB. Raises InputError where nothing was measured."""
    if not result.rows:
        raise InputError("nothing was measured, so there is nothing to draw")
    panels = list(dict.fromkeys((row.title, row.where) for row in result.rows))
    names = list(dict.fromkeys(row.contestant for row in result.rows))
    columns = min(2, len(panels))
    height = _HEAD + math.ceil(len(panels) / columns) * _PANEL[1] + _LEGEND * len(names) + 30
    page = Image.new("RGB", (columns * _PANEL[0] * _SCALE, height * _SCALE), (255, 255, 255))
    pen = _Pen(page)
    pen.text(f"{result.bundle} on {result.machine['cpu']}", 20, 14, 16)
    for index, (title, where) in enumerate(panels):
        own = [row for row in result.rows if (row.title, row.where) == (title, where)]
        corner = index % columns * _PANEL[0], _HEAD + index // columns * _PANEL[1]
        _panel(pen, corner, f"{title}, {where} to {where}: inputs a second by batch", own, names)
    for index, name in enumerate(names):
        top = height - 15 - _LEGEND * (len(names) - index)
        pen.line([(_MARGIN, top + 8), (_MARGIN + 30, top + 8)], _color(index))
        pen.text(name, _MARGIN + 40, top, 12)
    return page


class _Pen:
    """Draws in points."""

    def __init__(self, page: Image.Image) -> None:
        self._draw, self._lettering = ImageDraw.Draw(page), Lettering()

    def text(self, text: str, left: int, top: int, size: int) -> None:
        """One line, from its left top."""
        edge, bottom = (left + 900) * _SCALE, (top + round(size * 1.4)) * _SCALE
        self._lettering.write(self._draw, text, (left * _SCALE, top * _SCALE, edge, bottom), size * _SCALE, _INK)

    def line(self, points: Sequence[Point], color: Color, width: int = 2) -> None:
        """Through `points`, with dots on them unless it is a thin one."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=color, width=width * _SCALE, joint="curve")
        for x, y in scaled if width > 1 else []:
            self._draw.ellipse((x - 3 * _SCALE, y - 3 * _SCALE, x + 3 * _SCALE, y + 3 * _SCALE), fill=color)


def _panel(pen: _Pen, corner: tuple[int, int], title: str, rows: Sequence[Row], names: Sequence[str]) -> None:
    left, top = corner[0] + _MARGIN, corner[1] + 30
    right, bottom = corner[0] + _PANEL[0] - 20, corner[1] + _PANEL[1] - 40
    pen.text(title, left, corner[1], 14)
    batches = sorted({row.batch for row in rows})
    low = 10 ** math.floor(math.log10(min(row.per_second for row in rows)))
    high = 10 ** math.ceil(math.log10(max(row.per_second for row in rows) * 1.0001))

    def x_of(batch: int) -> float:
        span = math.log(batches[-1] / batches[0]) or 1
        return left + (right - left) * math.log(batch / batches[0]) / span

    def y_of(rate: float) -> float:
        return bottom - (bottom - top) * math.log(rate / low) / math.log(high / low)

    rate = low
    while rate <= high:
        pen.line([(left, y_of(rate)), (right, y_of(rate))], _FAINT, 1)
        pen.text(f"{rate:,.0f}" if rate >= 1 else f"{rate:g}", corner[0] + 8, round(y_of(rate)) - 8, 11)
        rate *= 10
    for batch in batches:
        pen.text(str(batch), round(x_of(batch)) - 4, bottom + 6, 11)
    for index, name in enumerate(names):
        points = [(x_of(row.batch), y_of(row.per_second)) for row in rows if row.contestant == name]
        if points:
            pen.line(points, _color(index))


def _color(index: int) -> Color:
    return _COLORS[index % len(_COLORS)]
