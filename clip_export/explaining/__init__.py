"""Where a variant of a bundle and its reference part: stage by stage, on one text or one picture.

    stages       the places of a tower that are looked at, by the names of its modules, and where a graph has them
    tapping      a graph with those places as outputs, and as inputs: what a stage makes of what another graph made
    measuring    how far two tensors are apart, and the table of what is allowed
    fronts       what comes before the graphs: cleaning, token ids, pixels
    original     the checkpoint's torch towers, looked at in the same places
    layers       what one layer holds: its weights, its scale, the range of what it reads
    smoothing    what 8 bits divided and multiplied, taken back before anything is compared
    causes       hypotheses about the first layer that parts, each tested with numbers
    explanation  the result
    walking      the flow

Polygraphy's comparison is not used here. It runs two runners on one feed and compares outputs of the same name; this
needs the roundings of a half graph on a CPU, stages that are given the reference's input, torch modules beside the
nodes of a graph, and smoothing taken back. It serves for what an engine gives: `clip-export verify --polygraphy`.
"""

from __future__ import annotations

from clip_export.explaining.explanation import Cause, Explanation, Layer, LayerRanges, Stage
from clip_export.explaining.measuring import TOLERANCES
from clip_export.explaining.walking import explain

__all__ = ["TOLERANCES", "Cause", "Explanation", "Layer", "LayerRanges", "Stage", "explain"]
