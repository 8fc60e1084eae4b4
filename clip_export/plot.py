"""A similarity matrix as a picture, drawn with Pillow alone: images across the top, texts down the side.

The best text of each image is outlined. Long texts wrap, then end in an ellipsis; above about twenty images or texts
the cells become too small for numbers, and a scale stands in for them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from clip_export.errors import InputError, OutputError
from clip_export.images import ImageInput, open_image
from clip_export.lettering import Lettering, lacks_glyphs
from clip_export.output_file import staged_file, writing

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

MAX_SIDE = 128  # cells: beyond it nobody can tell one from the next

# From light to dark in equal steps of lightness (CIE L* 96, 81, 66, 51, 36, 21), from paper through teal to ink, so
# that a difference looks as large wherever on the scale it is, and in grey too. tests/test_plot.py holds it to that.
_ANCHORS: tuple[Color, ...] = (
    (244, 243, 236),
    (175, 211, 204),
    (108, 172, 182),
    (54, 130, 163),
    (41, 86, 139),
    (42, 43, 96),
)
_PAPER: Color = (255, 255, 255)
_INK: Color = (33, 37, 41)
_FAINT: Color = (108, 117, 125)
_ACCENT: Color = (240, 116, 30)
# Every length below is in points. The picture has two pixels to each, for sharp screens and for print; it is drawn with
# twice as many and then reduced, since Pillow draws shapes without smoothing their edges.
_REDUCE = 2
_SCALE = 2 * _REDUCE


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are, in pixels. `cell` is both sides of a cell, `gap` what lies between two."""

    columns: int
    rows: int
    cell: int
    gap: int
    margin: int
    title_height: int
    label_width: int
    thumbnail: int
    legend_height: int

    @property
    def left(self) -> int:
        return self.margin + self.label_width + 12 * _SCALE

    @property
    def top(self) -> int:
        return self.margin + self.title_height + self.thumbnail + 8 * _SCALE

    @property
    def size(self) -> tuple[int, int]:
        width = self.left + self.columns * (self.cell + self.gap) - self.gap + self.margin
        height = self.top + self.rows * (self.row_height + self.gap) - self.gap + self.legend_height + self.margin
        return width, height

    @property
    def row_height(self) -> int:
        """Rows of text are lower than images are wide, where there is room."""
        return min(self.cell, 52 * _SCALE)

    def box(self, row: int, column: int) -> Box:
        left = self.left + column * (self.cell + self.gap)
        top = self.top + row * (self.row_height + self.gap)
        return left, top, left + self.cell, top + self.row_height


