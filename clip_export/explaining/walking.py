"""The flow: what comes before the graph, the graph's stages freely and each from the reference's input, and a cause."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from clip_export.bundle import Bundle
from clip_export.choice import FP32
from clip_export.context_inputs import complete_feeds
from clip_export.cosine import cosines
from clip_export.errors import BundleError, InputError
from clip_export.explaining.causes import Evidence, find_cause
from clip_export.explaining.explanation import Cause, Explanation, LayerRanges, Stage
from clip_export.explaining.fronts import Front, TextSide, image_front, text_front
from clip_export.explaining.layers import ranges, weights
from clip_export.explaining.measuring import TOLERANCES, measured
from clip_export.explaining.smoothing import find_smoothing
from clip_export.explaining.stages import Place, places
from clip_export.explaining.tapping import AS_THEY_ARE, Values, run_tapped, runnable
from clip_export.images import ImageInput
from clip_export.precision.ranges import Feeds
from clip_export.simulation import simulation_lacks
from clip_export.spec import Tower
from clip_export.verification import required_cosine

if TYPE_CHECKING:
    import onnx_ir as ir

    from clip_export.explaining.original import Original

__all__ = ["explain"]


class Reference(Protocol):
    """What a variant is compared with: the fp32 graph of the bundle, or the checkpoint in torch."""

    @property
    def name(self) -> str: ...

    def values(self, places: Sequence[Place], feeds: Feeds) -> Values:
        """What it holds in `places`, float32 by layer, on `feeds`."""
        ...

    def weights(self, module: str) -> dict[str, np.ndarray]:
        """The numbers of `module`, float32 by role as in torch."""
        ...


def explain(
    path: str | os.PathLike[str] | Bundle,
    *,
    text: str | None = None,
    image: ImageInput | None = None,
    precision: str | None = None,
    against: str | None = None,
) -> Explanation:
    """Walk one text or one picture through `precision` of the bundle at `path` and its reference, side by side.

    The reference is the fp32 graph of the bundle, or with `against` the checkpoint of that name in float32 torch. By
    default `precision` is fp32 with `against`, and without it the only other one that the bundle has.

    Raises InputError, BundleError; MissingDependencyError without onnx-ir or onnxruntime; CheckpointError for a
    checkpoint that is not this bundle's. That they part is in the result, not an error.
    """
    if (text is None) == (image is None):
        raise InputError("expected one text or one picture", hint="give --text or --image, one of them")
    lacks = simulation_lacks()
    if lacks is not None:
        raise lacks
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    tower: Tower = "image" if text is None else "text"
    if tower not in bundle.spec.towers:
        raise BundleError(f"{bundle.path} has no {tower} tower", hint=f"it has: {', '.join(bundle.spec.towers)}")
    chosen = _precision(bundle, precision, against)
    bundle.graph(tower, chosen)  # raises where there is none
    original = None
    if against is not None:
        from clip_export.explaining.original import open_original

        original = open_original(against, bundle, tower)
    front = _front(bundle, text, image, original)
    return _Walk(bundle, tower, chosen, front, original).explanation(_shown(text, image))


def _precision(bundle: Bundle, precision: str | None, against: str | None) -> str:
    """Which one is explained. Raises InputError where nothing says, or where it would be compared with itself."""
    others = [name for name in bundle.manifest.variants if name != FP32]
    if precision is None and against is None and len(others) != 1:
        held = ", ".join(others) or "none beside fp32, which is the reference"
        choose = "choose one with --precision" if others else "add one: clip-export build BUNDLE --precision fp16"
        hint = f"{choose}; or compare fp32 with its checkpoint: --against CHECKPOINT"
        raise InputError(f"expected a precision to explain, the bundle has {held}", hint=hint)
    chosen = precision or (others[0] if against is None else FP32)
    if chosen == FP32 and against is None:
        raise InputError("fp32 is the reference itself", hint="compare it with its checkpoint: --against CHECKPOINT")
    return chosen


def _front(bundle: Bundle, text: str | None, image: ImageInput | None, original: Original | None) -> Front:
    source = None if original is None else original.checkpoint
    if text is not None:
        if source is None:
            return text_front(bundle, text, None)
        assert source.spec.tokenizer is not None and source.tokenizer_json is not None
        return text_front(bundle, text, TextSide(spec=source.spec.tokenizer, tokenizer_json=source.tokenizer_json))
    assert image is not None
    return image_front(bundle, image, None if source is None else source.spec.preprocess)


def _shown(text: str | None, image: ImageInput | None) -> str:
    if text is not None:
        return text
    return os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else "a picture"


@dataclass(frozen=True, slots=True)
class _Plain:
    """The fp32 graph of the bundle as a reference."""

    path: Path
    graph: ir.Graph
    name: str = "the fp32 graph of the bundle"

    def values(self, places: Sequence[Place], feeds: Feeds) -> Values:
        return run_tapped(self.path, places, feeds)

    def weights(self, module: str) -> dict[str, np.ndarray]:
        return weights(self.graph, module)


class _Walk:
    """One tower on one input: what both sides hold in every place."""

    def __init__(self, bundle: Bundle, tower: Tower, precision: str, front: Front, original: Original | None) -> None:
        import onnx_ir

        self._bundle, self._tower, self._precision = bundle, tower, precision
        self._front, self._original = front, original
        path, plain_path = bundle.graph_path(tower, precision), bundle.graph_path(tower)
        self._graph, self._plain = onnx_ir.load(path).graph, onnx_ir.load(plain_path).graph
        self._places = places(self._plain, tower)
        self._smoothing = find_smoothing(self._graph, self._plain, self._places, tower)
        self._reference: Reference = original or _Plain(plain_path, self._plain)
        found, expected = _feeds(bundle, tower, front)
        self._expected = self._reference.values(self._places, expected)
        with runnable(path, precision) as graph:
            self._raw = run_tapped(graph, self._places, expected, self._expected)
            self._own = self._smoothing.undone(self._raw)
            self._free = self._smoothing.undone(run_tapped(graph, self._places, found))

    def explanation(self, shown: str) -> Explanation:
        """All that was found, and the cause of the first stage that parts."""
        graph_stages = self._stages()
        stages = (*self._front.stages, *graph_stages)
        first = next((stage for stage in stages if not stage.passed), None)
        end = self._places[-1].layer
        cosine = float(np.min(cosines(self._free[end], self._expected[end])))
        required = required_cosine(self._bundle, self._precision)
        worst = first if first in graph_stages else max(graph_stages, key=_own_error)
        assert worst is not None and worst.blamed is not None
        layer = worst.blamed.name
        held = ranges(layer, self._raw, self._places, self._tower, self._graph)
        cause = self._front.cause
        if cause is None and (worst is first or (first is None and not cosine >= required)):
            cause = self._cause(layer, held)
        simulated = "" if self._precision in AS_THEY_ARE else ", simulated on the CPU rounding by rounding"
        return Explanation(
            bundle=self._bundle.name,
            tower=self._tower,
            input=shown,
            precision=self._precision,
            variant=f"{self._precision}{simulated}",
            reference=self._reference.name,
            stages=stages,
            end_cosine=cosine,
            required_cosine=required,
            cause=cause,
            ranges=held,
            notes=self._notes(),
        )

    def _stages(self) -> list[Stage]:
        names = dict.fromkeys(place.stage for place in self._places)
        return [
            Stage(
                name=name,
                layers=tuple(
                    measured(
                        place.layer,
                        self._free[place.layer],
                        self._own[place.layer],
                        self._expected[place.layer],
                        tolerance=TOLERANCES[self._precision],
                    )
                    for place in self._places
                    if place.stage == name
                ),
            )
            for name in names
        ]

    def _cause(self, layer: str, held: LayerRanges) -> Cause:
        place = next(place for place in self._places if place.layer == layer)
        module = layer if place.before else place.module
        spec = self._bundle.spec.text if self._tower == "text" else self._bundle.spec.image
        assert spec is not None
        return find_cause(
            Evidence(
                layer=layer,
                precision=self._precision,
                found=self._own,
                expected=self._expected,
                weights=weights(self._graph, module),
                reference_weights=self._smoothing.done(layer, self._reference.weights(module)),
                ranges=held,
                heads=spec.transformer.heads,
            )
        )

    def _notes(self) -> tuple[str, ...]:
        if self._original is None:
            return ("ids and pixels are compared with the golden samples of the bundle: --against compares this input",)
        return tuple(f"the checkpoint says {words}" for words in self._original.differs)


def _own_error(stage: Stage) -> float:
    return max((layer.own_error for layer in stage.layers), default=0.0)


def _feeds(bundle: Bundle, tower: Tower, front: Front) -> tuple[Feeds, Feeds]:
    """What the front gives to both sides. No text position after both ends is read, so none of them is looked at."""
    if tower == "image" or not bundle.graph(tower).sequence_dynamic:
        return front.found, front.expected
    length = 1 + max(int(feeds["eot_index"].max()) for feeds in (front.found, front.expected))
    first, second = ({**feeds, "input_ids": feeds["input_ids"][:, :length]} for feeds in (front.found, front.expected))
    text = bundle.spec.text
    if bundle.spec.context is None or text is None:
        return first, second
    return complete_feeds(first, text), complete_feeds(second, text)
