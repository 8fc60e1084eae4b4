"""What a text graph that gives Context takes besides token ids, and what it is fed where nobody says otherwise.

| input | shape | means |
|---|---|---|
| layer | int32 [batch] | whose states are wanted, from the end: 0 is the last block, `layers` the embeddings |
| attention_mask | int32 [batch, sequence] | 0 hides a position from those after it, as compel does; 1 shows it |
| inputs_embeds | float32 [batch, sequence, width] | what stands where input_ids is -1: vectors of textual inversion |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_export.spec import ModelSpec, TextSpec

__all__ = ["CONTEXT_INPUTS", "VECTOR_ID", "complete_feeds", "completed", "sampled_feeds"]

CONTEXT_INPUTS = ("input_ids", "eot_index", "layer", "attention_mask", "inputs_embeds")
VECTOR_ID = -1  # in input_ids: this position takes its vector from inputs_embeds


def complete_feeds(feeds: Mapping[str, np.ndarray], text: TextSpec) -> dict[str, np.ndarray]:
    """`feeds` with what is missing: the last layer, every position visible, no vectors. In the order of the graph."""
    ids = feeds["input_ids"]
    filled = {**feeds}
    if "layer" not in filled:
        filled["layer"] = np.zeros(len(ids), np.int32)
    if "attention_mask" not in filled:
        filled["attention_mask"] = np.ones(ids.shape, np.int32)
    if "inputs_embeds" not in filled:
        filled["inputs_embeds"] = np.zeros((*ids.shape, text.transformer.width), np.float32)
    return {name: filled[name] for name in CONTEXT_INPUTS}


def completed(run: Callable[..., Any], spec: ModelSpec) -> Callable[..., Any]:
    """`run` for whoever knows token ids alone: what else the graph takes is filled in."""
    text = spec.text
    assert text is not None
    return lambda feeds, **options: run(complete_feeds(feeds, text), **options)


def sampled_feeds(feeds: Mapping[str, np.ndarray], spec: ModelSpec, *, first: int = 0) -> dict[str, np.ndarray]:
    """`feeds` that ask for every layer in turn, `first` rows on: those of golden samples, and of calibration."""
    text = spec.text
    assert text is not None
    rows = np.arange(first, first + len(feeds["input_ids"]))
    layer = (rows % (text.transformer.layers + 1)).astype(np.int32)
    return complete_feeds({**feeds, "layer": layer}, text)
