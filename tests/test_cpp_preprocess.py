"""The C++ preprocessing against Python's, that is against Pillow, to the last bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pictures
import pytest
from cpp_made import Cpp, CppError, build

from clip_export.errors import ImageError
from clip_export.preprocess import Preprocessor
from clip_export.spec import PreprocessSpec

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@pytest.fixture(scope="module")
def cpp() -> Cpp:
    return Cpp(build())


def _spec(
    dialect: str = "openai", resize_mode: str = "shortest", size: int = 32, crop: int = 32, **changes: Any
) -> PreprocessSpec:
    fields: dict[str, Any] = {"interpolation": "bicubic", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **changes}
    return PreprocessSpec(dialect=dialect, resize_mode=resize_mode, resize_size=size, crop_size=crop, **fields)  # type: ignore[arg-type]


def _image(draw: random.Random, width: int, height: int, channels: int) -> npt.NDArray[np.uint8]:
    """Noise, flat areas or hard edges, which overshoot."""
    noise = np.random.default_rng(draw.randrange(1 << 30))
    shape = (height, width, channels) if channels > 1 else (height, width)
    kind = draw.randrange(3)
    if kind == 0:
        return noise.integers(0, 256, shape, dtype=np.uint8)
    if kind == 1:
        return np.full(shape, draw.randrange(256), np.uint8)
    return np.asarray(noise.integers(0, 2, shape, dtype=np.uint8) * 255, dtype=np.uint8)


def _cases(count: int, seed: int, largest: int) -> list[tuple[PreprocessSpec, npt.NDArray[np.uint8]]]:
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        dialect = draw.choice(("openai", "open_clip", "huggingface"))
        mode = draw.choice(("shortest", "squash", "longest") if dialect == "open_clip" else ("shortest", "squash"))
        changes: dict[str, Any] = {"interpolation": draw.choice(INTERPOLATIONS)}
        changes["fill"] = draw.randrange(256) if mode == "longest" else 0
        changes["transparency"] = draw.choice(("drop", "white")) if dialect == "huggingface" else "drop"
        spec = _spec(dialect, mode, draw.randrange(1, 64), draw.randrange(1, 64), **changes)
        image = _image(draw, draw.randrange(1, largest), draw.randrange(1, largest), draw.choice((1, 3, 4)))
        cases.append((spec, image))
    return cases


def test_pixels_of_random_sizes_and_contents(cpp: Cpp) -> None:
    compared = 0
    for spec, image in _cases(2500, 3, 160):
        try:
            expected = Preprocessor(spec)([image])
        except ImageError as error:
            with pytest.raises(CppError) as raised:
                cpp.preprocessor(spec)([image])
            assert str(raised.value) == str(error).removeprefix("image 0: ")
            continue
        assert (cpp.preprocessor(spec)([image]) == expected).all(), (spec, image.shape)
        compared += 1
    assert compared > 2000


def test_photographs_at_the_size_of_a_tower(cpp: Cpp) -> None:
    for dialect in ("openai", "huggingface"):
        spec = _spec(dialect, size=224, crop=224)
        for size in ((640, 427), (427, 640), (224, 224), (1400, 300), (225, 223)):
            photograph = np.ascontiguousarray(pictures.levels(*size))
            assert (cpp.preprocessor(spec)([photograph]) == Preprocessor(spec)([photograph])).all(), (dialect, size)


def test_rows_that_do_not_touch(cpp: Cpp) -> None:
    wide = np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    part = wide[:, :50]
    assert (cpp.preprocessor(_spec())([part]) == Preprocessor(_spec())([np.ascontiguousarray(part)])).all()


def test_images_that_are_none_say_what_python_says(cpp: Cpp) -> None:
    for image in (np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 2), np.uint8), np.zeros((5, 5, 7), np.uint8)):
        with pytest.raises(CppError) as raised:
            cpp.preprocessor(_spec())([image])
        with pytest.raises(ImageError) as expected:
            Preprocessor(_spec())([image])
        assert str(raised.value).split("\n")[0] == expected.value.message.removeprefix("image 0: ")
        assert raised.value.code == 22
    with pytest.raises(CppError, match="over Pillow's limit of 89478485"):
        cpp.preprocessor(_spec(size=224, crop=224))([np.zeros((60_000, 1, 3), np.uint8)])
