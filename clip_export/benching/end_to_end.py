"""Where the time goes from files and strings to embeddings, stage by stage, on the user's own inputs.

    read        the file's bytes              tokenize    strings to token ids
    decode      bytes to a picture
    resize      to the tower's pixels, crop and RGB with it
    copy        pictures into one batch; on a GPU also the embeddings back
    compute     the tower
    normalise   to length 1

Stages are timed one after the other, so that their times add up: preparing in one thread, computing as the engine does.
`whole` is what the runtime makes of them, with all cores: `encode_image` and `encode_text` on the same inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from clip_export.benching.entrants import Engines
from clip_export.benching.machine import cpus
from clip_export.bundle import Bundle
from clip_export.cosine import unit_rows
from clip_export.encoder import Encoder
from clip_export.errors import ImageError, InputError
from clip_export.images import open_image
from clip_export.inputs import find_images
from clip_export.pairs import find_pairs, spread
from clip_export.preprocess import Preprocessor
from clip_export.progress import Progress, silent
from clip_export.spec import Tower

T = TypeVar("T")

MOST = 512  # inputs of each tower: enough for medians, whatever the folder holds
_LEAST_ROUNDS = 5
_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEnd:
    """One tower on the user's inputs. Times are seconds an input, medians over batches of `batch`.

    `stages` are in the order in which an input passes them; `whole` is one after the other through the Encoder, which
    decodes with `threads`. `picture_pixels` is the median of width x height, `tower_pixels` what the tower sees of it;
    None for texts. `overlaps`: preparing and computing do not share processors, since a GPU computes.
    """

    tower: Tower
    inputs: int
    batch: int
    stages: Mapping[str, float]
    whole: float
    threads: int
    overlaps: bool
    picture_pixels: int | None = None
    tower_pixels: int | None = None

    @property
    def total(self) -> float:
        """Of all stages, in seconds an input."""
        return sum(self.stages.values())

    @property
    def shares(self) -> dict[str, float]:
        """Each stage's part of `total`."""
        return {stage: seconds / self.total for stage, seconds in self.stages.items()}

    @property
    def binds(self) -> str:
        """The stage that a gain has to come from: the longest, of the slower side where both overlap."""
        slower = max(self._sides, key=lambda side: sum(side.values()))
        return max(slower, key=lambda stage: slower[stage])

    @property
    def gain(self) -> float:
        """How many times as fast it could be at most, if the stage that binds took no time (Amdahl's law)."""
        now = max(sum(side.values()) for side in self._sides)
        rest = max(sum(side.values()) - side.get(self.binds, 0.0) for side in self._sides)
        return now / rest if rest > 0 else math.inf

    @property
    def _sides(self) -> list[dict[str, float]]:
        """Seconds an input of what is done one after the other: preparing pictures is shared by `threads`."""
        spent = {
            stage: seconds / self.threads if stage in SHARED else seconds for stage, seconds in self.stages.items()
        }
        if not self.overlaps:
            return [spent]
        front = {stage: seconds for stage, seconds in spent.items() if stage in (*SHARED, "tokenize")}
        return [front, {stage: seconds for stage, seconds in spent.items() if stage not in front}]


SHARED = ("read", "decode", "resize")  # among the threads of a Preprocessor


class Stopwatch:
    """Seconds by stage, a list each: one entry a lap."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.laps: dict[str, list[float]] = {}
        self._clock = clock

    def __call__(self, stage: str, work: Callable[[], T]) -> T:
        """Do `work` and add its time to `stage`."""
        start = self._clock()
        result = work()
        self.laps.setdefault(stage, []).append(self._clock() - start)
        return result

    def medians(self, inputs: int) -> dict[str, float]:
        """Seconds an input of each stage, where a lap takes `inputs`."""
        return {stage: float(np.median(laps)) / inputs for stage, laps in self.laps.items()}


def inputs_of(folder: Path, towers: Sequence[Tower]) -> dict[Tower, Sequence[Path] | Sequence[str]]:
    """The pictures in `folder`, and its captions where it has captions.csv or captions.jsonl; at most MOST of each.

    Raises InputError where there is nothing for any of `towers`, ImageError for a folder without pictures.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory", hint="--end-to-end takes a folder with pictures")
    pairs = find_pairs(folder)
    found: dict[Tower, Sequence[Path] | Sequence[str]] = {}
    if "image" in towers:
        files = find_images([folder]).files if pairs is None else tuple(dict.fromkeys(pairs.files))
        found["image"] = [files[place] for place in spread(len(files), MOST)]
    if "text" in towers and pairs is not None:
        found["text"] = [pairs.captions[place] for place in spread(len(pairs.captions), MOST)]
    if not found:
        raise InputError(f"{folder} has no captions.csv or captions.jsonl, and the bundle no image tower")
    return found


