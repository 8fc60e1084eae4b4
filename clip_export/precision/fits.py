"""What fits a half type: the limits of float16 and bfloat16, and the sums that say whether rounding does harm.

A number that is rounded normally is off by at most half of `eps`, relative to itself. Harm begins where the type ends:
above its largest number, and below its smallest normal one, where the error stops shrinking with the number. What a
product makes of that depends on both operands: a weight of 1e-8 is noise beside weights of 1e-2, unless its channel
carries activations of 1e6. So weights are judged by what they contribute, W[k, j] times the largest x[k].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Precision: TypeAlias = Literal["fp16", "bf16"]
Reason: TypeAlias = Literal["overflow", "underflow"]

# Real inputs are more than those that ranges were measured on: tensors may grow, or shrink, by this much.
HEADROOM = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfType:
    """A half type: `eps` is the distance of 1 to the next number, `smallest` the smallest number above zero."""

    name: str
    eps: float
    largest: float
    smallest_normal: float
    smallest: float

    def round(self, array: np.ndarray) -> np.ndarray:
        """`array` in this type, to the nearest and ties to even; above `largest` it becomes infinite."""
        import ml_dtypes

        with np.errstate(over="ignore"):
            return array.astype(np.float16 if self.name == "float16" else ml_dtypes.bfloat16)


HALF_TYPES: dict[Precision, HalfType] = {
    "fp16": HalfType(name="float16", eps=2**-10, largest=65504.0, smallest_normal=2**-14, smallest=2**-24),
    "bf16": HalfType(
        name="bfloat16", eps=2**-7, largest=(2 - 2**-7) * 2.0**127, smallest_normal=2**-126, smallest=2**-133
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Why a tensor is not to be rounded: `value` is beyond `limit`, above it for overflow.

    For underflow of a whole tensor `value` is its size and below `limit`; in a product it is the relative error, above.
    """

    reason: Reason
    tensor: str
    value: float
    limit: float


def tensor_misfit(half: HalfType, tensor: str, largest: float) -> Misfit | None:
    """The misfit of an activation whose largest absolute value is `largest`, None where it fits."""
    limit = half.largest / HEADROOM
    if not largest <= limit:  # so that what is not a number does not fit
        return Misfit(reason="overflow", tensor=tensor, value=largest, limit=limit)
    return size_misfit(half, tensor, largest)


def size_misfit(half: HalfType, tensor: str, size: float) -> Misfit | None:
    """The misfit of a tensor that vanishes: not zero, and of a `size` at which the error no longer shrinks with it."""
    limit = half.smallest_normal * HEADROOM
    if 0 < size < limit:
        return Misfit(reason="underflow", tensor=tensor, value=size, limit=limit)
    return None


def constant_misfit(half: HalfType, tensor: str, array: np.ndarray, scale: float | None = None) -> Misfit | None:
    """The misfit of a constant: rounding it may cost `eps` of its own norm, or of `scale` in every place if given."""
    largest = float(np.abs(array).max(initial=0.0))
    if not largest <= half.largest:
        return Misfit(reason="overflow", tensor=tensor, value=largest, limit=half.largest)
    error = np.abs(array - half.round(array).astype(np.float32))
    whole = _ratio(_norm(error), _norm(array))
    return _harm(half, tensor, whole if scale is None else _ratio(float(error.max(initial=0.0)), scale))


def weights_misfit(half: HalfType, tensor: str, weights: np.ndarray, channels: np.ndarray) -> Misfit | None:
    """The misfit of `weights` [in, out] behind activations of at most `channels` [in].

    What activations and weights contribute, x[k] W[k, j], may be off by `eps`, four times what normal rounding costs:
    all together, as a norm, and each output j by itself, since what follows may scale it up again. A twentieth of the
    outputs is exempt: neurons that training has let die have weights of nothing, and nothing reads them.
    """
    largest = float(np.abs(weights).max(initial=0.0))
    if not largest <= half.largest:
        return Misfit(reason="overflow", tensor=tensor, value=largest, limit=half.largest)
    exact, column = weights.astype(np.float64), channels[:, None]
    error = exact - half.round(weights).astype(np.float64)
    return _harm(half, tensor, _product_harm(column * error, column * exact))


def operand_misfit(half: HalfType, tensor: str, weights: np.ndarray, channels: np.ndarray) -> Misfit | None:
    """The misfit of activations `tensor` of at most `channels` [in] before `weights` [in, out].

    Rounding x[k] costs half of `eps` of it, or half of the smallest number where it is tiny; the rest is as above.
    """
    error = np.where(channels > 0, np.maximum(channels * half.eps, half.smallest) / 2, 0.0)
    exact = weights.astype(np.float64)
    return _harm(half, tensor, _product_harm(error[:, None] * exact, channels[:, None] * exact))


_EXEMPT = 0.05


def _product_harm(error: np.ndarray, contributions: np.ndarray) -> float:
    """The norm of `error` over that of `contributions`, both [in, out]: of all, or of the worst outputs if larger."""
    errors, sizes = (np.linalg.norm(array, axis=0) for array in (error, contributions))
    if not sizes.any():
        return 0.0
    outputs = errors[sizes > 0] / sizes[sizes > 0]
    return max(_ratio(_norm(errors), _norm(sizes)), float(np.quantile(outputs, 1 - _EXEMPT, method="higher")))


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64, copy=False)))


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale > 0 else 0.0


def _harm(half: HalfType, tensor: str, harm: float) -> Misfit | None:
    if harm <= half.eps:
        return None
    return Misfit(reason="underflow", tensor=tensor, value=harm, limit=half.eps)
