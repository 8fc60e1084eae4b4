"""Pixels against the originals' own: OpenAI's clip, open_clip, torchvision and transformers, all on PIL.

Bad input is in test_images.py.
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pictures
import pytest
from hypothesis import given, settings
from PIL import Image, ImageOps
from preprocess_oracles import DIALECTS, FILTERS, ORIGINAL_ERRORS, Pixels, make_spec, original

from clip_export.errors import ImageError, InputError, SpecError
from clip_export.preprocess import Preprocessor, SaturatedImageWarning, open_image, preprocess_versions
from clip_export.spec import Dialect, PreprocessSpec, from_dict, to_dict


def ours(spec: PreprocessSpec, image: Image.Image) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturatedImageWarning)
        return Preprocessor(spec).one(image)


def assert_same(spec: PreprocessSpec, image: Image.Image) -> None:
    """Equal to the last bit, or an ImageError where the original raises."""
    try:
        expected = original(spec)(image.copy())
    except ORIGINAL_ERRORS:
        with pytest.raises(ImageError):
            ours(spec, image)
        return
    found = ours(spec, image)
    assert found.dtype == expected.dtype == np.uint8
    assert found.shape == expected.shape == (3, spec.crop_size, spec.crop_size)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() == 0, f"{image.mode} {image.size}: {difference.max()} levels, {spec}"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", pictures.PHOTOGRAPHS)
def test_photographs_equal_the_original(name: str, dialect: Dialect) -> None:
    with Image.open(pictures.PHOTOGRAPHS[name]) as image:
        assert_same(make_spec(dialect), image)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", pictures.MODES)
def test_modes_equal_the_original(mode: str, dialect: Dialect) -> None:
    spec = make_spec(dialect, 48)
    for width, height in ((1, 1), (31, 97), (97, 31), (48, 48), (49, 64), (48, 63), (301, 200)):
        assert_same(spec, pictures.picture(mode, width, height))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        *((1, 500, 224), (500, 1, 224), (1, 120, 336), (120, 1, 336)),
        *((2, 3, 336), (224, 225, 224), (225, 224, 224), (227, 224, 224), (337, 341, 336)),
        *((4000, 3000, 224), (2999, 4001, 336)),
    ],
)
def test_sizes_equal_the_original(width: int, height: int, size: int, dialect: Dialect) -> None:
    assert_same(make_spec(dialect, size), pictures.picture("RGB", width, height))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_margin_equals_the_original(dialect: Dialect) -> None:
    """Crops of every parity, larger and smaller than the resized image, which is the image itself here."""
    for side in range(1, 24):
        for crop in range(1, 24):
            image = pictures.picture("RGB", side, 2 * side + crop % 2)
            assert_same(make_spec(dialect, side, crop_size=crop), image)


@settings(max_examples=400, deadline=None)
@given(
    dialect=st.sampled_from(DIALECTS),
    mode=st.sampled_from(pictures.MODES),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    resize_mode=st.sampled_from(("shortest", "squash")),
    resize_size=st.integers(1, 60),
    crop_size=st.integers(1, 60),
    interpolation=st.sampled_from(sorted(FILTERS)),
    fill=st.sampled_from((0, 90)),  # of `longest` alone: the padding of the others is black
)
def test_any_image_equals_the_original(
    *,
    dialect: Dialect,
    mode: str,
    size: tuple[int, int],
    resize_mode: str,
    resize_size: int,
    crop_size: int,
    interpolation: str,
    fill: int,
) -> None:
    changes = {"crop_size": crop_size, "resize_mode": resize_mode, "interpolation": interpolation, "fill": fill}
    spec = make_spec(dialect, resize_size, **changes)
    assert_same(spec, pictures.picture(mode, *size))


@settings(max_examples=200, deadline=None)
@given(
    mode=st.sampled_from(pictures.MODES),
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    target=st.integers(1, 60),
    resize_mode=st.sampled_from(("shortest", "squash", "longest")),
    interpolation=st.sampled_from(("bicubic", "bilinear")),
    fill=st.integers(0, 255),
)
def test_open_clips_own_transform_is_equalled(
    *, mode: str, size: tuple[int, int], target: int, resize_mode: str, interpolation: str, fill: int
) -> None:
    """All that open_clip.image_transform offers for inference, with the padding of `longest` in every mode."""
    spec = make_spec("open_clip", target, resize_mode=resize_mode, interpolation=interpolation, fill=fill)
    assert_same(spec, pictures.picture(mode, *size))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pictures.write_files(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_files_equal_the_original(files: dict[str, Path], dialect: Dialect) -> None:
    for path in files.values():
        with Image.open(path) as image:
            expected = original(make_spec(dialect, 64))(image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturatedImageWarning)
            found = Preprocessor(make_spec(dialect, 64))([path, str(path), path.read_bytes()])
        np.testing.assert_array_equal(found, np.stack([expected] * 3), err_msg=path.name)


def test_the_picture_zoo_is_what_it_says(files: dict[str, Path]) -> None:
    modes = {}
    for name, path in files.items():
        with Image.open(path) as image:
            modes[name] = (image.mode, image.info.get("transparency") is not None, getattr(image, "n_frames", 1))
    assert modes["cmyk.jpg"][0] == "CMYK"
    assert modes["sixteen-bit.png"][0] == "I;16"
    assert modes["grey-alpha.png"][0] == "LA"
    assert modes["palette-translucent.png"] == ("P", True, 1)
    assert modes["rgb-transparent.png"] == ("RGB", True, 1)
    assert modes["animation.gif"][2] > 1
    assert modes["two-pages.tif"][2] == 2


def test_exif_rotation_is_not_applied(files: dict[str, Path]) -> None:
    preprocess = Preprocessor(make_spec(size=32))
    with Image.open(files["exif-rotated.jpg"]) as image:
        turned = ImageOps.exif_transpose(image)
    assert turned.size == image.size[::-1], "the fixture says nothing if no viewer would turn it"
    as_stored = preprocess.one(files["exif-rotated.jpg"])
    assert not np.array_equal(as_stored, preprocess.one(turned))


def test_an_animation_gives_its_first_frame_and_a_pil_image_its_current_one(files: dict[str, Path]) -> None:
    preprocess = Preprocessor(make_spec("huggingface", 32))
    with Image.open(files["animation.gif"]) as image:
        image.seek(9)
        ninth = preprocess.one(image)
        np.testing.assert_array_equal(ninth, original(preprocess.spec)(image))
        image.seek(0)
        np.testing.assert_array_equal(preprocess.one(files["animation.gif"]), original(preprocess.spec)(image))
    assert not np.array_equal(ninth, preprocess.one(files["animation.gif"]))


@pytest.mark.parametrize("mode", pictures.MODES)
def test_dropped_transparency_equals_transformers_before_5_21(mode: str) -> None:
    """Until 5.20 transformers took `image.convert("RGB")`; a spec may ask for that.

    What convert leaves in `info` is removed, or today's transformers would blend by it after all.
    """
    image = pictures.picture(mode, 70, 51)
    spec = make_spec("huggingface", 32, transparency="drop")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            rgb = Image.fromarray(np.asarray(image.convert("RGB")))
    except ValueError:
        with pytest.raises(ImageError, match="cannot take a La image"):
            ours(spec, image)
        return
    np.testing.assert_array_equal(ours(spec, image), original(make_spec("huggingface", 32))(rgb))


def test_dialects_differ_where_the_documents_say_so() -> None:
    """Guards the tests above: an implementation that ignored the dialect would fail this one."""
    by_mode = {
        mode: [ours(make_spec(d, 32), pictures.picture(mode, 75, 50)) for d in DIALECTS] for mode in ("RGBA", "P")
    }
    for openai, open_clip, huggingface in by_mode.values():
        np.testing.assert_array_equal(openai, open_clip)
        assert np.abs(openai.astype(int) - huggingface).max() > 50
    odd = pictures.picture("RGB", 35, 32)  # a margin of 3: round(1.5) = 2 against 3 // 2 = 1
    assert not np.array_equal(ours(make_spec("openai", 32), odd), ours(make_spec("huggingface", 32), odd))


def test_specs_that_no_original_has_are_refused() -> None:
    with pytest.raises(SpecError, match="only open_clip resizes the long side"):
        make_spec("openai", resize_mode="longest")
    with pytest.raises(SpecError, match="the openai dialect drops transparency"):
        make_spec("openai", transparency="white")
    with pytest.raises(SpecError, match="fill must be between 0 and 255, found 256"):
        make_spec("open_clip", fill=256)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_spec_in_a_manifest_names_its_transparency(dialect: Dialect) -> None:
    spec = make_spec(dialect)
    stored = json.loads(json.dumps(to_dict(spec)))
    assert stored["transparency"] == ("white" if dialect == "huggingface" else "drop")
    assert from_dict(PreprocessSpec, stored) == spec


def test_every_kind_of_input_gives_the_same_pixels() -> None:
    path = pictures.PHOTOGRAPHS["coffee"]
    array = np.asarray(open_image(path))
    batch = Preprocessor(make_spec())([path, str(path), path.read_bytes(), open_image(path), array])
    assert batch.shape == (5, 3, 224, 224)
    assert batch.dtype == np.uint8
    assert all(np.array_equal(batch[0], pixels) for pixels in batch[1:])
    assert len(np.unique(batch[0])) > 100


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_arrays_are_pictures_of_their_mode(mode: str, dialect: Dialect) -> None:
    image = pictures.picture(mode, 61, 40)
    spec, array = make_spec(dialect, 32), np.asarray(image)
    expected = original(spec)(image)
    np.testing.assert_array_equal(Preprocessor(spec).one(array), expected)
    sliced = np.repeat(array, 2, axis=1)[:, ::2]
    assert not sliced.flags.c_contiguous
    np.testing.assert_array_equal(Preprocessor(spec).one(sliced), expected)


def test_a_four_dimensional_array_is_a_batch() -> None:
    array = np.stack([pictures.levels(40, 30, offset=offset) for offset in (0, 50)])
    found = Preprocessor(make_spec(size=16))(array)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, Preprocessor(make_spec(size=16))(list(array)))


def test_an_empty_list_gives_an_empty_batch() -> None:
    pixels = Preprocessor(make_spec(size=32))([])
    assert pixels.shape == (0, 3, 32, 32)
    assert pixels.dtype == np.uint8


def test_threads_change_neither_pixels_nor_order() -> None:
    paths = list(pictures.PHOTOGRAPHS.values())
    preprocess = Preprocessor(make_spec("huggingface", 96))
    expected = np.stack([preprocess.one(path) for path in paths])
    for threads in (None, 1, 2, 7, 40):
        np.testing.assert_array_equal(preprocess(paths, threads=threads), expected)


def test_one_undecoded_pil_image_can_be_shared_by_threads() -> None:
    """Pillow decodes in place, and two threads that do so at once corrupt or lose the picture."""
    preprocess = Preprocessor(make_spec(size=64))
    expected = preprocess.one(pictures.PHOTOGRAPHS["retina"])
    content = pictures.PHOTOGRAPHS["retina"].read_bytes()
    for _ in range(3):
        image = Image.open(io.BytesIO(content))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            batches = list(pool.map(lambda _, lazy=image: preprocess([lazy] * 4, threads=4), range(8)))
        assert all(np.array_equal(pixels, expected) for batch in batches for pixels in batch)


def test_the_pil_image_handed_in_is_left_alone() -> None:
    for mode in pictures.MODES:
        image = pictures.picture(mode, 32, 32)  # no resize, no crop: the very object reaches the conversion
        before = (image.mode, image.size, dict(image.info), image.tobytes())
        for dialect in DIALECTS:
            if mode != "La":
                ours(make_spec(dialect, 32), image)
        assert (image.mode, image.size, dict(image.info), image.tobytes()) == before


def test_pixels_are_the_callers_own() -> None:
    array = pictures.levels(32, 32).copy()
    pixels = Preprocessor(make_spec(size=32)).one(array)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    pixels[:] = 0
    np.testing.assert_array_equal(array, pictures.levels(32, 32))


@pytest.mark.parametrize("mode", [*pictures.DEEP_MODES, "I", "F"])
def test_levels_that_saturate_are_announced_once_a_call(mode: str) -> None:
    preprocess = Preprocessor(make_spec(size=32))
    dim = pictures.picture(mode, 40, 40)
    bright = dim if mode in pictures.DEEP_MODES else pictures.picture(f"{mode} wide", 40, 40)
    with pytest.warns(SaturatedImageWarning, match=r"40 x 40\) and 2 more: levels outside 0\.\.255") as caught:
        preprocess([bright, bright, bright])
    assert [warning.filename for warning in caught] == [__file__], "the warning points at the caller's line"
    with pytest.warns(SaturatedImageWarning):
        preprocess.one(bright)
    with pytest.warns(SaturatedImageWarning):
        preprocess.attempt([bright])
    if bright is not dim:
        preprocess([dim])  # 8-bit levels in a wide mode are no reason to warn: a warning is an error in these tests


def test_batch_errors_name_the_item_and_keep_the_cause(tmp_path: Path) -> None:
    good = pictures.PHOTOGRAPHS["page"]
    with pytest.raises(ImageError) as caught:
        Preprocessor(make_spec(size=32))([good, good, tmp_path / "gone.jpg", tmp_path / "too.jpg"])
    assert "image 2" in caught.value.message
    assert "gone.jpg" in caught.value.message
    assert caught.value.hint
    assert isinstance(caught.value.__cause__, ImageError)
    assert isinstance(caught.value.__cause__.__cause__, FileNotFoundError)


@pytest.mark.parametrize("threads", [1, 3])
def test_attempt_goes_on_past_failures(tmp_path: Path, threads: int) -> None:
    good = pictures.PHOTOGRAPHS["page"]
    preprocess = Preprocessor(make_spec(size=32))
    outcomes = preprocess.attempt([tmp_path / "a.jpg", good, None, good], threads=threads)  # type: ignore[list-item]
    assert [isinstance(outcome, ImageError) for outcome in outcomes] == [True, False, True, False]
    assert "image 0" in str(outcomes[0])
    assert "image 2" in str(outcomes[2])
    np.testing.assert_array_equal(outcomes[1], preprocess.one(good))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_out_of_many_counts_on(threads: int) -> None:
    with pytest.raises(ImageError, match="image 129: expected a path"):
        Preprocessor(make_spec(size=8))(  # type: ignore[list-item]
            [pictures.PHOTOGRAPHS["page"], None], threads=threads, first_index=128
        )


def test_threads_must_be_a_positive_number() -> None:
    with pytest.raises(InputError, match="threads must be at least 1, found 0"):
        Preprocessor(make_spec())([pictures.PHOTOGRAPHS["page"]], threads=0)


def test_versions_name_what_decides_on_pixels() -> None:
    import PIL

    versions = preprocess_versions()
    assert versions["pillow"] == PIL.__version__
    assert versions.get("libjpeg_turbo", versions.get("libjpeg", "")).count(".") >= 1


def test_importing_it_loads_numpy_and_pillow_only() -> None:
    code = (
        "import sys, clip_export.preprocess\n"
        "assert 'PIL' in sys.modules\n"
        "print(sorted({'torch', 'torchvision', 'transformers', 'open_clip', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