def similarity_picture(
    matrix: npt.ArrayLike, images: Sequence[ImageInput], texts: Sequence[str], *, title: str = ""
) -> Image.Image:
    """Draw `matrix`, float [n_images, n_texts], with a thumbnail for each image and a label for each text.

    Colours span the values of the matrix, lowest to highest. Returns an RGB picture. Raises InputError where the sizes
    do not agree, a value is not a finite number, or there are more than MAX_SIDE images or texts; ImageError for an
    image that cannot be read.
    """
    values = _checked(matrix, len(images), len(texts))
    _warn_of_boxes(texts)
    lettering = Lettering()
    layout = _layout(len(images), len(texts), texts, lettering, titled=bool(title))
    picture = Image.new("RGB", layout.size, _PAPER)
    draw = ImageDraw.Draw(picture)
    if title:
        width = layout.size[0] - 2 * layout.margin
        lettering.write(
            draw, title, (layout.margin, layout.margin, layout.margin + width, layout.margin), 18 * _SCALE, _INK
        )
    for column, image in enumerate(images):
        left, _, right, _ = layout.box(0, column)
        top = layout.top - layout.thumbnail - 8 * _SCALE
        picture.paste(_thumbnail(image, right - left), (left, top))
    _draw_labels(draw, layout, texts, lettering)
    _draw_cells(draw, layout, values, lettering)
    if layout.legend_height:
        _draw_legend(draw, layout, values, lettering)
    return picture.reduce(_REDUCE)


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write `picture` to `path` in the format of its suffix, whole or not at all. Raises OutputError."""
    suffix = Path(path).suffix.lower()
    format_ = Image.registered_extensions().get(suffix)
    if format_ not in ("PNG", "JPEG", "WEBP", "PDF"):
        raise OutputError(
            f"{os.fsdecode(path)}: expected a suffix for a picture, found {suffix!r}",
            hint="name it FILE.png (or .jpg, .webp, .pdf)",
        )
    with staged_file(path) as file, writing(path):
        picture.save(file, format=format_)


def color_of(fraction: float) -> Color:
    """The colour at `fraction` of the scale, 0 (light) to 1 (dark), interpolated between the anchors in sRGB."""
    place = min(max(fraction, 0.0), 1.0) * (len(_ANCHORS) - 1)
    index = min(int(place), len(_ANCHORS) - 2)
    weight = place - index
    first, second = _ANCHORS[index], _ANCHORS[index + 1]
    red, green, blue = (round(a + (b - a) * weight) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _checked(matrix: npt.ArrayLike, n_images: int, n_texts: int) -> npt.NDArray[np.float64]:
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (n_images, n_texts) or values.size == 0:
        raise InputError(
            f"expected a matrix of at least one image and one text, {n_images} x {n_texts}, found {list(values.shape)}"
        )
    if max(values.shape) > MAX_SIDE:
        raise InputError(
            f"a picture of {n_images} images and {n_texts} texts has cells too small to tell apart",
            hint=f"draw at most {MAX_SIDE} of each",
        )
    if not np.isfinite(values).all():
        raise InputError("the matrix holds values that are not finite numbers")
    return values


def _warn_of_boxes(texts: Sequence[str]) -> None:
    boxed = [text for text in texts if lacks_glyphs(text)]
    if boxed:
        message = f"no font here has all characters of {boxed[0]!r}; boxes stand for those that are missing"
        warnings.warn(f"{message}; install one that does, such as Noto or Noto CJK", stacklevel=3)


def _layout(columns: int, rows: int, texts: Sequence[str], lettering: Lettering, *, titled: bool) -> _Layout:
    cell = int(np.clip(880 // max(columns, rows * 0.6), 14, 88)) * _SCALE
    longest = max(lettering.width(text, 14 * _SCALE) for text in texts)
    return _Layout(
        columns=columns,
        rows=rows,
        cell=cell,
        gap=(3 if cell >= 30 * _SCALE else 1) * _SCALE,
        margin=24 * _SCALE,
        title_height=34 * _SCALE if titled else 0,
        label_width=int(np.clip(longest, 40 * _SCALE, 310 * _SCALE)) + 2,
        thumbnail=cell,
        legend_height=0 if _has_numbers(cell) else 44 * _SCALE,
    )


def _has_numbers(cell: int) -> bool:
    return cell >= 38 * _SCALE


def _thumbnail(image: ImageInput, side: int) -> Image.Image:
    """The centre square, as the image tower sees most images; transparency over white."""
    opened = open_image(image)
    if "A" in opened.getbands() or "transparency" in opened.info:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
    square = ImageOps.fit(opened.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    mask = Image.new("L", square.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), 5 * _SCALE, fill=255)
    return Image.composite(square, Image.new("RGB", square.size, _PAPER), mask)


def _draw_labels(draw: ImageDraw.ImageDraw, layout: _Layout, texts: Sequence[str], lettering: Lettering) -> None:
    size = min(14 * _SCALE, int(layout.row_height * 0.8))
    for row, text in enumerate(texts):
        _, top, _, bottom = layout.box(row, 0)
        lettering.write(
            draw, text, (layout.margin, top, layout.margin + layout.label_width, bottom), size, _INK, right=True
        )


def _draw_cells(
    draw: ImageDraw.ImageDraw, layout: _Layout, values: npt.NDArray[np.float64], lettering: Lettering
) -> None:
    low, high = float(values.min()), float(values.max())
    numbers, digits = _has_numbers(layout.cell), _digits(low, high)
    radius = (5 if numbers else 2) * _SCALE
    for column, row in np.ndindex(values.shape):
        value = float(values[column, row])
        color = color_of((value - low) / (high - low) if high > low else 0.5)
        left, top, right, bottom = box = layout.box(row, column)
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius, fill=color)
        if numbers:
            lettering.number(draw, f"{value:.{digits}f}", box, _number_size(layout.cell), _readable_on(color))
    line = (3 if numbers else 2) * _SCALE
    for column, row in enumerate(values.argmax(axis=1)):
        left, top, right, bottom = layout.box(int(row), column)
        grow = line // 2
        outline = (left - grow, top - grow, right - 1 + grow, bottom - 1 + grow)
        draw.rounded_rectangle(outline, radius + grow, outline=_ACCENT, width=line)


def _draw_legend(
    draw: ImageDraw.ImageDraw, layout: _Layout, values: npt.NDArray[np.float64], lettering: Lettering
) -> None:
    """The scale, with what its ends stand for."""
    low, high = float(values.min()), float(values.max())
    right = layout.size[0] - layout.margin
    top = layout.size[1] - layout.margin - 16 * _SCALE
    bar = min(160 * _SCALE, right - layout.margin - 100 * _SCALE)
    digits, height = _digits(low, high), 10 * _SCALE
    end = right - 46 * _SCALE
    for x in range(bar):
        draw.line((end - bar + x, top, end - bar + x, top + height), fill=color_of(x / (bar - 1)))
    around = (top - 4 * _SCALE, top + height + 4 * _SCALE)
    lettering.number(
        draw, f"{low:.{digits}f}", (end - bar - 46 * _SCALE, around[0], end - bar, around[1]), 12 * _SCALE, _FAINT
    )
    lettering.number(draw, f"{high:.{digits}f}", (end, around[0], right, around[1]), 12 * _SCALE, _FAINT)


def _digits(low: float, high: float) -> int:
    """Digits after the point: two for cosines and probabilities, one for similarities of CLIP's usual 0 to 100."""
    return 2 if max(abs(low), abs(high)) < 10 else 1


def _number_size(cell: int) -> int:
    return min(16 * _SCALE, int(cell * 0.3))


def _readable_on(color: Color) -> Color:
    """Ink or paper, whichever stands out more, by the relative luminance of WCAG 2: both keep a contrast of 3 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (level / 255 for level in color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _INK if luminance > 0.25 else _PAPER
