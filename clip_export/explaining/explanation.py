"""What `explain` found, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from clip_export.spec import Tower

__all__ = ["Cause", "Explanation", "Layer", "LayerRanges", "Stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One place of a tower, by the name of its module: variant against reference.

    `cosine` is the least over positions, `max_abs` the largest difference, `error` the largest difference of a
    position's vector relative to the length of the reference's, all of them as the variant runs from its own input on.
    `own_error` is that error where the stage was given what the reference gave to it: what happened here alone.
    """

    name: str
    cosine: float
    max_abs: float
    error: float
    own_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the layer's own error is allowed. One that is not a number is not."""
        return self.own_error <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the walk.

    Before the graphs (cleaning, ids, pixels) values have to be equal: `differing` is the share of those that are not,
    `detail` the first of them, and there are no layers. A stage of a graph has its `layers` in the order of
    computation; the last one is what it hands on.
    """

    name: str
    layers: tuple[Layer, ...] = ()
    differing: float = 0.0
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether values are equal, and no layer errs by more than its tolerance."""
        return self.differing == 0 and all(layer.passed for layer in self.layers)

    @property
    def blamed(self) -> Layer | None:
        """The first layer over its tolerance; where there is none, the one with the largest own error."""
        over = next((layer for layer in self.layers if not layer.passed), None)
        return over or max(self.layers, key=lambda layer: layer.own_error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        blamed = self.blamed
        return {
            "name": self.name,
            "passed": self.passed,
            "differing": self.differing,
            "detail": self.detail,
            "blamed": None if blamed is None else blamed.name,
            "layers": [{**dataclasses.asdict(layer), "passed": layer.passed} for layer in self.layers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRanges:
    """What a layer reads and gives on this input, as largest absolute values in the variant.

    `typical_input` is the median channel's; both are NaN where ids or pixels are read. `held` is the most that its
    8-bit scale, or else its type, holds: None for fp32. `step` is what one step of an 8-bit scale is worth; `clipped`
    the share of the input that lies beyond `held`, and `lost` what that takes from the vector of the position that it
    hits hardest, relative to its length.
    """

    layer: str
    input: float
    typical_input: float
    output: float
    held: float | None = None
    step: float | None = None
    clipped: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a layer parts: `name` for programs, what was `found` and what to do about it for people."""

    name: str
    found: str
    suggestion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A walk through one tower of a bundle on one input.

    `variant` and `reference` say in words what was compared. `end_cosine` is the cosine of what the tower gives in the
    end, `required_cosine` what the contract asks for. `cause` is of the first stage that parts, or of the largest
    contribution where none does and the end is below the contract; `ranges` are of its layer. `notes` say what was not
    looked at.
    """

    bundle: str
    tower: Tower
    input: str
    precision: str
    variant: str
    reference: str
    stages: tuple[Stage, ...]
    end_cosine: float
    required_cosine: float
    cause: Cause | None = None
    ranges: LayerRanges | None = None
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Stage | None:
        """The first stage at which variant and reference part by more than is allowed; None where they do not."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether no stage parts and the end keeps the contract."""
        return self.first is None and self.end_cosine >= self.required_cosine

    @property
    def sentences(self) -> tuple[str, ...]:
        """The verdict in two or three sentences."""
        return (self._verdict(), *(() if self.cause is None else (self.cause.found, self.cause.suggestion)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        first = self.first
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {
            "stages": [stage.to_dict() for stage in self.stages],
            "cause": None if self.cause is None else dataclasses.asdict(self.cause),
            "ranges": None if self.ranges is None else dataclasses.asdict(self.ranges),
            "notes": list(self.notes),
            "first": None if first is None else first.name,
            "sentences": list(self.sentences),
            "passed": self.passed,
        }

    def _verdict(self) -> str:
        first = self.first
        if first is not None and first.blamed is not None:
            layer = first.blamed
            return (
                f"They part at {first.name}, in {layer.name}: its own relative error is {layer.own_error:.2g}, "
                f"allowed is {layer.tolerance:.2g}."
            )
        if first is not None:
            return f"They part at {first.name}, before the graph: {first.detail}."
        end = f"the cosine at the end is {self.end_cosine:.7f}, required is {self.required_cosine:.7g}"
        if self.passed:
            return f"They do not part: no stage errs by more than its tolerance, and {end}."
        return f"No single stage is to blame, but errors add up: {end}."
