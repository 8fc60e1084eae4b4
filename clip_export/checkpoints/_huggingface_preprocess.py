"""Hugging Face's image processor files -> PreprocessSpec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_export.checkpoints import Options
from clip_export.checkpoints._clip import MEAN, STD
from clip_export.checkpoints._config import Section
from clip_export.checkpoints._files import read_json
from clip_export.errors import AmbiguousCheckpointError, CheckpointError, UnsupportedModelError
from clip_export.spec import ImageSpec, Interpolation, PreprocessSpec, ResizeMode

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"

# PIL's numbers for its filters, which `resample` holds.
_FILTERS: dict[int, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}

# What a missing key means: the attributes of transformers' CLIPImageProcessor. A test holds them against transformers.
PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "do_convert_rgb": True,
}
_PROCESSORS = (
    None,
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)


def preprocess_spec(directory: Path, image: ImageSpec, options: Options) -> tuple[PreprocessSpec, list[Path]]:
    """How pictures become pixels, and the file that says so.

    Raises AmbiguousCheckpointError without such a file, unless `options.preprocess_dialect` states CLIP's own way.
    """
    section, files = _processor_section(directory)
    if section is None:
        if options.preprocess_dialect is None:
            raise AmbiguousCheckpointError(
                f"no {PREPROCESSOR} in the checkpoint: how pictures are resized and normalized is not known",
                hint=f"copy {PREPROCESSOR} of the original into the directory, or state "
                "--preprocess-dialect huggingface if it is CLIP's own way",
            )
        side = image.image_size
        section = Section({"size": side, "crop_size": side}, PREPROCESSOR)
    return _preprocess(section.with_defaults(PREPROCESSOR_DEFAULTS), image, options), files


def _processor_section(directory: Path) -> tuple[Section | None, list[Path]]:
    """The image processor's config: inside processor_config.json where it is, as in transformers, else its own file."""
    if (directory / PROCESSOR).is_file():
        nested = Section(read_json(directory / PROCESSOR), PROCESSOR)
        if "image_processor" in nested.values:
            return nested.section("image_processor"), [directory / PROCESSOR]
    if (directory / PREPROCESSOR).is_file():
        return Section(read_json(directory / PREPROCESSOR), PREPROCESSOR), [directory / PREPROCESSOR]
    return None, []


def _preprocess(section: Section, image: ImageSpec, options: Options) -> PreprocessSpec:
    section.require_values({"image_processor_type": _PROCESSORS, "feature_extractor_type": _PROCESSORS})
    _require_steps(section)
    resize_mode, resize_size = _resize(section)
    crop_size = _crop(section, resize_mode, resize_size)
    if crop_size != image.image_size:
        raise CheckpointError(
            f"{section.where}: pictures come out {crop_size} pixels wide, the image tower takes {image.image_size}",
            hint="the file may be of another checkpoint",
        )
    mean, std = _statistics(section)
    resample = section.get("resample")
    if resample not in _FILTERS:
        raise UnsupportedModelError(f"{section.where}: resample is {resample!r}, supported: 0 to 5, PIL's filters")
    return PreprocessSpec(
        dialect=options.preprocess_dialect or "huggingface",
        resize_mode=resize_mode,
        resize_size=resize_size,
        crop_size=crop_size,
        interpolation=_FILTERS[resample],
        mean=mean,
        std=std,
    )


def _require_steps(section: Section) -> None:
    """Raise UnsupportedModelError if the steps are not CLIP's. RGB conversion may be off: then only RGB goes in."""
    if not section.boolean("do_resize"):
        raise UnsupportedModelError(f"{section.where}: do_resize is False, expected pictures to be resized")
    others = [key for key, value in section.values.items() if key.startswith("do_") and value]
    unknown = sorted(set(others) - PREPROCESSOR_DEFAULTS.keys())
    if unknown or section.values.get("use_square_size"):
        found = ", ".join(unknown) or "use_square_size"
        raise UnsupportedModelError(
            f"{section.where}: found the step {found}, which CLIP's preprocessing does not have"
        )


def _resize(section: Section) -> tuple[ResizeMode, int]:
    size = section.get("size")
    if not isinstance(size, Mapping):
        side = section.integer("size")
        return ("squash" if section.boolean("default_to_square") else "shortest"), side
    nested = Section(size, f"{section.where}: size")
    keys = {key for key, value in size.items() if value is not None}
    if keys == {"shortest_edge"}:
        return "shortest", nested.integer("shortest_edge")
    if keys == {"height", "width"}:
        return "squash", _side(nested)
    raise UnsupportedModelError(f"{nested.where} is {dict(size)}, supported: shortest_edge, or height and width")


def _crop(section: Section, resize_mode: ResizeMode, resize_size: int) -> int:
    if not section.boolean("do_center_crop"):
        if resize_mode == "shortest":
            raise UnsupportedModelError(
                f"{section.where}: do_center_crop is False with size shortest_edge: pictures would not come out square"
            )
        return resize_size
    crop_size = section.get("crop_size")
    if isinstance(crop_size, Mapping):
        return _side(Section(crop_size, f"{section.where}: crop_size"))
    return section.integer("crop_size")


def _side(section: Section) -> int:
    return Section({"side": [section.integer("height"), section.integer("width")]}, section.where).square("side")


def _statistics(section: Section) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """mean and std on the 0..1 scale: (levels * factor - m) / s == (levels / 255 - m / (255 f)) / (s / (255 f))."""
    normalizes = section.boolean("do_normalize")
    mean = section.triple("image_mean") if normalizes else (0.0, 0.0, 0.0)
    std = section.triple("image_std") if normalizes else (1.0, 1.0, 1.0)
    factor = section.number("rescale_factor") if section.boolean("do_rescale") else 1.0
    scale = 255 * factor
    if abs(scale - 1) < 1e-9:  # 1/255 as the files write it; dividing would only add rounding
        return mean, std
    if scale <= 0:
        raise CheckpointError(f"{section.where}: rescale_factor: expected a positive number, found {factor}")
    return (mean[0] / scale, mean[1] / scale, mean[2] / scale), (std[0] / scale, std[1] / scale, std[2] / scale)
