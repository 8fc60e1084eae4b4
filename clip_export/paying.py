"""Whether a precision pays: a bundle's towers in it, timed against what they would replace, on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clip_export.bundle import Bundle
from clip_export.choice import Choice
from clip_export.encoder import Encoder
from clip_export.runtime import open_choice
from clip_export.spec import Tower
from clip_export.speed import Ratio, compare_speed, require_faster
from clip_export.tokenizer import Tokens

CPU_BATCHES = (1, 8)


def require_paid(bundle: Bundle, candidate: Choice, baseline: Choice, batches: Sequence[int]) -> dict[str, Any]:
    """Time each tower of `candidate` against `baseline` at `batches`; returns what was measured, JSON-ready.

    Inputs are golden samples, on the host for both. Raises SpeedError, with the figures, unless it is faster at every
    batch; and as `load` does.
    """
    measured = _compare(bundle, candidate, baseline, batches)
    for tower, ratios in measured.items():
        require_faster(ratios, candidate=_named(candidate, tower), baseline=_named(baseline, tower))
    return {
        tower: {str(batch): dataclasses.asdict(ratio) for batch, ratio in ratios.items()}
        for tower, ratios in measured.items()
    }


def _compare(
    bundle: Bundle, candidate: Choice, baseline: Choice, batches: Sequence[int]
) -> dict[Tower, dict[int, Ratio]]:
    with open_choice(bundle, baseline) as old, open_choice(bundle, candidate) as new:
        return {
            tower: {
                batch: compare_speed(_call(bundle, old, tower, batch), _call(bundle, new, tower, batch))
                for batch in batches
            }
            for tower in new.towers
        }


def _call(bundle: Bundle, encoder: Encoder, tower: Tower, batch: int) -> Callable[[], object]:
    """One batch of golden samples, repeated as often as it takes, through `tower`; done when its outputs are there."""
    golden = bundle.golden()
    if tower == "text":
        assert golden.text is not None
        rows = np.arange(batch) % len(golden.text.input_ids)
        tokens = Tokens(input_ids=golden.text.input_ids[rows], eot_index=golden.text.eot_index[rows])
        return lambda: encoder.token_outputs(tokens)
    assert golden.image is not None
    pixels = golden.image.pixels[np.arange(batch) % len(golden.image.pixels)]
    return lambda: encoder.pixel_outputs(pixels)


def _named(choice: Choice, tower: Tower) -> str:
    return f"the {choice.precision} {tower} tower on {choice.title}"
