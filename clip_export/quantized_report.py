"""What is said of a quantized tower: how each layer is held, what that costs, and which ones are to blame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_export.choice import FP32
from clip_export.feeds import Samples
from clip_export.judging import Outputs
from clip_export.precision.quantize import NEEDS_FP32
from clip_export.precision.search import Found
from clip_export.precision_map import HIGH
from clip_export.quantized_tower import Prepared

_WORST = 5  # layers that an error names


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTower:
    """A quantized tower: the format of each linear layer, its outputs for the reference's inputs, how it was found.

    `worst` are the layers that lose most, in words, where it misses its contract.
    """

    formats: dict[str, str]
    outputs: Outputs
    found: Found
    report: dict[str, Any]
    worst: tuple[str, ...] = ()


def worst_by_score(found: Found) -> tuple[str, ...]:
    """The layers of the mix that lose most alone, the worst first, with their cosines."""
    alone = [(name, score) for name, score in found.sensitivity.items() if name in found.mix]
    ranked = sorted(alone, key=lambda item: -item[1].damage)
    return tuple(f"{name} ({score.cosine:.7f})" for name, score in ranked[:_WORST])


def worst_by_error(prepared: Prepared, found: Found) -> tuple[str, ...]:
    """The layers of the mix whose products are furthest off, the worst first, with the relative squared error."""
    ranked = sorted(found.mix, key=lambda name: -prepared.treatments[name].error)
    return tuple(f"{name} (error {prepared.treatments[name].error:.1e})" for name in ranked[:_WORST])


def layer_formats(prepared: Prepared, mix: Sequence[str]) -> dict[str, str]:
    """int8, fp8, or fp16 of each linear layer, as a precision map has it."""
    return {
        linear.name: prepared.treatments[linear.name].format if linear.name in mix else HIGH
        for linear in prepared.linears
    }


def tower_report(
    samples: Samples, prepared: Prepared, found: Found, refused: Mapping[str, str], *, rest: str = HIGH
) -> dict[str, Any]:
    """JSON-ready: the share of FLOPs, and of each layer how it is held, what that costs, and why it stayed high.

    `rest` is the precision of what is not quantized, but for what half precision could not hold either.
    """
    formats, high = layer_formats(prepared, found.mix), {item.linear: item.why for item in found.high} | dict(refused)
    rests = {name: FP32 for name, why in refused.items() if why == NEEDS_FP32}
    layers = {}
    for name, format_ in formats.items():
        held = rests.get(name, rest) if format_ == HIGH else format_
        layer: dict[str, Any] = {"format": held, "flops": prepared.costs[name]}
        layer["share"] = prepared.costs[name] / prepared.total
        if name in prepared.treatments:
            treatment = prepared.treatments[name]
            layer |= {"smoothing": treatment.strength, "scale": treatment.scale, "error": treatment.error}
        if name in found.sensitivity:
            layer["alone"] = dataclasses.asdict(found.sensitivity[name])
        if format_ == HIGH:
            layer["why"] = high.get(name, "the precision map says so")
        layers[name] = layer
    return {
        "calibrated_on": f"{prepared.calibrated_on} of {samples.source}, {int(samples.held_out.sum())} held out",
        "share": found.share,
        "evaluations": found.evaluations,
        "layers": layers,
    }
