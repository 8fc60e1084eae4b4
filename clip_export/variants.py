"""Other precisions of a bundle's graphs: ranges measured on real inputs, the pass, and what stayed fp32 and why.

`fp16` and `bf16` keep whatever the type cannot hold in fp32. `fp16all` is for chips whose compiler has no fp32 matrix
product (sm_75 in TensorRT-RTX): all of it in fp16, and an error where that would overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_export.bundle import Bundle, Graph
from clip_export.errors import InputError
from clip_export.inputs import find_images, read_lines
from clip_export.progress import Progress
from clip_export.runtime import front
from clip_export.spec import Tower
from clip_export.verification import CONTRACTS

PRECISIONS = tuple(CONTRACTS)
# What follows the blocks costs next to nothing, and its rounding would be that of the embedding itself.
KEPT_FP32 = ("final_norm", "post_norm", "projection")

_BATCH = 8
Feeds = dict[str, np.ndarray]


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
            feeds=list(_golden_feeds(bundle, tower)),
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
    yield from _golden_feeds(bundle, tower)
    if tower == "text" and texts is not None:
        yield from _text_feeds(bundle, texts)
    if tower == "image" and pictures:
        yield from _image_feeds(bundle, pictures)


def _golden_feeds(bundle: Bundle, tower: Tower) -> Iterator[Feeds]:
    golden = bundle.golden()
    if tower == "text":
        assert golden.text is not None
        yield from _batches({"input_ids": golden.text.input_ids, "eot_index": golden.text.eot_index})
    else:
        assert golden.image is not None
        yield from _batches({"pixels": golden.image.pixels})


def _text_feeds(bundle: Bundle, path: Path) -> Iterator[Feeds]:
    tokenizer, _ = front(bundle.spec, bundle.tokenizer_json())
    assert tokenizer is not None
    try:
        with path.open("rb") as file:
            texts = [_text(path, number, line) for number, line in enumerate(read_lines(file), start=1)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    if not texts:
        raise InputError(f"expected texts in {path}, found none", hint="one text a line, UTF-8")
    tokens = tokenizer(texts, truncate=True)
    yield from _batches({"input_ids": tokens.input_ids, "eot_index": tokens.eot_index})


def _text(path: Path, number: int, line: str | Exception) -> str:
    if isinstance(line, str):
        return line
    raise InputError(f"{path}, line {number}: {line}") from line


def _image_feeds(bundle: Bundle, paths: Sequence[Path]) -> Iterator[Feeds]:
    _, preprocessor = front(bundle.spec, None if bundle.spec.text is None else bundle.tokenizer_json())
    assert preprocessor is not None
    files = find_images(paths).files
    for start in range(0, len(files), _BATCH):
        yield {"pixels": preprocessor(files[start : start + _BATCH], first_index=start)}


def _batches(feeds: Mapping[str, np.ndarray]) -> Iterator[Feeds]:
    count = len(next(iter(feeds.values())))
    for start in range(0, count, _BATCH):
        yield {name: array[start : start + _BATCH] for name, array in feeds.items()}
