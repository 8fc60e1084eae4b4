"""The picture of a similarity matrix: what it shows is where it should be, and its colours can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pictures
import pytest
import skimage.color
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from clip_export import plot
from clip_export.errors import ImageError, InputError, OutputError
from clip_export.lettering import Lettering, _has, _wrapped

PHOTOGRAPHS = list(pictures.PHOTOGRAPHS.values())
TEXTS = [f"a photo of {name}" for name in pictures.PHOTOGRAPHS]


def random_matrix(images: int, texts: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(images * 100 + texts).normal(20, 4, (images, texts))


def accent_cells(picture: Image.Image, matrix: npt.NDArray[np.float64]) -> set[tuple[int, int]]:
    """(image, text) of the cells whose left edge, at half height, has the colour of the outline."""
    n_images, n_texts = matrix.shape
    layout = plot._layout(n_images, n_texts, TEXTS[:n_texts], Lettering(), titled=False)
    levels = np.asarray(picture).astype(int)
    found = set()
    for image, text in np.ndindex(matrix.shape):
        left, top, _, bottom = (side // plot._REDUCE for side in layout.box(text, image))
        strip = levels[(top + bottom) // 2, left - 1 : left + 2]
        if (np.abs(strip - plot._ACCENT).sum(axis=1) < 40).any():
            found.add((image, text))
    return found


def test_lightness_falls_evenly() -> None:
    """Against scikit-image's CIELAB: no two equal differences of value look more than a fifth apart from the mean."""
    colors = np.array([plot.color_of(i / 100) for i in range(101)]) / 255
    lightness = skimage.color.rgb2lab(colors)[:, 0]
    steps = -np.diff(lightness[::10])
    assert (np.diff(lightness) < 0).all()
    assert lightness[0] > 94
    assert lightness[-1] < 24
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.2)


@pytest.mark.parametrize("fraction", [-1.0, *(i / 64 for i in range(65)), 2.0])
def test_numbers_can_be_read_on_every_color(fraction: float) -> None:
    color = plot.color_of(fraction)
    assert all(0 <= level <= 255 for level in color)

    def luminance(rgb: tuple[int, int, int]) -> float:  # WCAG 2's; rgb2xyz has it as Y
        return float(skimage.color.rgb2xyz(np.array(rgb) / 255)[1])

    lighter, darker = sorted((luminance(color), luminance(plot._readable_on(color))), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (13, 2), (12, 13)])
