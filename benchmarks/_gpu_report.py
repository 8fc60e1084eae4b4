"""What the GPU benchmark found: as text with ratios first, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _gpu_timing import Timing
from PIL import Image, ImageDraw

from clip_export.lettering import Lettering
from clip_export.plot import save_picture

Color = tuple[int, int, int]
# Told apart by lightness too, for print and for eyes that see few colours.
COLORS: tuple[Color, ...] = (
    (42, 43, 96),
    (240, 116, 30),
    (54, 130, 163),
    (150, 40, 90),
    (110, 170, 90),
    (200, 160, 40),
    (120, 120, 130),
    (80, 60, 200),
)
INK: Color = (33, 37, 41)
FAINT: Color = (200, 204, 208)
SCALE = 2  # pixels to a point: for sharp screens
PANEL = (520, 330)
MARGIN = 70


@dataclass(frozen=True)
class Row:
    """One contestant on one batch; `min_cosine` is that to the reference in float32, `ceiling` the limit in FLOP/s."""

    title: str
    where: str
    batch: int
    contestant: str
    precision: str
    timing: Timing
    flop: int
    ceiling: float
    min_cosine: float

    @property
    def per_second(self) -> float:
        """Inputs a second."""
        return self.batch / self.timing.median

    @property
    def of_ceiling(self) -> float:
        """What part of the fastest matrix product's rate the towers reach."""
        return self.per_second * self.flop / self.ceiling

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with what follows from the rest."""
        derived = {"per_second": self.per_second, "spread": self.timing.spread, "of_ceiling": self.of_ceiling}
        return dataclasses.asdict(self) | derived


def lines(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """The table, a block for each title and place, ratios first."""
    for title, where in dict.fromkeys((row.title, row.where) for row in rows):
        unit = "img/s" if title == "image" else "text/s"
        yield ""
        yield f"{title}, {where} to {where}; ratio to {baseline}"
        yield f"{'ratio':>7} {unit:>10} {'spread':>7} {'of limit':>8} {'min cosine':>11} {'batch':>6}  contestant"
        for row in rows:
            if (row.title, row.where) == (title, where):
                ratio = "-" if row.timing.ratio is None else f"{row.timing.ratio:.2f}x"
                yield (
                    f"{ratio:>7} {row.per_second:10.1f} {row.timing.spread:7.1%} {row.of_ceiling:8.1%} "
                    f"{row.min_cosine:11.6f} {row.batch:6}  {row.contestant}"
                )


def draw(rows: Sequence[Row], heading: str, path: Path) -> None:
    """Inputs a second over batch sizes, both logarithmic, a panel for each title and place; written to `path`."""
    panels = list(dict.fromkeys((row.title, row.where) for row in rows))
    names = list(dict.fromkeys(row.contestant for row in rows))
    columns = min(2, len(panels))
    height = 50 + math.ceil(len(panels) / columns) * PANEL[1] + 22 * len(names) + 30
    picture = Image.new("RGB", (columns * PANEL[0] * SCALE, height * SCALE), (255, 255, 255))
    pen = Pen(picture)
    pen.text(heading, 20, 14, 16)
    for index, (title, where) in enumerate(panels):
        own = [row for row in rows if (row.title, row.where) == (title, where)]
        corner = index % columns * PANEL[0], 50 + index // columns * PANEL[1]
        _panel(pen, corner, f"{title}, {where} to {where}", own, names)
    for index, name in enumerate(names):
        top = height - 15 - 22 * (len(names) - index)
        pen.line([(MARGIN, top + 8), (MARGIN + 30, top + 8)], _color(index))
        pen.text(name, MARGIN + 40, top, 12)
    save_picture(picture, path)


class Pen:
    """Draws in points."""

    def __init__(self, picture: Image.Image) -> None:
        self._draw, self._lettering = ImageDraw.Draw(picture), Lettering()

    def text(self, text: str, left: int, top: int, size: int) -> None:
        """One line, from its left top."""
        box = tuple(SCALE * value for value in (left, top, left + 900, top + round(size * 1.4)))
        self._lettering.write(self._draw, text, box, size * SCALE, INK)  # type: ignore[arg-type]

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: int = 2) -> None:
        """Through `points`, with dots on them where there are few."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=color, width=width * SCALE, joint="curve")
        for x, y in scaled if width > 1 else []:
            self._draw.ellipse((x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE), fill=color)


def _panel(pen: Pen, corner: tuple[int, int], title: str, rows: Sequence[Row], names: Sequence[str]) -> None:
    left, top = corner[0] + MARGIN, corner[1] + 30
    right, bottom = corner[0] + PANEL[0] - 20, corner[1] + PANEL[1] - 40
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
        pen.line([(left, y_of(rate)), (right, y_of(rate))], FAINT, 1)
        pen.text(f"{rate:,.0f}/s" if rate >= 1 else f"{rate:g}/s", corner[0] + 8, round(y_of(rate)) - 8, 11)
        rate *= 10
    for batch in batches:
        pen.text(str(batch), round(x_of(batch)) - 4, bottom + 6, 11)
    for index, name in enumerate(names):
        points = [(x_of(row.batch), y_of(row.per_second)) for row in rows if row.contestant == name]
        if points:
            pen.line(points, _color(index))


def _color(index: int) -> Color:
    return COLORS[index % len(COLORS)]
