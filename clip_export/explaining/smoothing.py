"""What the smoothing of 8 bits did to a variant's layers, so that they can be compared with layers that have none.

Smoothing divides what a linear layer reads by one number a channel, multiplies the columns of its weights [out, in] by
it, and lets the layer before take the division up (precision/smooth.py). The numbers are in no file: they are read off
the constants that were changed by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from clip_export.explaining.layers import weights
from clip_export.explaining.stages import Place, reads
from clip_export.explaining.tapping import Values
from clip_export.spec import Tower

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Smoothing", "find_smoothing"]

# The weights agree with what the constants before them say, if these explain them this well beside the best guess.
_AS_WELL = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """By layer and channel: `read` divides what a layer reads, `given` what it gives. Layers without it are in none."""

    read: Mapping[str, np.ndarray] = field(default_factory=dict)
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    def undone(self, values: Values) -> Values:
        """What the variant holds, as it would be without the smoothing."""
        return {layer: array * self.given[layer] if layer in self.given else array for layer, array in values.items()}

    def done(self, layer: str, plain: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The constants of `layer` by role, as the smoothing makes them of `plain` ones."""
        given, read = self.given.get(layer, np.ones(1)), self.read.get(layer, np.ones(1))
        return {
            role: array / given[:, None] * read if array.ndim == 2 else array / given
            for role, array in plain.items()
            if array.ndim <= 2
        } | {role: array for role, array in plain.items() if array.ndim > 2}  # a convolution is never smoothed


def find_smoothing(variant: ir.Graph, plain: ir.Graph, places: Sequence[Place], tower: Tower) -> Smoothing:
    """The smoothing of `variant`, found by comparing its constants with those of the `plain` fp32 graph."""
    read: dict[str, np.ndarray] = {}
    given: dict[str, np.ndarray] = {}
    if not any(node.op_type == "DequantizeLinear" for node in variant):
        return Smoothing()
    known = {place.layer: place for place in places}
    for layer in known:
        source = reads(layer, tower, known)
        mine, theirs = (weights(graph, layer).get("weight") for graph in (variant, plain))
        if source is None or mine is None or theirs is None or mine.shape != theirs.shape:
            continue
        taker, role = _taker(source)
        rough = _guess(mine, theirs)
        exact = _ratio(weights(plain, taker).get(role), weights(variant, taker).get(role), len(rough))
        agrees = _misfit(mine, theirs, exact) <= _AS_WELL * _misfit(mine, theirs, rough)
        divisors = np.where(agrees, exact, rough)  # not where a constant is damaged
        read[layer] = given[source] = divisors
        if taker != source:  # values are the last third of the matrix before attention
            width = len(weights(plain, taker)[role])
            given[taker] = np.concatenate([np.ones(width - len(divisors)), divisors])
    return Smoothing(read=read, given=given)


def _taker(source: str) -> tuple[str, str]:
    """The layer, and the role of its constants, that take up the division of what is read at `source`."""
    if source.endswith(".attention"):
        return f"{source}.qkv", "bias"
    return (source.replace("activation", "fc1"), "bias") if source.endswith(".activation") else (source, "weight")


def _ratio(plain: np.ndarray | None, smoothed: np.ndarray | None, channels: int) -> np.ndarray:
    """What the last `channels` constants were divided by; NaN where they do not tell."""
    if plain is None or smoothed is None or plain.shape != smoothed.shape:
        return np.full(channels, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = (plain.astype(np.float64) / smoothed)[-channels:]
    return ratio


def _guess(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """What the columns of the weights `theirs` [out, in] were multiplied by to give `mine`, [in], roughly.

    The median of each, over the weights that rounding changes least: one that is damaged does not move it.
    """
    large = (theirs != 0) & (np.abs(theirs) >= np.median(np.abs(theirs), axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(large, mine.astype(np.float64) / theirs, np.nan)
    ratios[:, ~np.isfinite(ratios).any(axis=0)] = 1.0
    found: np.ndarray = np.nanmedian(ratios, axis=0)
    return np.where(found > 0, found, 1.0)


def _misfit(mine: np.ndarray, theirs: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """How far half of each column of `mine` is from `theirs` times `factors`, [in]; NaN where these are."""
    with np.errstate(invalid="ignore", over="ignore"):
        error: np.ndarray = np.median(np.abs(mine - theirs * factors), axis=0)
    return error
