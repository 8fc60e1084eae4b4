"""How a half graph holds numbers of an 8-bit format: as those numbers, and scales in half. And where it cannot.

TensorRT wants scales in the type of what is quantized, so they are rounded, and weights are brought to the scales as
rounded. A float16 has few digits below its smallest normal number, and engines multiply by the reciprocal of a scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import InputError
from clip_export.precision.fits import HALF_TYPES, HalfType
from clip_export.precision.formats import FORMATS, Format

if TYPE_CHECKING:
    import onnx_ir as ir


def hold_scale(scale: float, half: HalfType, *, wide: bool = False) -> np.ndarray:
    """The scale of an activation as a graph has it, []: in half, or in fp32 where it is `wide`; rounded once."""
    exact = np.array(scale, np.float64)
    return exact.astype(np.float32) if wide else half.round(exact)


def scale_misfit(scale: float, format_: Format, half: HalfType, *, wide: bool = False) -> str | None:
    """Why `half` cannot hold the scale of an activation, None where it can. A `wide` scale is fp32.

    Below the smallest normal number it would lose its digits, and its reciprocal, with which engines multiply, might be
    infinite.
    """
    name, smallest = ("float32", 2.0**-126) if wide else (half.name, half.smallest_normal)
    if not smallest <= scale < np.inf:
        return (
            f"has an input whose scale {scale:.3g} is not between {smallest:.3g}, "
            f"{name}'s smallest normal number, and infinity"
        )
    if _overflows(scale, format_, half):
        return (
            f"has an input whose scale {scale:.3g} dequantizes to more than {half.largest:.6g}, "
            f"{half.name}'s largest number"
        )
    return None


# What half scales may cost an output, relative to its norm: as much as int8 costs anyway. A twentieth is exempt, as in
# fits.py: outputs that training has let die have weights of nothing, and nothing reads them.
_COST, _EXEMPT = 0.01, 0.05


def weights_misfit(weights: np.ndarray, format_: Format, half: HalfType) -> str | None:
    """Why `half` cannot hold the scales of `weights` [in, out], None where it can.

    Small scales are raised, which harms int8 soon, and fp8 late: it has exponents of its own.
    """
    exact = weights.astype(np.float32)
    scales = weight_scales(exact, format_, half).astype(np.float32)
    if _overflows(float(scales.max(initial=0.0)), format_, half):
        return f"has weights that dequantize to more than {half.largest:.6g}, {half.name}'s largest number"
    wanted = format_.weight_scales(exact)
    raised = wanted < half.smallest_normal
    if np.count_nonzero(raised) <= _EXEMPT * len(raised):
        return None
    low = exact[:, raised]
    norms = np.linalg.norm(low, axis=0)
    before, after = (np.linalg.norm(format_.quantize(low, some[raised]) - low, axis=0) for some in (wanted, scales))
    spoilt = int(np.count_nonzero(after > before + _COST * norms))
    if spoilt <= _EXEMPT * len(raised):
        return None
    return (
        f"has {spoilt} of {len(raised)} outputs whose weights take {format_.name} scales below "
        f"{half.smallest_normal:.3g}, {half.name}'s smallest normal number"
    )


def _overflows(scale: float, format_: Format, half: HalfType) -> bool:
    reach = 128.0 if format_.name == "int8" else format_.largest
    return not np.isfinite(half.round(half.round(np.array(scale)).astype(np.float32) * np.float32(reach)))


def weight_scales(weights: np.ndarray, format_: Format, half: HalfType, *, wide: bool = False) -> np.ndarray:
    """One scale for each output of `weights` [in, out], as `half` holds it, and none below its smallest normal number.

    Small scales are raised: that costs an output precision only where its weights are small beside those of others.
    With `wide` they are fp32, as they come.
    """
    if wide:
        return format_.weight_scales(weights)
    return half.round(np.maximum(format_.weight_scales(weights), np.float32(half.smallest_normal)))


def hold_weights(weights: np.ndarray, scales: np.ndarray, format_: Format) -> np.ndarray:
    """`weights` [in, out] over `scales` [out] in the numbers of the format, float32. int8 is symmetric: never -128."""
    over = weights.astype(np.float32) / scales.astype(np.float32)
    return format_.round(np.clip(over, -format_.largest, format_.largest))


def dequantized(held: np.ndarray, scales: np.ndarray, half: HalfType) -> np.ndarray:
    """What DequantizeLinear gives for numbers of a format: their product with `scales` (broadcast), as half holds it.

    Float32. The product is exact in fp32, 8 bits times at most 11, so there is one rounding.
    """
    return half.round(held.astype(np.float32) * scales.astype(np.float32)).astype(np.float32)


def half_type(value: ir.Value) -> HalfType:
    """The half type of `value`, which has one."""
    return next(
        half for half in HALF_TYPES.values() if value.dtype is not None and half.name == value.dtype.name.lower()
    )


def is_half(value: ir.Value | None) -> bool:
    """Whether `value` is a tensor of a half type."""
    names = {half.name for half in HALF_TYPES.values()}
    return value is not None and value.dtype is not None and value.dtype.name.lower() in names


def format_type(format_: Format) -> ir.DataType:
    """The ONNX type that holds numbers of the format."""
    import onnx_ir as ir

    return ir.DataType.INT8 if format_.name == "int8" else ir.DataType.FLOAT8E4M3FN


def format_of(dtype: ir.DataType) -> Format:
    """The format whose numbers the ONNX type holds. Raises InputError for a type that is none of them."""
    for format_ in FORMATS.values():
        if format_type(format_) == dtype:
            return format_
    wanted = " or ".join(format_type(format_).name.lower() for format_ in FORMATS.values())
    raise InputError(f"expected tensors quantized to {wanted}, found {dtype.name.lower()}")