def test_the_best_text_of_each_image_is_outlined(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    picture = plot.similarity_picture(matrix, PHOTOGRAPHS[: shape[0]], TEXTS[: shape[1]])
    assert accent_cells(picture, matrix) == set(enumerate(matrix.argmax(axis=1)))


def test_cells_have_the_colors_of_their_values() -> None:
    matrix = random_matrix(4, 6)
    picture = plot.similarity_picture(matrix, PHOTOGRAPHS[:4], TEXTS[:6], title="a title")
    layout = plot._layout(4, 6, TEXTS[:6], Lettering(), titled=True)
    fractions = (matrix - matrix.min()) / np.ptp(matrix)
    for image, text in np.ndindex(matrix.shape):
        left, top, *_ = layout.box(text, image)
        found = picture.getpixel((left // plot._REDUCE + 14, top // plot._REDUCE + 14))  # inside, left of the number
        assert np.abs(np.array(found) - plot.color_of(fractions[image, text])).max() <= 2


def test_thumbnails_stand_above_their_columns() -> None:
    picture = plot.similarity_picture(random_matrix(3, 2), PHOTOGRAPHS[:3], TEXTS[:2])
    layout = plot._layout(3, 2, TEXTS[:2], Lettering(), titled=False)
    for column, path in enumerate(PHOTOGRAPHS[:3]):
        left, top, right, _ = (side // plot._REDUCE for side in layout.box(0, column))
        side = right - left
        found = picture.crop((left, top - 8 * plot._SCALE // plot._REDUCE - side, right, top)).crop((0, 0, side, side))
        with Image.open(path) as image:
            centre = min(image.size)
            x, y = (image.width - centre) // 2, (image.height - centre) // 2
            expected = image.convert("RGB").crop((x, y, x + centre, y + centre)).resize((side, side))
        inner = (8, 8, side - 8, side - 8)  # the corners are round; and small, as two filters differ in detail
        small = [part.crop(inner).resize((16, 16), Image.Resampling.BOX) for part in (found, expected)]
        difference = np.asarray(small[0], float) - np.asarray(small[1], float)
        assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "I;16", "F", "RGB transparent"])
def test_images_of_any_mode(mode: str) -> None:
    plot.similarity_picture([[0.5]], [pictures.picture(mode, 40, 30)], ["x"])


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 64), st.lists(st.text(max_size=300), min_size=1, max_size=64), st.text(max_size=80))
@pytest.mark.filterwarnings("ignore:no font here has all characters")
def test_any_texts_and_sizes(n_images: int, texts: list[str], title: str) -> None:
    image = pictures.picture("RGB", 20, 30)
    picture = plot.similarity_picture(random_matrix(n_images, len(texts)), [image] * n_images, texts, title=title)
    assert picture.mode == "RGB"
    assert max(picture.size) < 4000


def test_equal_values_are_drawn() -> None:
    plot.similarity_picture(np.zeros((2, 3)), PHOTOGRAPHS[:2], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("matrix", "images", "texts", "message"),
    [
        (np.zeros((2, 3)), 3, 2, r"3 x 2, found \[2, 3\]"),
        (np.zeros((0, 2)), 0, 2, "at least one image and one text"),
        (np.array([[1, np.nan]]), 1, 2, "not finite"),
        (np.zeros((1, 129)), 1, 129, "1 images and 129 texts has cells too small"),
    ],
)
def test_matrices_that_cannot_be_drawn(matrix: npt.NDArray[np.float64], images: int, texts: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot.similarity_picture(matrix, PHOTOGRAPHS[:1] * images, ["x"] * texts)


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png"):
        plot.similarity_picture([[1]], [tmp_path / "none.png"], ["x"])


# Letters


@given(st.text(min_size=1, max_size=200), st.integers(20, 400), st.integers(1, 4))
def test_lines_fit_and_lose_nothing_but_their_end(text: str, width: int, max_lines: int) -> None:
    font = ImageFont.load_default(16)
    text = " ".join(text.split())
    lines = _wrapped(text, font, width, max_lines)
    assert 1 <= len(lines) <= max_lines
    for line in lines:
        assert font.getlength(line) <= width or len(line) == 1 or line.endswith("…")
    joined = "".join(lines).replace(" ", "")
    if joined != text.replace(" ", ""):
        assert text.replace(" ", "").startswith(joined.removesuffix("…"))
        assert len(lines) == max_lines


def test_lines_break_at_spaces() -> None:
    font = ImageFont.load_default(16)
    width = round(font.getlength("a red circle an")) + 1
    assert _wrapped("a red circle and two blue squares", font, width, 9) == ["a red circle", "and two blue", "squares"]
    assert _wrapped("a red circle and two", font, width, 1)[0].startswith("a red circ")


def test_a_font_knows_what_it_lacks() -> None:
    assert _has("", "a")
    assert _has("", " ")
    assert not _has("", "猫")
    assert not _has("", "\U0010fffe")


def test_a_script_that_a_system_font_has_is_no_box() -> None:
    try:
        expected = ImageFont.truetype("DejaVuSans.ttf", 40)
    except OSError:
        pytest.skip("needs DejaVu Sans among the fonts of the system")
    found, wanted = (Image.new("RGB", (300, 60), "white") for _ in range(2))
    Lettering().write(ImageDraw.Draw(found), "Кошка", (10, 0, 290, 60), 40, (0, 0, 0))
    ImageDraw.Draw(wanted).text((10, 30), "Кошка", fill="black", font=expected, anchor="lm")
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() < 40


# The file


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.WEBP"])
def test_saved_pictures_open(tmp_path: Path, name: str) -> None:
    picture = plot.similarity_picture([[1, 2]], PHOTOGRAPHS[:1], ["a", "b"])
    plot.save_picture(picture, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.size == picture.size
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "message"), [("a.txt", r"expected a suffix for a picture, found '\.txt'"), ("no/a.png", "no directory")]
)
def test_places_where_no_picture_goes(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        plot.save_picture(Image.new("RGB", (1, 1)), tmp_path / name)
    assert not list(tmp_path.iterdir())
