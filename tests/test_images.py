"""Bad input: every unreadable picture is an ImageError that says what it is, what was expected and what to do."""

from __future__ import annotations

import dataclasses
import gc
import os
import struct
import warnings
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pictures
import psutil
import pytest
from hypothesis import given, settings
from PIL import Image

from clip_export.errors import ImageError, InputError
from clip_export.images import open_image
from clip_export.preprocess import Preprocessor
from clip_export.spec import PreprocessSpec

SPEC = PreprocessSpec(
    dialect="openai",
    resize_mode="shortest",
    resize_size=16,
    crop_size=16,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
PHOTOGRAPH = pictures.PHOTOGRAPHS["page"]


def failure(source: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    return caught.value


def test_a_missing_file(tmp_path: Path) -> None:
    error = failure(tmp_path / "cat.jpg")
    assert error.message.endswith("cat.jpg': there is no such file")
    assert isinstance(error.__cause__, FileNotFoundError)
    assert isinstance(error, InputError)


def test_a_directory(tmp_path: Path) -> None:
    error = failure(tmp_path)
    assert "is a directory, expected an image file" in error.message
    assert error.hint == "pass the files in it"


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private.png"
    path.write_bytes(PHOTOGRAPH.read_bytes())
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: a path through a file that forbids it is what is left
        monkeypatch.setattr(Path, "open", _forbidden)
    error = failure(path)
    assert "private.png': no permission to read it" in error.message
    assert isinstance(error.__cause__, PermissionError)


def _forbidden(self: Path, *_: object) -> None:
    raise PermissionError(13, "Permission denied", str(self))


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "empty.jpg' is empty (0 bytes)" in failure(path).message


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is not a regular file" in failure(tmp_path / "pipe.png").message


def test_a_text_named_as_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("a photo of a cat\n" * 20)
    error = failure(path)
    assert "notes.jpg' is not an image in a format that Pillow reads" in error.message
    assert error.hint is not None
    assert "fetch or export it again" in error.hint


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, ""])
def test_paths_that_no_file_can_have(path: str) -> None:
    assert len(failure(path).message) < 500


@pytest.mark.parametrize(
    "url", ["http://example.com/cat.jpg", "HTTPS://example.com/cat.jpg", "data:image/png;base64,iVBO"]
)
def test_urls_are_not_fetched(url: str) -> None:
    error = failure(url)
    assert "is a URL, and nothing is fetched" in error.message
    assert error.hint == "download it, then pass the path or the bytes"


@pytest.mark.parametrize(
    ("source", "found"),
    [(None, "None"), (3, "an object of type int"), ([1, 2], "an object of type list"), ({}, "an object of type dict")],
)
def test_things_that_are_no_pictures(source: object, found: str) -> None:
    assert failure(source).message == f"expected a path, bytes, a PIL image or a uint8 array, found {found}"


