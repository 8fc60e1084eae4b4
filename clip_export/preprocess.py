"""Images -> uint8 pixels, equal to the last bit to what the original's PIL pipeline hands to its normalization.

The dialects differ in what they do first, in where an odd margin goes, and in what becomes of transparency:

    openai, open_clip    resize, crop, then RGB; crop at round((side - crop) / 2); alpha is dropped
    huggingface          RGB first, then resize and crop at (side - crop) // 2; alpha is blended onto white

None of them applies EXIF rotation, and all take the first frame of an animation. docs/preprocess.md has the tables.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps, features

from clip_export.errors import ImageError, InputError
from clip_export.images import BOMB_HINT, ImageInput, describe, open_image, reason
from clip_export.spec import PreprocessSpec

__all__ = [
    "ImageInput",
    "Pixels",
    "Preprocessor",
    "SaturatedImageWarning",
    "as_list",
    "open_image",
    "preprocess_versions",
]

Pixels: TypeAlias = npt.NDArray[np.uint8]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class SaturatedImageWarning(UserWarning):
    """An image holds levels outside 0..255, as 16-bit PNGs do: the originals clip them, so it turns white or black."""


class Preprocessor:
    """What the original does to an image between opening and normalizing it. Holds no state: safe to share by threads.

    >>> preprocess = Preprocessor(spec)
    >>> preprocess(["a.jpg", pil_image, array]).shape
    (3, 3, 224, 224)
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        self.spec = spec

    def __call__(self, images: Sequence[ImageInput], *, threads: int | None = None, first_index: int = 0) -> Pixels:
        """Pixels before normalization, uint8 [n, 3, crop_size, crop_size], RGB, in the order given.

        `threads` decode and resize side by side (Pillow releases the GIL); by default one for each CPU. Raises
        ImageError for the first image that cannot be read, naming its index, counted from `first_index`; `attempt`
        goes on instead. Warns once a call with SaturatedImageWarning.
        """
        items = as_list(images)
        pixels = np.empty((len(items), 3, self.spec.crop_size, self.spec.crop_size), np.uint8)
        saturated = []
        with contextlib.closing(self._outcomes(items, threads, first_index)) as outcomes:
            for index, outcome in enumerate(outcomes):
                if isinstance(outcome, ImageError):
                    raise outcome
                pixels[index] = outcome.pixels
                saturated += [outcome.name] * outcome.saturated
        _warn_if_saturated(saturated)
        return pixels

    def attempt(self, images: Sequence[ImageInput], *, threads: int | None = None) -> list[Pixels | ImageError]:
        """Like calling, but one outcome for each image: its pixels, uint8 [3, crop_size, crop_size], or its error."""
        outcomes = list(self._outcomes(as_list(images), threads))
        _warn_if_saturated([o.name for o in outcomes if isinstance(o, _Prepared) and o.saturated])
        return [outcome.pixels if isinstance(outcome, _Prepared) else outcome for outcome in outcomes]

    def one(self, image: ImageInput) -> Pixels:
        """Pixels of one image, uint8 [3, crop_size, crop_size]. Raises ImageError, warns with SaturatedImageWarning."""
        prepared = _prepare(image, self.spec)
        _warn_if_saturated([prepared.name] * prepared.saturated)
        return prepared.pixels

    def _outcomes(
        self, items: list[ImageInput], threads: int | None, first_index: int = 0
    ) -> Generator[_Prepared | ImageError]:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, found {threads}")
        workers = min(threads or _cpu_count(), len(items))
        if workers <= 1:
            yield from map(self._outcome, itertools.count(first_index), items)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="clip-export-preprocess")
        try:
            yield from pool.map(self._outcome, range(first_index, first_index + len(items)), items)
        finally:
            pool.shutdown(cancel_futures=True)

    def _outcome(self, index: int, item: ImageInput) -> _Prepared | ImageError:
        try:
            return _prepare(item, self.spec)
        except ImageError as error:
            located = ImageError(f"image {index}: {error.message}", hint=error.hint)
            located.__cause__ = error
            return located


def preprocess_versions() -> dict[str, str]:
    """The libraries that decide on pixels, with their versions, for provenance: Pillow and its JPEG codec."""
    jpeg = "libjpeg_turbo" if features.check("libjpeg_turbo") else "jpg"
    return {"pillow": PIL.__version__, jpeg.replace("jpg", "libjpeg"): str(features.version(jpeg))}


