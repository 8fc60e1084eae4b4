"""Similarity matrices as tables whose cells are coloured: reference, engine and their difference side by side.

Tables and not pictures, so that they can be read aloud, copied and printed. Images run across the top and texts down
the side, as in `clip_export.plot`; reference and engine share one scale, the difference has its own around zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clip_export.html_report import numbers
from clip_export.html_report.contents import Floats, Item, Similarities
from clip_export.html_report.markup import Html, cut, data_text, element
from clip_export.html_report.thumbnails import thumbnail
from clip_export.plot import Color, color_of

__all__ = ["MAX_SHOWN", "matrices"]

MAX_SHOWN = 24  # images and texts: with more, cells become too small on a phone
_MOST_WITH_NUMBERS = 8  # columns
_THUMBNAIL = 48
_LABEL = 120  # characters; the column shows fewer, and the rest when pointed at

_INK: Color = (33, 37, 41)
_PAPER: Color = (255, 255, 255)
_ZERO: Color = (244, 243, 236)
_LESS: Color = (24, 92, 150)  # blue and orange: told apart whatever the eye makes of red and green
_MORE: Color = (176, 78, 10)


@dataclass(frozen=True, slots=True)
class _Scale:
    """How a value is coloured and written, in which unit, and what its legend says."""

    color: Callable[[float], Color]
    write: Callable[[float], str]
    ends: tuple[str, ...]
    gradient: tuple[Color, ...]
    unit: str = ""


def matrices(shown: Similarities) -> Html:
    """The three tables, and in words whether the best text of each image is still the same."""
    count = shown.reference.shape
    images, texts = shown.images[:MAX_SHOWN], shown.texts[:MAX_SHOWN]
    reference, found = (
        np.asarray(array, np.float64)[:MAX_SHOWN, :MAX_SHOWN].T for array in (shown.reference, shown.found)
    )
    difference = found - reference
    levels, around_zero = _levels(reference, found), _around_zero(difference)
    head = _head(images)
    panels = [
        _panel("Reference", reference, texts, head, levels, outlined=True),
        _panel("Engine", found, texts, head, levels, outlined=True),
        _panel(f"Difference{around_zero.unit}", difference, texts, head, around_zero, outlined=False),
    ]
    dense = " dense" if len(images) > _MOST_WITH_NUMBERS else ""
    return element(
        "div",
        element("p", _sentence(reference, found, count)),
        element("div", panels, class_=f"panels{dense}"),
    )


def _sentence(reference: Floats, found: Floats, count: tuple[int, ...]) -> str:
    best, still = _best(reference), _best(found)
    same = sum(1 for before, after in zip(best, still, strict=True) if before is not None and before == after)
    sentence = f"Outlined: the best text of each image. It is the same for {same} of the {len(best)} images shown."
    difference = np.abs(found - reference)
    if np.isfinite(difference).any():
        largest = float(np.max(difference[np.isfinite(difference)]))
        sentence += f" The largest difference is {numbers.scientific(largest)}."
    if max(count) > MAX_SHOWN:
        sentence += f" Shown are the first {len(best)} of {count[0]:,} images and {len(found)} of {count[1]:,} texts."
    return sentence


def _best(values: Floats) -> list[int | None]:
    """Which text is nearest to each image; None where a value is not a number. `values` is [texts, images]."""
    return [int(column.argmax()) if np.isfinite(column).all() else None for column in values.T]


def _head(images: Sequence[Item]) -> Html:
    cells = [element("th", _picture(item, place), scope="col") for place, item in enumerate(images, start=1)]
    return element("thead", element("tr", element("td"), cells))


def _picture(item: Item, place: int) -> Html:
    name = cut(item.text, _LABEL) or f"image {place}"
    if item.image is None:
        return element("span", str(place), title=name)
    return element("img", src=thumbnail(item.image, _THUMBNAIL), alt=name, title=name)


def _panel(title: str, values: Floats, texts: Sequence[str], head: Html, scale: _Scale, *, outlined: bool) -> Html:
    best = _best(values) if outlined else [None] * values.shape[1]
    rows = [
        element(
            "tr",
            element("th", data_text(text, limit=_LABEL), scope="row", title=cut(text, _LABEL)),
            [_cell(float(value), scale, best=best[column] == row) for column, value in enumerate(values[row])],
        )
        for row, text in enumerate(texts)
    ]
    table = element("table", head, element("tbody", rows), class_="matrix", aria_label=f"Similarities: {title}")
    return element("figure", element("figcaption", title), table, _legend(scale), class_="panel")


def _cell(value: float, scale: _Scale, *, best: bool) -> Html:
    if not np.isfinite(value):
        return element("td", numbers.plain(value), class_="nan")
    color = scale.color(value)
    style = f"background:{_css(color)};color:{_css(_readable_on(color))}"
    written = scale.write(value)  # as a title too: where cells are small, it is seen only when pointed at
    return element("td", written, style=style, title=written, class_="best" if best else None)


def _levels(*arrays: Floats) -> _Scale:
    values = np.concatenate([array.ravel() for array in arrays])
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    digits = 2 if max(abs(low), abs(high)) < 10 else 1

    def color(value: float) -> Color:
        return color_of((value - low) / (high - low) if high > low else 0.5)

    def write(value: float) -> str:
        return numbers.rounded(value, digits)

    return _Scale(color, write, (write(low), write(high)), tuple(color_of(step / 8) for step in range(9)))


def _around_zero(difference: Floats) -> _Scale:
    """Differences are written in the power of ten of the largest, so that two digits are enough."""
    finite = np.abs(difference[np.isfinite(difference)])
    largest = float(finite.max()) if len(finite) else 0.0
    exponent = int(np.floor(np.log10(largest))) if largest > 0 else 0
    unit = 10.0**exponent

    def color(value: float) -> Color:
        return _mixed(_ZERO, _MORE if value > 0 else _LESS, abs(value) / largest if largest > 0 else 0.0)

    def write(value: float) -> str:
        return numbers.signed(value / unit, 1)

    if largest == 0:
        return _Scale(color, write, ("0", "0"), (_ZERO, _ZERO))
    ends = (numbers.scientific(-largest), "0", f"+{numbers.scientific(largest)}")
    return _Scale(color, write, ends, (_LESS, _ZERO, _MORE), f" ×{numbers.power(exponent)}" if exponent else "")


def _legend(scale: _Scale) -> Html:
    colors = ",".join(_css(color) for color in scale.gradient)
    bar = element("span", class_="bar", style=f"background:linear-gradient(90deg,{colors})")
    return element("div", bar, [element("span", end) for end in scale.ends], class_="legend")


def _mixed(first: Color, second: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _css(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _readable_on(color: Color) -> Color:
    """Ink or paper, whichever has the higher contrast by WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (level / 255 for level in color)]
    return _INK if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.21 else _PAPER
