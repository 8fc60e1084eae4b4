"""Why a layer parts: hypotheses, each tested with the numbers of this layer on this input.

In the order in which one explains another: a weight that is not the reference's, another activation or mask, a number
that the type or the scale does not hold, and what is left then, rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from clip_export.choice import FP32
from clip_export.explaining.explanation import Cause, LayerRanges
from clip_export.explaining.measuring import relative_error
from clip_export.explaining.tapping import Values

__all__ = ["Evidence", "find_cause"]

Weights = Mapping[str, np.ndarray]

# How far a stored weight may be from the reference's, relative to the largest of its output: half a step of its type.
# Scales of 8 bits for CPUs are up to twice as coarse (precision/cpu.py); float8 e4m3 has 3 bits behind the point.
_WEIGHT_STEPS = {"fp32": 1e-6, "fp16": 2**-10, "fp16all": 2**-10, "bf16": 2**-7}
_EIGHT_BITS = 2**-4
_FEW = 0.01  # up to this share of a matrix is damage; more is another matrix
_SATURATED = 0.1  # of the length of what a layer reads, lost beyond the largest number of its scale
_COARSE = 8  # a median channel with fewer steps than this is hardly told apart

_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of the layer that parts.

    `found` and `expected` are by layer, the variant's where every stage was given what the reference gave to it. Both
    weights are by role, linear ones [out, in]; `ranges` are of what the variant holds. `heads` are of the tower.
    """

    layer: str
    precision: str
    found: Values
    expected: Values
    weights: Weights
    reference_weights: Weights
    ranges: LayerRanges
    heads: int


def find_cause(known: Evidence) -> Cause:
    """The first hypothesis that the numbers bear out."""
    for test in (_weights, _activation, _mask, _overflow, _saturation):
        cause = test(known)
        if cause is not None:
            return cause
    return _rounding(known)


def _weights(known: Evidence) -> Cause | None:
    """Weights that rounding to the variant's type does not explain."""
    again = "The files that its digests vouch for are not the reference's weights: build or extend the bundle again."
    for role, theirs in known.reference_weights.items():
        mine = known.weights.get(role)
        if mine is None or mine.shape != theirs.shape:
            continue
        step = _WEIGHT_STEPS.get(known.precision, _EIGHT_BITS)
        differs = _differing(mine, theirs, step)
        if not differs.any():
            continue
        if mine.ndim == 4 and not _differing(mine[:, ::-1], theirs, step).any():
            said = f"The kernels of {known.layer} are the reference's with red and blue exchanged: one side reads BGR."
            return Cause(
                name="channel order", found=said, suggestion="Build it again from a checkpoint that reads RGB."
            )
        count, place = int(differs.sum()), tuple(map(int, np.unravel_index(_furthest(mine, theirs), mine.shape)))
        worst = f"the {role} at {list(place)} is {mine[place]:.4g}, the reference has {theirs[place]:.4g}"
        if count <= max(1, _FEW * differs.size):
            said = (
                f"{count} of {differs.size} numbers of {known.layer} {'is' if count == 1 else 'are'} damaged: {worst}."
            )
            return Cause(name="corrupted weight", found=said, suggestion=again)
        said = f"{known.layer} holds other weights: {count} of {differs.size} differ, {worst}."
        return Cause(name="other weights", found=said, suggestion=again)
    return None


def _activation(known: Evidence) -> Cause | None:
    """Which function each side computes, found by trying those that there are."""
    if not known.layer.endswith("mlp.activation"):
        return None
    source = known.layer.replace("activation", "fc1")
    mine, theirs = (_nearest(side[source], side[known.layer]) for side in (known.found, known.expected))
    if mine == theirs:
        return None
    said = f"The wrong activation: the variant computes {mine}, the reference {theirs}."
    return Cause(name="activation", found=said, suggestion=f"Build it again with --activation {theirs}.")


def _mask(known: Evidence) -> Cause | None:
    """Whether each side lets a position see those after it."""
    if not known.layer.endswith(".attention"):
        return None
    mine, theirs = (
        relative_error(_attended(side[f"{known.layer}.qkv"], known.heads, causal=True), side[known.layer])
        < relative_error(_attended(side[f"{known.layer}.qkv"], known.heads, causal=False), side[known.layer])
        for side in (known.found, known.expected)
    )
    if mine == theirs:
        return None
    lacking, having = ("variant", "reference") if theirs else ("reference", "variant")
    said = f"The causal mask is missing in the {lacking}: its positions see those after them, the {having}'s do not."
    return Cause(name="causal mask", found=said, suggestion="Build it again: text towers of CLIP are causal.")


