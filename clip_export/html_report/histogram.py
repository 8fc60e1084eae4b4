"""The histogram of cosines as SVG, over 1 - cosine on a logarithmic scale: equality to the left, failure to the right.

Near 1 a cosine says nothing to the eye: 0.9999 and 0.999999 differ by a hundredfold in what they lose. All histograms
of a report share one axis, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_export.html_report import numbers
from clip_export.html_report.contents import Floats, MeasuredRow
from clip_export.html_report.markup import Html, cut, element

__all__ = ["Axis", "histogram"]

# Units of the drawing, each about a pixel of a screen: text is 12 of them high.
_WIDTH, _HEIGHT = 280, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 18, 262, 24, 96
_BINS = 44
_MOST_STEPS = 5
_NAME = 80  # characters
_LEAST_ERROR = 1e-12  # what float64 leaves of 1 - cosine is noise below; equal vectors stand here
_LEAST_HEIGHT = 3  # one value of thousands is seen: it may be the one that fails


@dataclass(frozen=True, slots=True)
class Axis:
    """Powers of ten from `low` to `high` of 1 - cosine."""

    low: int
    high: int

    @classmethod
    def of(cls, rows: Sequence[MeasuredRow]) -> Axis:
        """One that has room for every finite cosine of `rows`, and for what is required of them."""
        parts = [np.array([row.required_cosine for row in rows], np.float64), *(row.cosines for row in rows)]
        errors = _errors(np.concatenate([np.ravel(part) for part in parts]))
        low, high = np.log10([errors.min(), errors.max()]) if len(errors) else (-8.0, 0.0)
        return cls(int(np.floor(low)), max(int(np.ceil(high)), int(np.floor(low)) + 1))

    def place(self, exponent: float) -> float:
        """Where 10 ** `exponent` stands, in pixels."""
        share = (exponent - self.low) / (self.high - self.low)
        return round(_LEFT + (_RIGHT - _LEFT) * min(max(share, 0.0), 1.0), 2)

    def edges(self, required: float) -> Floats:
        """The exponents between bins; `required` is one of them, so that no bar stands on both sides of it."""
        count = max(1, _BINS // (self.high - self.low)) * (self.high - self.low)
        inner = [] if np.isnan(required) else [min(max(required, self.low), self.high)]
        return np.unique(np.round([*np.linspace(self.low, self.high, count + 1), *inner], 9))


def histogram(row: MeasuredRow, axis: Axis) -> Html:
    """The figure for the cosines of `row`; values that are not numbers are counted in its caption."""
    cosines = np.ravel(row.cosines).astype(np.float64)
    lost = int((~np.isfinite(cosines)).sum())
    required = _exponent(row.required_cosine)
    errors = _errors(cosines)
    drawing = element(
        "svg",
        _bars(errors, axis, required),
        _axis(axis),
        _requirement(row.required_cosine, axis.place(required)) if np.isfinite(required) else None,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=_told(row, errors),
    )
    caption = element(
        "figcaption",
        element("b", cut(f"{row.tower} {row.output}", _NAME)),
        f" {cut(row.precision, _NAME)}, {len(cosines):,} cosines"
        + (f", {lost:,} of them not a number" if lost else ""),
    )
    return element("figure", caption, drawing, class_="histogram")


def _errors(cosines: Floats) -> Floats:
    """1 - cosine of those that are finite, never below what float64 can tell from 0."""
    finite = cosines[np.isfinite(cosines)]
    return np.maximum(1 - finite, _LEAST_ERROR)


def _exponent(cosine: float) -> float:
    return float(np.log10(max(1 - cosine, _LEAST_ERROR))) if np.isfinite(cosine) else float("nan")


def _bars(errors: Floats, axis: Axis, required: float) -> list[Html]:
    edges = axis.edges(required)
    counts, _ = np.histogram(np.clip(np.log10(errors), axis.low, axis.high), edges)
    tallest = max(int(counts.max()), 1)
    bars = []
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            height = round(max((_BOTTOM - _TOP) * int(count) / tallest, _LEAST_HEIGHT), 2)
            left, right = axis.place(start), axis.place(stop)
            bars.append(
                element(
                    "rect",
                    x=round(left, 2),
                    y=round(_BOTTOM - height, 2),
                    width=round(max(right - left - 1, 1), 2),
                    height=height,
                    class_="bar below" if start >= round(required, 9) else "bar",
                )
            )
    return bars


def _axis(axis: Axis) -> list[Html]:
    step = -(-(axis.high - axis.low) // _MOST_STEPS)
    marks = [element("line", x1=_LEFT, y1=_BOTTOM, x2=_RIGHT, y2=_BOTTOM, class_="axis")]
    for exponent in range(axis.low, axis.high + 1, step):
        x = axis.place(exponent)
        marks.append(element("line", x1=x, y1=_BOTTOM, x2=x, y2=_BOTTOM + 4, class_="axis"))
        marks.append(element("text", numbers.power(exponent), x=x, y=_BOTTOM + 17, text_anchor="middle"))
    marks.append(element("text", "← equal", x=0, y=_HEIGHT - 4))
    marks.append(element("text", "1 − cosine", x=_WIDTH, y=_HEIGHT - 4, text_anchor="end"))
    return marks


def _requirement(cosine: float, x: float) -> list[Html]:
    on_left = x > (_LEFT + _RIGHT) / 2
    label = element(
        "text",
        f"required {cosine:.7g}",
        x=x - 5 if on_left else x + 5,
        y=_TOP - 10,
        text_anchor="end" if on_left else "start",
        class_="required",
    )
    return [element("line", x1=x, y1=6, x2=x, y2=_BOTTOM, class_="required"), label]


def _told(row: MeasuredRow, errors: Floats) -> str:
    """The picture in words, for who cannot see it."""
    name = cut(f"{row.tower} {row.output}, {row.precision}", _NAME)
    if not len(errors):
        return f"Histogram of {name}: no cosine is a number"
    middle, largest = (numbers.scientific(float(value)) for value in (np.median(errors), errors.max()))
    wanted = numbers.scientific(max(1 - row.required_cosine, 0.0))
    return f"Histogram of 1 − cosine of {name}: median {middle}, largest {largest}, required at most {wanted}"
