"""The precisions of 8 bits by name, and all that can be asked of how they are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from clip_export.choice import CPU_INT8
from clip_export.errors import InputError
from clip_export.precision.formats import FORMATS, FormatName
from clip_export.precision.scales import METHODS, require_method
from clip_export.precision_map import PrecisionMap

# precision -> the format of its quantized layers. In those that end in "all" the rest is fp16 to the last node.
QUANTIZED: dict[str, FormatName] = {
    "int8": "int8",
    "int8all": "int8",
    "fp8": "fp8",
    "auto": "int8",
    "autoall": "int8",
    "autofp8": "fp8",
}
SEARCHED = ("auto", "autoall", "autofp8")  # the others quantize every layer that can be


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How an 8-bit precision is made, and what it has to keep.

    `method` finds the ranges of activations, by default as for the map, or mse. `min_cosine` is the least over golden
    samples and held-out inputs, by default that of CONTRACTS; `max_recall_drop` is in points of R@1, on pairs.
    `precision_map` takes the place of a search. `quantize_attention` quantizes the products inside attention too.
    Raises InputError for what cannot be.
    """

    method: str | None = None
    min_cosine: float | None = None
    max_recall_drop: float | None = None
    precision_map: PrecisionMap | None = None
    quantize_attention: bool = False
    allow_below_contract: bool = False
    allow_slower: bool = False

    def __post_init__(self) -> None:
        given, known = self.precision_map, (*QUANTIZED, CPU_INT8)
        if given is not None and given.precision not in known:
            message = f"the precision map is of {given.precision!r}, which is no 8-bit precision"
            raise InputError(message, hint=f"give the map of one of: {', '.join(known)}")
        if self.ranges_by not in METHODS:
            named = "" if self.method is not None else ", which the precision map names"
            hint = f"choose one of: {', '.join(METHODS)}"
            raise InputError(f"there is no calibration method {self.ranges_by!r}{named}", hint=hint)
        if self.min_cosine is not None and not 0 < self.min_cosine <= 1:
            raise InputError(
                f"expected a min cosine above 0 and up to 1, found {self.min_cosine}", hint="0.99 is usual"
            )
        if self.max_recall_drop is not None and not 0 <= self.max_recall_drop <= 100:
            raise InputError(f"expected a recall drop in points, 0 to 100, found {self.max_recall_drop}")

    def require(self, precision: str) -> None:
        """Raise InputError where `precision` cannot be made like this, whatever the bundle: before minutes of work."""
        if precision == CPU_INT8 and self.attention:
            message = f"{CPU_INT8} keeps the products inside attention in fp32, and 8 bits were asked for"
            hint = "leave out --quantize-attention" if self.quantize_attention else "give a map without attention"
            raise InputError(message, hint=hint)
        if precision in QUANTIZED and self.precision_map is None:
            require_method(self.ranges_by, FORMATS[QUANTIZED[precision]])

    @property
    def attention(self) -> bool:
        """Whether the products inside attention are quantized: it was asked for, or the map says so."""
        return self.quantize_attention or (self.precision_map is not None and self.precision_map.attention)

    @property
    def digest(self) -> str:
        """Stands for all that was asked for but `allow_slower`, which is about plans; in hex."""
        asked = {**dataclasses.asdict(self), "method": self.ranges_by, "allow_slower": None}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def ranges_by(self) -> str:
        """The method that was asked for, that of the map, or the default: one of scales.METHODS."""
        usual = METHODS[0] if self.precision_map is None else self.precision_map.method
        return usual if self.method is None else self.method
