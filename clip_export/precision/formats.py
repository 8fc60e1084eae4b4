"""The 8-bit formats that products are quantized to: what they hold, and how a number is brought to them.

A tensor x is held as round(x / scale): one scale for an activation, one for each output of a matrix. Both formats are
symmetric, without a zero point, which is what TensorRT multiplies in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from clip_export.errors import InputError

FormatName: TypeAlias = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """An 8-bit format. `largest` is what the largest value of a tensor is mapped to: 127, or 448 of E4M3."""

    name: FormatName
    largest: float

    def round(self, array: np.ndarray) -> np.ndarray:
        """`array`, already divided by its scale, to the nearest numbers of this format, ties to even; saturating.

        Float32 in, float32 out. int8 reaches down to -128, as QuantizeLinear does.
        """
        if self.name == "int8":
            whole: np.ndarray = np.clip(np.rint(array), -128, 127).astype(np.float32)
            return whole
        import ml_dtypes

        bounded = np.clip(array, -self.largest, self.largest)
        held: np.ndarray = bounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return held

    def quantize(self, array: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
        """What is left of `array` once it is held in this format at `scale` (broadcast); float32."""
        return np.asarray(self.round(array / scale) * scale, dtype=np.float32)

    def weight_scales(self, weights: np.ndarray) -> np.ndarray:
        """One scale for each output of `weights` [in, out], float32 [out]; 1 for an output of zeros."""
        largest = np.abs(weights).max(axis=0, initial=0.0)
        return np.where(largest > 0, largest / self.largest, 1.0).astype(np.float32)


FORMATS: dict[FormatName, Format] = {
    "int8": Format(name="int8", largest=127.0),
    "fp8": Format(name="fp8", largest=448.0),  # E4M3: https://onnx.ai/onnx/technical/float8.html
}


def find_format(name: str) -> Format:
    """The format called `name`. Raises InputError for another name."""
    for known, format_ in FORMATS.items():
        if name == known:
            return format_
    raise InputError(f"there is no 8-bit format {name!r}", hint=f"choose one of: {', '.join(FORMATS)}")
