"""What becomes of one linear layer in 8 bits: how its input is smoothed, where it is cut off, and what that costs.

Decided from a sample of the input's rows alone: the layer's product in 8 bits is compared with the exact one, without
smoothing and for every strength of it, with and without room above the limit, and the smallest error wins. Two things
make that hold for other inputs too.

Every candidate is fitted to one half of the sample and judged by the other. Judged by the rows that it was fitted to,
the strongest smoothing wins: it brings the largest value of every channel to the limit, so whatever is larger than all
that was seen is cut off, in any channel. On the text tower of a ViT-B/32 with random weights that took golden texts
from a min cosine of 0.9992 without smoothing to 0.9978, though the error of every layer was smaller.

And the error of each row counts by the row's own size. A few rows are far larger than others in real towers, the first
token's above all (Sun et al. 2024, arXiv:2402.17762), and would decide alone; embeddings are made of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clip_export.errors import InputError
from clip_export.precision.formats import Format, FormatName
from clip_export.precision.linears import Linear
from clip_export.precision.scales import activation_limit

# How much of the trouble goes to the weights: 0.5 halves it evenly on a log scale, and large outliers want more.
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Rows of the sample that candidates are judged by.
SEARCH_ROWS = 256
# No divisor is larger, so that what is divided keeps its place in half precision.
SPREAD = 2.0**10
# What the limit of an input may be raised by: nothing, or one step of what it was chosen from. Where the error is flat
# that is room for what the sample does not show, and the rows that a candidate was not fitted to know whether it helps.
ROOMS = (1.0, 1 / 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """How one linear layer, node `linear`, goes to 8 bits.

    `strength` is that of the smoothing, None where there is none; `divisor` float32 [inputs] is what `smooth` takes,
    all ones without. Activations, divided, are cut off at `limit`, which may be a ninth above the largest value seen
    (see `ROOMS`), and `scale` is what 1 in the format stands for. `error` is the mean of
    |xW - Q(x/d) Q(dW)|^2 / |xW|^2 over at most `SEARCH_ROWS` rows x of the sample, d and the scale being those that the
    half without x gives. It is 0 for a row whose product is zero.
    """

    linear: str
    format: FormatName
    strength: float | None
    divisor: np.ndarray
    limit: float
    scale: float
    error: float


def treat(
    linear: Linear,
    weights: np.ndarray,
    rows: np.ndarray,
    largest: np.ndarray,
    format_: Format,
    *,
    method: str = "mse",
    foldable: bool,
    strengths: Sequence[float] = STRENGTHS,
) -> Treatment:
    """The treatment of `linear` with the smallest error.

    `weights` are float32 [inputs, outputs], `rows` a sample of its input in the order of the data, float32 [n, inputs],
    and `largest` [inputs] the largest absolute value of each channel over all data. `method` is one of scales.METHODS
    and says where the input is cut off, `mse` with each of `ROOMS`. Smoothing with each of `strengths`, 0 to 1, is
    tried where the input is `foldable`. The same arguments give the same treatment; of equal errors the first one
    wins, no smoothing before all and no room before some.

    Raises InputError for arrays that do not fit each other, an empty sample and a strength outside of 0 to 1, and what
    `activation_limit` raises: ExportError for values that are not finite.
    """
    _require_fit(linear, weights, rows, largest)
    _require_strengths(strengths)
    whole = _Fit(weights=weights, rows=rows, largest=largest, format=format_, method=method)
    trials = list(_trials(whole))
    tried = (None, *strengths) if foldable else (None,)
    rooms = ROOMS if method == "mse" else ROOMS[:1]
    errors = np.concatenate([[trial.errors(strength, rooms) for strength in tried] for trial in trials], axis=2)
    mean = errors.mean(axis=2)  # [tried, rooms]
    best, room = np.unravel_index(np.argmin(mean), mean.shape)
    strength = tried[best]
    divisor, limit = whole.fitted(strength)
    limit *= rooms[room]
    return Treatment(
        linear=linear.name,
        format=format_.name,
        strength=strength,
        divisor=divisor,
        limit=limit,
        scale=limit / format_.largest,
        error=float(mean[best, room]),
    )


def divisors(weights: np.ndarray, largest: np.ndarray, strength: float) -> np.ndarray:
    """What each channel is divided by, float32 [inputs]: SmoothQuant's divisor where that is above 1, and 1 elsewhere.

    The divisor is largest^a / max|W|^(1 - a), over its geometric mean: Xiao et al. 2022, arXiv:2211.10438, equation 4;
    `a` is the `strength`. Any factor common to all channels cancels in the product; with a geometric mean of 1 the
    typical channel keeps its size. The paper makes small channels larger too. That takes from them what they have in
    store for inputs unlike those that were seen, and gains little: they are not what the scale is large for.

    A channel that was never alive keeps 1: nothing is known of it. One that the weights ignore is made as small as the
    bound allows.
    """
    rows = np.abs(weights).max(axis=1, initial=0.0).astype(np.float64)
    alive, heard = largest > 0, rows > 0
    both = alive & heard
    logarithms = np.zeros(len(rows))
    logarithms[both] = strength * np.log2(largest[both].astype(np.float64)) - (1 - strength) * np.log2(rows[both])
    if both.any():
        logarithms[both] -= logarithms[both].mean()
    logarithms[alive & ~heard] = np.inf
    return np.exp2(np.clip(logarithms, 0.0, np.log2(SPREAD))).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """What a treatment is fitted to: rows of a layer's input and the largest value of each channel."""

    weights: np.ndarray
    rows: np.ndarray
    largest: np.ndarray
    format: Format
    method: str

    def fitted(self, strength: float | None) -> tuple[np.ndarray, float]:
        """The divisors at this strength, and the limit of what they leave."""
        if strength is None:
            divisor = np.ones(len(self.weights), dtype=np.float32)
        else:
            divisor = divisors(self.weights, self.largest, strength)
        return divisor, activation_limit(self.rows / divisor, self.largest / divisor, self.method, self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One half of the sample to fit to, and rows of the other one to judge by; `exact` are their products."""

    fit: _Fit
    judges: np.ndarray
    exact: np.ndarray

    def errors(self, strength: float | None, rooms: Sequence[float]) -> np.ndarray:
        """The squared error of each product over its square, float64 [rooms, judges]; 0 for a product of zeros."""
        divisor, limit = self.fit.fitted(strength)
        format_, weights = self.fit.format, self.fit.weights * divisor[:, None]
        weights, size = format_.quantize(weights, format_.weight_scales(weights)), _squares(self.exact)
        errors = np.zeros((len(rooms), len(size)))
        for row, room in zip(errors, rooms, strict=True):
            held = format_.quantize(self.judges / divisor, limit * room / format_.largest)
            np.divide(_squares(self.exact - held @ weights), size, out=row, where=size > 0)
        return errors


def _trials(whole: _Fit) -> Iterator[_Trial]:
    """Each half fitted and judged by the other.

    They are the first and the second half, not every other row: texts come by length and pictures folder by folder, and
    the more the halves differ, the more they say of inputs that differ from both.
    """
    middle = len(whole.rows) // 2
    halves = [whole.rows[:middle], whole.rows[middle:]] if middle else [whole.rows] * 2
    for half, other in (halves, halves[::-1]):
        chosen = np.linspace(0, len(other) - 1, min(SEARCH_ROWS // 2, len(other))).round().astype(np.int64)
        fit = dataclasses.replace(whole, rows=half, largest=np.abs(half).max(axis=0))
        yield _Trial(fit=fit, judges=other[chosen], exact=other[chosen] @ whole.weights)


def _squares(array: np.ndarray) -> np.ndarray:
    """The sum of squares of each row, in float64."""
    squares: np.ndarray = np.square(array, dtype=np.float64).sum(axis=1)
    return squares


def _require_fit(linear: Linear, weights: np.ndarray, rows: np.ndarray, largest: np.ndarray) -> None:
    for name, array, shape in (
        ("weights", weights, (linear.inputs, linear.outputs)),
        ("rows", rows, (len(rows), linear.inputs)),
        ("largest", largest, (linear.inputs,)),
    ):
        if array.shape != shape or not array.size:
            raise InputError(
                f"{linear.name}: expected {name} of shape {list(shape)}, not empty, found {list(array.shape)}",
                hint="calibrate the same graph that the layer was found in",
            )


def _require_strengths(strengths: Sequence[float]) -> None:
    if wrong := [strength for strength in strengths if not 0 <= strength <= 1]:
        raise InputError(
            f"expected strengths from 0 to 1, found {', '.join(map(str, wrong))}",
            hint="0 leaves outliers to the activations, 1 moves them to the weights altogether",
        )
