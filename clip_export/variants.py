"""The half precisions of a bundle's graphs: ranges measured on real inputs, the pass, and what stayed fp32 and why.

`fp16` and `bf16` keep whatever the type cannot hold in fp32. `fp16all` is for chips whose compiler has no fp32 matrix
product (sm_75 in TensorRT-RTX): all of it in fp16, and an error where that would overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_export.bundle import Bundle, Graph
from clip_export.feeds import Feeds, golden_feeds, image_feeds, read_texts, text_feeds
from clip_export.inputs import find_images
from clip_export.progress import Progress
from clip_export.spec import Tower
from clip_export.verification import CONTRACTS

# What follows the blocks costs next to nothing, and its rounding would be that of the embedding itself.
KEPT_FP32 = ("final_norm", "post_norm", "projection")


def make_variant(
    bundle: Bundle,
    staging: Path,
    precision: str,
    *,
    calibration: Sequence[Path] = (),
    calibration_texts: Path | None = None,
    progress: Progress,
) -> tuple[dict[Tower, Graph], dict[str, Any]]:
    """Write the `precision` graphs of `bundle` into `staging`; returns them with a JSON-ready report by tower.

    Ranges are measured on the golden samples and on the pictures and texts given. Raises InputError, ExportError.
    """
    from clip_export.precision.ranges import measure
    from clip_export.precision.refine import refine

    graphs: dict[Tower, Graph] = {}
    report: dict[str, Any] = {}
    for tower in bundle.spec.towers:
        source = bundle.graph(tower)
        ranges = measure(
            bundle.graph_path(tower), _feeds(bundle, tower, calibration, calibration_texts), progress=progress
        )
        name = f"{tower}.{precision}.onnx"
        everything = precision.endswith("all")
        made = refine(
            bundle.graph_path(tower),
            staging / name,
            precision=precision.removesuffix("all"),
            ranges=ranges,
            feeds=list(golden_feeds(bundle, tower)),
            required=CONTRACTS[precision],
            keep=() if everything else KEPT_FP32,
            everything=everything,
            progress=progress,
        )
        graphs[tower] = Graph(
            file=name,
            opset=source.opset,
            inputs=source.inputs,
            outputs=source.outputs,
            sequence_dynamic=source.sequence_dynamic,
        )
        report[tower] = made.to_dict()
    return graphs, report


def _feeds(bundle: Bundle, tower: Tower, pictures: Sequence[Path], texts: Path | None) -> Iterator[Feeds]:
    yield from golden_feeds(bundle, tower)
    if tower == "text" and texts is not None:
        yield from text_feeds(bundle, read_texts(texts))
    if tower == "image" and pictures:
        yield from image_feeds(bundle, find_images(pictures).files)