def measure(
    bundle: Bundle, engines: Engines, folder: Path, batch: int, *, progress: Progress = silent
) -> list[EndToEnd]:
    """Each tower of `bundle` that `folder` has inputs for, in batches of `batch` or of all there are, if fewer.

    Raises InputError, or ImageError naming a picture that cannot be decoded.
    """
    found = []
    lacking = [tower for tower in engines.encoder.towers if "embedding" not in bundle.graph(tower).outputs]
    if lacking:
        raise InputError(f"the {lacking[0]} graph of {bundle.name} gives no embedding", hint="leave out --end-to-end")
    for tower, inputs in inputs_of(folder, engines.encoder.towers).items():
        progress(f"{tower}s from files and strings", 0, 0)
        size = min(batch, len(inputs))
        run = _images if tower == "image" else _texts
        found.append(run(bundle, engines, list(inputs)[: len(inputs) // size * size], size))
    return found


def _images(bundle: Bundle, engines: Engines, files: list[Any], size: int) -> EndToEnd:
    assert bundle.spec.preprocess is not None
    encoder, preprocess, watch = engines.encoder, Preprocessor(bundle.spec.preprocess), Stopwatch()
    areas: dict[Path, int] = {}

    def lap(chunk: Sequence[Path]) -> None:
        data = watch("read", lambda: [path.read_bytes() for path in chunk])
        pictures = watch("decode", lambda: [_decoded(path, item) for path, item in zip(chunk, data, strict=True)])
        areas.update((path, picture.width * picture.height) for path, picture in zip(chunk, pictures, strict=True))
        prepared = watch("resize", lambda: [preprocess.one(picture) for picture in pictures])
        pixels = watch("copy", lambda: np.stack(prepared))
        _compute(engines, watch, lambda: encoder.encode_pixels(pixels, normalize=False), pixels)

    whole = _laps(files, size, lap, encoder.encode_image)
    return EndToEnd(
        tower="image",
        inputs=len(files),
        batch=size,
        stages=watch.medians(size),
        whole=whole / size,
        threads=cpus(),
        overlaps=engines.device != "cpu",
        picture_pixels=int(np.median(list(areas.values()))),
        tower_pixels=bundle.spec.preprocess.crop_size**2,
    )


def _decoded(path: Path, data: bytes) -> Image.Image:
    try:
        return open_image(data)
    except ImageError as error:
        raise ImageError(f"{path}: {error.message}", hint=error.hint) from error


def _texts(bundle: Bundle, engines: Engines, texts: list[Any], size: int) -> EndToEnd:
    encoder, watch = engines.encoder, Stopwatch()
    assert encoder._tokenizer is not None
    tokenize = encoder._tokenizer

    def lap(chunk: Sequence[str]) -> None:
        tokens = watch("tokenize", lambda: tokenize(chunk, truncate=True))
        embeddings = watch("compute", lambda: encoder.token_outputs(tokens)["embedding"])
        watch("normalise", lambda: unit_rows(embeddings))

    whole = _laps(texts, size, lap, lambda chunk: encoder.encode_text(chunk, truncate=True))
    return EndToEnd(
        tower="text",
        inputs=len(texts),
        batch=size,
        stages=watch.medians(size),
        whole=whole / size,
        threads=cpus(),
        overlaps=engines.device != "cpu",
    )


def _compute(engines: Engines, watch: Stopwatch, on_host: Callable[[], np.ndarray], pixels: np.ndarray) -> None:
    """Compute and normalise; on a GPU what copies the embeddings back is told apart from what computes them."""
    encoder: Encoder = engines.encoder
    if engines.device == "cpu":
        embeddings = watch("compute", on_host)
    else:

        def there() -> Any:
            array = encoder.encode_pixels(pixels, normalize=False, device_output=True)
            array.synchronize()
            return array

        array = watch("compute", there)
        embeddings = watch("copy back", array.numpy)
    watch("normalise", lambda: unit_rows(embeddings))


def _laps(items: list[T], size: int, lap: Callable[[list[T]], object], whole: Callable[[list[T]], object]) -> float:
    """Batch after batch, in turn with `whole`, whose median time is returned.

    Either is first as often, since the second finds files and pictures in the caches.
    """
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    whole(chunks[0])  # not counted, as no lap would be that meets cold code
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _LEAST_ROUNDS or (time.perf_counter() < end and len(seconds) < len(chunks)):
        chunk = chunks[len(seconds) % len(chunks)]
        if len(seconds) % 2:
            lap(chunk)
        start = time.perf_counter()
        whole(chunk)
        seconds.append(time.perf_counter() - start)
        if len(seconds) % 2:
            lap(chunk)
    return float(np.median(seconds))
