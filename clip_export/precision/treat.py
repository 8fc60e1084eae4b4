"""What becomes of one linear layer in 8 bits: how its input is smoothed, where it is cut off, and what that costs.

Decided from a sample of the input's rows alone: the layer's product in 8 bits is compared with the exact one, for every
strength of smoothing, and the smallest error wins. No smoothing is among the candidates, so smoothing never harms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_export.errors import InputError
from clip_export.precision.formats import Format, FormatName
from clip_export.precision.linears import Linear
from clip_export.precision.scales import activation_limit

# How much of the trouble goes to the weights: 0.5 halves it evenly on a log scale, and large outliers want more.
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Rows of the sample that candidates are compared on.
SEARCH_ROWS = 256
# A divisor is within this factor of the typical one, so that what is divided keeps its place in half precision.
SPREAD = 2.0**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """How one linear layer, node `linear`, goes to 8 bits.

    `strength` is that of the smoothing, None where there is none; `divisor` float32 [inputs] is what `smooth` takes,
    all ones without. Activations, divided, are cut off at `limit`, and `scale` is what 1 in the format stands for.
    `error` is |XW - Q(X/d) Q(dW)|^2 / |XW|^2 on at most `SEARCH_ROWS` rows of the sample.
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

    `weights` are float32 [inputs, outputs], `rows` a sample of its input, float32 [n, inputs], and `largest` [inputs]
    the largest absolute value of each channel over all data. `method` is one of scales.METHODS and says where the
    input is cut off. Smoothing with each of `strengths`, 0 to 1, is tried where the input is `foldable`. The same
    arguments give the same treatment; of equal errors the first one wins, no smoothing before all.

    Raises InputError for arrays that do not fit each other, an empty sample and a strength outside of 0 to 1, and what
    `activation_limit` raises: ExportError for values that are not finite.
    """
    _require_fit(linear, weights, rows, largest)
    _require_strengths(strengths)
    chosen = np.linspace(0, len(rows) - 1, min(SEARCH_ROWS, len(rows))).round().astype(np.int64)
    trial = _Trial(
        linear=linear,
        weights=weights,
        rows=rows,
        largest=largest,
        format=format_,
        method=method,
        chosen=chosen,
        exact=rows[chosen] @ weights,
    )
    tried = [trial.treatment(None, np.ones(linear.inputs, dtype=np.float32))]
    if foldable:
        tried += [trial.treatment(strength, divisors(weights, largest, strength)) for strength in strengths]
    return min(tried, key=lambda treatment: treatment.error)


def divisors(weights: np.ndarray, largest: np.ndarray, strength: float) -> np.ndarray:
    """SmoothQuant's divisor of each channel, float32 [inputs]: largest^a / max|W|^(1 - a), over its geometric mean.

    Xiao et al. 2022, arXiv:2211.10438, equation 4; `a` is the `strength`. Any factor common to all channels cancels in
    the product; with a geometric mean of 1 the input keeps its size. A channel that was never alive keeps 1: nothing is
    known of it. One that the weights ignore is made as small as the bound allows.
    """
    rows = np.abs(weights).max(axis=1, initial=0.0).astype(np.float64)
    alive, heard = largest > 0, rows > 0
    both = alive & heard
    logarithms = np.zeros(len(rows))
    logarithms[both] = strength * np.log2(largest[both].astype(np.float64)) - (1 - strength) * np.log2(rows[both])
    if both.any():
        logarithms[both] -= logarithms[both].mean()
    logarithms[alive & ~heard] = np.inf
    return np.exp2(np.clip(logarithms, -np.log2(SPREAD), np.log2(SPREAD))).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A layer and its sample, for candidates to be tried on; `exact` is the product of the rows `chosen`."""

    linear: Linear
    weights: np.ndarray
    rows: np.ndarray
    largest: np.ndarray
    format: Format
    method: str
    chosen: np.ndarray
    exact: np.ndarray

    def treatment(self, strength: float | None, divisor: np.ndarray) -> Treatment:
        divided = self.rows / divisor
        limit = activation_limit(divided, self.largest / divisor, self.method, self.format)
        scale = limit / self.format.largest
        return Treatment(
            linear=self.linear.name,
            format=self.format.name,
            strength=strength,
            divisor=divisor,
            limit=limit,
            scale=scale,
            error=self._error(divided[self.chosen], self.weights * divisor[:, None], scale),
        )

    def _error(self, rows: np.ndarray, weights: np.ndarray, scale: float) -> float:
        quantize = self.format.quantize
        product = quantize(rows, scale) @ quantize(weights, self.format.weight_scales(weights))
        size = _squared(self.exact)
        return _squared(self.exact - product) / size if size > 0 else 0.0


def _squared(array: np.ndarray) -> float:
    """The sum of squares, in float64."""
    return float(np.sum(np.square(array, dtype=np.float64)))


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