@pytest.mark.parametrize(
    ("array", "message", "hint"),
    [
        (np.zeros((4, 5, 3), np.float32), r"of uint8, found a float32 array \[4, 5, 3\]", "(array * 255)"),
        (np.zeros((4, 5), bool), "of uint8, found a bool array", "astype"),
        (np.zeros((3, 40, 50), np.uint8), r"\[height, width, 3\].*found a uint8 array \[3, 40, 50\]", "transpose"),
        (np.zeros((40, 50, 2), np.uint8), r"found a uint8 array \[40, 50, 2\]", "one array for each"),
        (np.zeros((2, 40, 50, 3), np.uint8), r"found a uint8 array \[2, 40, 50, 3\]", "one array for each"),
        (np.zeros(7, np.uint8), r"found a uint8 array \[7\]", "one array for each"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\] has 0 pixels", None),
        (np.zeros((5, 0), np.uint8), r"\[5, 0\] has 0 pixels", None),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str, hint: str | None) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        open_image(array)
    assert (hint or "None") in str(caught.value.hint)


def test_a_pil_image_of_no_pixels() -> None:
    assert "has 0 pixels (0 x 5)" in failure(Image.new("RGB", (0, 5))).message


def test_a_closed_pil_image_names_its_file() -> None:
    image = Image.open(PHOTOGRAPH)
    image.close()
    assert "page.png" in failure(image).message


@pytest.mark.parametrize(
    "single", ["a.jpg", b"\x89PNG", Path("a.jpg"), Image.new("RGB", (2, 2)), np.zeros((2, 2, 3), np.uint8)]
)
def test_one_picture_where_a_list_is_expected(single: object) -> None:
    with pytest.raises(ImageError, match="expected a list of images, found") as caught:
        Preprocessor(SPEC)(single)  # type: ignore[arg-type]
    assert caught.value.hint == "for one image: [image]"


def test_none_where_a_list_is_expected() -> None:
    with pytest.raises(ImageError, match="expected a list of images, found None"):
        Preprocessor(SPEC)(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["baseline.jpg", "progressive.jpg", "rgb.png", "still.gif", "rgb.bmp", "lossy.webp", "lzw.tiff", "rgb.jp2"]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_cut_files_are_errors_and_never_grey(tmp_path: Path, name: str, share: float) -> None:
    content = pictures.write_files(tmp_path)[name].read_bytes()
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(content[: int(len(content) * share)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(?:[Tt]runcated|[Cc]orrupt)", UserWarning)
        error = failure(cut)
    assert f"cut-{name}" in error.message
    assert error.hint is not None
    assert error.__cause__ is not None


@pytest.mark.parametrize("name", ["rocket", "chelsea"])
def test_a_download_that_broke_off_is_called_truncated(tmp_path: Path, name: str) -> None:
    content = pictures.PHOTOGRAPHS[name].read_bytes()
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    assert "truncated" in failure(tmp_path / "half").message
    assert "truncated" in failure(content[: len(content) // 2]).message


def test_a_damaged_header() -> None:
    content = bytearray(PHOTOGRAPH.read_bytes())
    content[16:24] = b"\0" * 8  # width and height
    assert "bytes of length" in failure(bytes(content)).message


def broken_png() -> bytes:
    """A PNG whose data chunk says that it is ten bytes shorter than it is: Pillow raises SyntaxError."""
    content = bytearray(pictures.encode(pictures.picture("RGB", 13, 9), "PNG"))
    length = content.index(b"IDAT") - 4
    content[length : length + 4] = struct.pack(">I", struct.unpack(">I", content[length : length + 4])[0] - 10)
    return bytes(content)


def unknown_dds() -> bytes:
    """A DDS texture in a compression that does not exist: Pillow raises NotImplementedError."""
    content = bytearray(pictures.encode(pictures.picture("RGBA", 13, 9), "DDS"))
    content[80:88] = struct.pack("<I", 4) + b"NONE"
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "cause"), [(broken_png(), SyntaxError), (unknown_dds(), NotImplementedError)], ids=["png", "dds"]
)
def test_unusual_exceptions_of_decoders_do_not_come_through(content: bytes, cause: type[Exception]) -> None:
    error = failure(content)
    assert "cannot be decoded" in error.message
    assert isinstance(error.__cause__, cause)


def png_claiming(width: int, height: int) -> bytes:
    """A whole PNG of a hundred bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_claiming(40_000, 25_000))
    error = failure(tmp_path / "bomb.png")
    assert "bomb.png" in error.message
    assert "1000000000 pixels" in error.message
    assert "MAX_IMAGE_PIXELS" in str(error.hint)


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_what_pillow_only_warns_of_is_an_error(action: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)  # type: ignore[arg-type]
        error = failure(png_claiming(10_000, 10_000))
    assert "100000000 pixels" in error.message
    assert str(Image.MAX_IMAGE_PIXELS) in error.message


def test_the_limit_is_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 384 * 191)
    assert open_image(PHOTOGRAPH).size == (384, 191)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 384 * 191 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert f"384 x 191 = {384 * 191} pixels, over Pillow's limit of {384 * 191 - 1}" in failure(PHOTOGRAPH).message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(PHOTOGRAPH).size == (384, 191)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_strip_that_resizing_would_blow_up(shape: tuple[int, int]) -> None:
    """60,000 bytes become 224 x 13,440,000 pixels, 3 GB (RGB: 12): the bomb that a check of the file misses."""
    spec = dataclasses.replace(SPEC, resize_size=224, crop_size=224)
    with pytest.raises(ImageError, match=r"13440000 when resized to 224, over Pillow's limit|become 13440000 x 224"):
        Preprocessor(spec).one(np.zeros(shape, np.uint8))


def test_a_side_that_resizing_would_lose() -> None:
    spec = dataclasses.replace(SPEC, dialect="open_clip", resize_mode="longest")
    with pytest.raises(ImageError, match="1 x 500 pixels become 0 x 16"):
        Preprocessor(spec).one(np.zeros((500, 1), np.uint8))


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.jpg")
    assert "is PostScript; decoding it would run Ghostscript" in failure(tmp_path / "page.jpg").message


def test_no_file_stays_open(tmp_path: Path) -> None:
    files = pictures.write_files(tmp_path)
    cut = tmp_path / "cut.tiff"
    cut.write_bytes(files["lzw.tiff"].read_bytes()[:900])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = [open_image(path) for path in files.values()]
        with pytest.raises(ImageError):
            open_image(cut)
        still_open = {Path(file.path) for file in psutil.Process().open_files()}
        del images
        gc.collect()
    assert not still_open & {cut, *files.values()}
    assert not [warning for warning in caught if issubclass(warning.category, ResourceWarning)]


def test_pictures_outlive_their_files(tmp_path: Path) -> None:
    for path in pictures.write_files(tmp_path).values():
        image = open_image(path)
        assert len(image.tobytes()) >= image.width * image.height // 8
        assert open_image(image) is image


def _seeds() -> dict[str, bytes]:
    """A small file of each format, as whole as hypothesis can make it unwhole."""
    rgb, palette, alpha = (pictures.picture(mode, 13, 9) for mode in ("RGB", "P", "RGBA"))
    deep = pictures.picture("I;16", 13, 9)
    return {
        "png": pictures.encode(rgb, "PNG"),
        "png palette": pictures.encode(palette, "PNG", transparency=bytes(range(256))),
        "png 16 bits": pictures.encode(deep, "PNG"),
        "apng": pictures.encode(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "jpeg": pictures.encode(rgb, "JPEG"),
        "jpeg progressive": pictures.encode(rgb, "JPEG", progressive=True),
        "jpeg cmyk": pictures.encode(rgb.convert("CMYK"), "JPEG"),
        "gif": pictures.encode(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        "bmp": pictures.encode(rgb, "BMP"),
        "tiff": pictures.encode(rgb, "TIFF"),
        "tiff lzw": pictures.encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff 16 bits": pictures.encode(deep, "TIFF"),
        "webp": pictures.encode(alpha, "WEBP"),
        "webp lossless": pictures.encode(alpha, "WEBP", lossless=True),
        "jpeg 2000": pictures.encode(rgb, "JPEG2000"),
        "ico": pictures.encode(alpha, "ICO", sizes=[(13, 9)]),
        "tga": pictures.encode(alpha, "TGA"),
        "ppm": pictures.encode(rgb, "PPM"),
        "pcx": pictures.encode(rgb, "PCX"),
        "dds": pictures.encode(alpha, "DDS"),
        "sgi": pictures.encode(rgb, "SGI"),
        "icns": pictures.encode(pictures.picture("RGBA", 16, 16), "ICNS"),
    }


SEEDS = _seeds()


def prepare_damaged(content: bytes) -> None:
    """Pixels or an ImageError: anything else that Pillow raises fails the test by itself."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1_000_000  # keeps what is decoded small
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow remarks on what it repairs
            outcome = Preprocessor(SPEC).attempt([content], threads=1)[0]
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert isinstance(outcome, ImageError) or outcome.shape == (3, 16, 16)


@pytest.mark.parametrize("file_format", SEEDS)
def test_the_undamaged_seed_is_a_picture(file_format: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*levels outside", UserWarning)
        assert Preprocessor(SPEC).one(SEEDS[file_format]).std() > 10


@settings(max_examples=1500, deadline=None)
@given(
    file_format=st.sampled_from(sorted(SEEDS)),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12),
    in_header=st.booleans(),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_files_give_pixels_or_an_image_error(
    *, file_format: str, damage: list[tuple[float, int]], in_header: bool, kept: float
) -> None:
    content = bytearray(SEEDS[file_format])
    span = min(len(content), 200) if in_header else len(content)  # what steers a decoder is mostly in front
    for position, value in damage:
        content[min(int(position * span), span - 1)] = value
    prepare_damaged(bytes(content[: int(kept * len(content))]))


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), magic=st.sampled_from([b"", *(seed[:8] for seed in SEEDS.values())]))
def test_any_bytes_give_pixels_or_an_image_error(content: bytes, magic: bytes) -> None:
    prepare_damaged(magic + content)