@dataclass(frozen=True, slots=True)
class _Prepared:
    name: str
    pixels: Pixels
    saturated: bool


def _prepare(source: ImageInput, spec: PreprocessSpec) -> _Prepared:
    image, name = open_image(source), describe(source)
    try:
        saturated = _saturates(image)
        if spec.dialect == "huggingface":
            image = _crop(_resize(_to_rgb(image, spec), spec, name), spec)
        else:
            image = _to_rgb(_crop(_resize(image, spec, name), spec), spec)
    except (ValueError, OSError, MemoryError) as error:
        raise ImageError(
            f"{name}: the {spec.dialect} pipeline cannot take a {image.mode} image of {image.width} x {image.height}:"
            f" {reason(error)}",
            hint="convert it to RGB with the tool that wrote it",
        ) from error
    return _Prepared(name, np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), saturated)


def _resized_size(width: int, height: int, spec: PreprocessSpec) -> tuple[int, int]:
    """(width, height) after resizing: torchvision's rule for `shortest`, open_clip's for `longest`, both in doubles."""
    target = spec.resize_size
    if spec.resize_mode == "squash":
        return target, target
    if spec.resize_mode == "longest":
        ratio = max(height / target, width / target)
        return round(width / ratio), round(height / ratio)
    long = int(target * max(width, height) / min(width, height))
    return (target, long) if width <= height else (long, target)


def _resize(image: Image.Image, spec: PreprocessSpec, name: str) -> Image.Image:
    size = width, height = _resized_size(*image.size, spec)
    if size == image.size:
        return image
    shape = f"{name}: {image.width} x {image.height} pixels become {width} x {height}"
    if min(size) < 1:
        raise ImageError(f"{shape} when resized to {spec.resize_size}", hint="crop it to a shape that is less extreme")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > max(limit, image.width * image.height):
        raise ImageError(f"{shape} when resized to {spec.resize_size}, over Pillow's limit of {limit}", hint=BOMB_HINT)
    return image.resize(size, _FILTERS[spec.interpolation])


def _crop(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """The centre, padded where the image is smaller. Padding is in the image's own mode, as the originals have it."""
    crop = spec.crop_size
    left, top = (_crop_start(side, crop, spec) for side in image.size)
    if min(image.size) < crop:
        before_x, before_y = max(-left, 0), max(-top, 0)
        after_x = max(crop - image.width - before_x, 0)
        after_y = max(crop - image.height - before_y, 0)
        fill = spec.fill if spec.resize_mode == "longest" else 0
        bands = len(image.getbands())
        image = ImageOps.expand(image, (before_x, before_y, after_x, after_y), (fill,) * bands if bands > 1 else fill)
        left, top = max(left, 0), max(top, 0)
    return image if image.size == (crop, crop) else image.crop((left, top, left + crop, top + crop))


def _crop_start(side: int, crop: int, spec: PreprocessSpec) -> int:
    """Where the crop begins, negative where it begins with padding. Python's round goes to even, as torchvision's."""
    if spec.dialect == "huggingface":
        return (side - crop) // 2
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def _to_rgb(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    transparent = image.info.get("transparency") is not None
    if spec.transparency == "white" and (transparent or "A" in image.getbands()):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    if image.mode == "RGB":
        return image
    if transparent:
        # It does not touch the colours, but Pillow warns that it is lost, or fails to carry it over.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _saturates(image: Image.Image) -> bool:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return False
    low, high = image.convert("I" if image.mode.startswith("I;16") else image.mode).getextrema()
    return not (float(low) >= 0 and float(high) <= 255)  # type: ignore[arg-type]  # not: a NaN counts as outside


def _warn_if_saturated(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{names[0]}{more}: levels outside 0..255 are clipped, as the originals do, so the image is largely white "
            "or black; scale 16-bit images to 8 bits first",
            SaturatedImageWarning,
            stacklevel=3,
        )


def as_list(images: Sequence[ImageInput]) -> list[ImageInput]:
    """`images` as a list. Raises ImageError for a single image: iterating a path or an array would go wrong quietly."""
    one = isinstance(images, (str, bytes, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
    if one or not isinstance(images, Iterable):
        raise ImageError(f"expected a list of images, found {describe(images)}", hint="for one image: [image]")
    return list(images)


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, which in a container is not what there is
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
