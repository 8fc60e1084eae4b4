"""What contestants of benchmarks/quantization.py get: a bundle, inputs to calibrate on, and others to be judged by.

demo      rendered scenes that its training never saw, with captions: 512 to calibrate on, 512 others to judge by, which
          differ in what the demo can tell apart. To captions that differ in size or position alone it gives embeddings
          within 1e-7 of each other, so that any rounding decides which one is nearer, fp16's too
vit-b-32  half of them crops of real photographs, no photograph on both sides, the rest scenes; random weights know no
          right answers, so the texts beside photographs are built-in prompts, and no recall is measured
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import random_checkpoint
from PIL import Image

import clip_export
from clip_export.bundle import Bundle
from clip_export.feeds import BATCH, Data, Samples, gather
from clip_export.prompts import prompts
from clip_export.runtime import front

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from hardened import harden
from pictures import PHOTOGRAPHS
from scenes import Scene, all_scenes, caption, is_held_out, render

NAMES = ("demo", "vit-b-32")
# How many pairs are calibrated on, a part of them held out for choices, and how many others everybody is judged by.
COUNTS = {"demo": (512, 512), "vit-b-32": (96, 64)}
_PIXELS = {"demo": 128, "vit-b-32": 256}  # sides of scenes: more than the model sees, so that there is some resizing

_Pair: TypeAlias = tuple[Image.Image, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bundle, with what is calibrated on and what is judged by; `paired`: its captions are worth a recall."""

    bundle: Bundle
    calibration: Data
    evaluation: Data
    paired: bool


def make_case(name: str, work: Path, *, hardened: bool, draw: int = 0) -> Case:
    """Export checkpoint `name` into `work` and write its pairs beside it: the same every time, others each `draw`."""
    bundle = _bundle(name, work, hardened=hardened)
    given, judged = _write_pairs(name, work, draw)
    calibration, evaluation = (gather(bundle, [folder], None) for folder in (given, judged))
    towers = {tower: _all(samples, held_out=True) for tower, samples in evaluation.towers.items()}
    return Case(
        bundle=bundle,
        calibration=calibration,
        evaluation=dataclasses.replace(evaluation, towers=towers),
        paired=name == "demo",
    )


def everything(samples: Samples) -> dict[str, np.ndarray]:
    """All inputs of `samples` in one array for each input of the graph; texts with padding to the longest."""
    bundle, everyone = samples.bundle, _all(samples, held_out=False)
    if samples.tower == "image":
        batches = list(everyone.calibration())
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    tokenizer, _ = front(bundle.spec, bundle.tokenizer_json())
    assert tokenizer is not None
    tokens = tokenizer([str(item) for item in everyone.items], truncate=True)
    longest = int(tokens.eot_index.max()) + 1
    return {"input_ids": np.ascontiguousarray(tokens.input_ids[:, :longest]), "eot_index": tokens.eot_index}


def describe(case: Case) -> dict[str, Any]:
    """How many inputs there are of each kind, JSON-ready."""
    samples = case.calibration.towers["image"]
    return {
        "calibrated_on": samples.count,
        "held_out_for_choices": len(samples.items) - samples.count,
        "judged_by": len(case.evaluation.towers["image"].items),
        "batch": BATCH,
    }


def _all(samples: Samples, *, held_out: bool) -> Samples:
    return dataclasses.replace(samples, held_out=np.full(len(samples.items), held_out))


def _bundle(name: str, work: Path, *, hardened: bool) -> Bundle:
    checkpoint: Path | str = "demo" if name == "demo" else work / "checkpoint"
    if name != "demo":
        random_checkpoint.make(name, work / "checkpoint", seed=0)
    if hardened:
        source = random_checkpoint.DEMO if name == "demo" else work / "checkpoint"
        checkpoint = harden(source, work / "hardened", "outliers")
    clip_export.build(checkpoint, work / "bundle")
    return Bundle.open(work / "bundle")


def _write_pairs(name: str, work: Path, draw: int) -> tuple[Path, Path]:
    """Two folders of pairs, with no scene and no photograph in both."""
    rng = random.Random(f"quantization {draw}")
    scenes = _scenes(*COUNTS[name], rng)
    names = rng.sample(sorted(PHOTOGRAPHS), len(PHOTOGRAPHS))
    halves = {"calibration": names[::2], "evaluation": names[1::2]}
    for (folder, photographs), chosen in zip(halves.items(), scenes, strict=True):
        pairs = list(_rendered(chosen, _PIXELS[name], rng, draw))
        if name != "demo":
            pairs[::2] = _crops(photographs, len(pairs[::2]), rng)
        _write(work / folder, pairs)
    return work / "calibration", work / "evaluation"


def _scenes(given: int, judged: int, rng: random.Random) -> tuple[list[Scene], list[Scene]]:
    """Scenes to calibrate on, and others to judge by, no two of which are alike in all that the demo heeds."""
    pool = [scene for scene in all_scenes() if is_held_out(scene)]
    rng.shuffle(pool)
    distinct = {(scene.count, scene.colour, scene.shape, scene.background): scene for scene in pool}
    chosen = list(distinct.values())[:judged]
    taken = set(chosen)
    return [scene for scene in pool if scene not in taken][:given], chosen


def _rendered(scenes: Sequence[Scene], pixels: int, rng: random.Random, draw: int) -> Iterator[_Pair]:
    for scene in scenes:
        yield render(scene, draw, pixels, oversample=2), caption(scene, rng)


def _crops(names: Sequence[str], count: int, rng: random.Random) -> Iterator[_Pair]:
    """Squares from anywhere in photographs that take turns, a third to all of the shorter side, beside prompts."""
    texts = rng.sample(list(prompts()), count)
    for name, text in zip(cycle(names), texts, strict=False):
        with Image.open(PHOTOGRAPHS[name]) as image:
            photograph = image.convert("RGB")
        side = rng.randint(min(photograph.size) // 3, min(photograph.size))
        left, top = (rng.randint(0, length - side) for length in photograph.size)
        yield photograph.crop((left, top, left + side, top + side)), text


def _write(folder: Path, pairs: Sequence[_Pair]) -> None:
    folder.mkdir()
    lines = []
    for number, (image, text) in enumerate(pairs):
        image.save(folder / f"{number:04}.png")
        lines.append(json.dumps({"file": f"{number:04}.png", "caption": text}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