def _overflow(known: Evidence) -> Cause | None:
    """A number that the half type does not hold: it is infinite in the variant, and finite in the reference."""
    if np.isfinite(known.found[known.layer]).all() or known.precision == FP32:
        return None
    largest = float(np.abs(known.expected[known.layer]).max())
    ends = "" if known.ranges.held is None else f", its type ends at {known.ranges.held:.6g}"
    said = f"{known.layer} overflows: the reference's largest value is {largest:.3g}{ends}."
    advice = f"Keep {known.layer} in fp32: make {known.precision} again with inputs like this one in --calibration."
    return Cause(name="overflow", found=said, suggestion=advice)


def _saturation(known: Evidence) -> Cause | None:
    """An 8-bit scale that ends below what the layer reads."""
    ranges = known.ranges
    if ranges.held is None or not ranges.lost > _SATURATED:
        return None
    said = (
        f"The 8-bit scale of {known.layer} saturates: it reads up to {ranges.input:.3g} and holds up to "
        f"{ranges.held:.3g}; {ranges.clipped:.2%} of the values are clipped."
    )
    advice = f"Add calibration with inputs like this one (--calibration), or keep {known.layer} in fp16 in the map."
    return Cause(name="saturation", found=said, suggestion=advice)


def _rounding(known: Evidence) -> Cause:
    """Weights and functions are equal, and nothing overflows: what is left is the digits of the type."""
    ranges = known.ranges
    if known.precision == FP32:
        said = f"{known.layer} has the reference's weights, and no function that is known here explains the difference."
        advice = "This is a bug of the export, not of the checkpoint; please report it with the architecture."
        return Cause(name="unknown", found=said, suggestion=advice)
    if ranges.step is not None:
        levels = ranges.typical_input / ranges.step
        coarse = f"the median channel has {levels:.0f} of 127 steps, since one channel reaches {ranges.input:.3g}"
        said = (
            f"8 bits are too few for {known.layer}: {coarse}."
            if levels < _COARSE
            else f"{known.layer}: 8-bit rounding."
        )
        advice = f"Keep {known.layer} in fp16: give it so in --precision-map, or use --precision auto."
        return Cause(name="8-bit rounding", found=said, suggestion=advice)
    said = f"{known.layer} has the reference's weights and function: what is left is the rounding of {known.precision}."
    advice = f"Keep {known.layer} in a wider type: fp16 where it is in 8 bits, fp32 where it is in half."
    return Cause(name="rounding", found=said, suggestion=advice)


def _differing(mine: np.ndarray, theirs: np.ndarray, step: float) -> np.ndarray:
    """Where numbers are further apart than `step` of the largest of their output, the first axis, or are not finite."""
    axes = tuple(range(1, theirs.ndim)) or None  # all of a vector
    largest = np.abs(theirs).max(axis=axes, keepdims=True)
    near: np.ndarray = np.abs(mine.astype(np.float64) - theirs) <= step * largest
    return ~near


def _furthest(mine: np.ndarray, theirs: np.ndarray) -> int:
    return int(np.nan_to_num(np.abs(mine.astype(np.float64) - theirs), nan=np.inf).argmax())


def _nearest(given: np.ndarray, result: np.ndarray) -> str:
    """The name of the activation that comes nearest to making `result` of `given`."""
    wide = given.astype(np.float64)
    with np.errstate(over="ignore"):
        return min(_ACTIVATIONS, key=lambda name: relative_error(_ACTIVATIONS[name](wide), result))


def _attended(qkv: np.ndarray, heads: int, *, causal: bool) -> np.ndarray:
    """What attention makes of `qkv` [batch, sequence, 3 width], [batch, sequence, width]."""
    batch, length, _ = qkv.shape
    parts = np.split(qkv.astype(np.float64), 3, axis=2)
    queries, keys, values = (part.reshape(batch, length, heads, -1).swapaxes(1, 2) for part in parts)
    scores = queries @ keys.swapaxes(2, 3) / math.sqrt(queries.shape[-1])
    if causal:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = shares / shares.sum(axis=-1, keepdims=True) @ values
    joined: np.ndarray = mixed.swapaxes(1, 2).reshape(batch, length, -1)
    return joined
