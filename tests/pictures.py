"""Pictures for tests: the photographs inside scikit-image and scikit-learn, and what can be made of them.

`picture(mode, width, height)` is real content in any Pillow mode and size; `write_files` is the zoo of file formats.
"""

from __future__ import annotations

import functools
import io
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scenes
import skimage.data
import sklearn.datasets
from PIL import Image

_SKIMAGE = Path(skimage.data.__file__).parent
_SKLEARN = Path(sklearn.datasets.__file__).parent / "images"

PHOTOGRAPHS: dict[str, Path] = {
    "astronaut": _SKIMAGE / "astronaut.png",  # RGB 512 x 512
    "brick": _SKIMAGE / "brick.png",  # L 512 x 512
    "camera": _SKIMAGE / "camera.png",  # L 512 x 512
    "chelsea": _SKIMAGE / "chelsea.png",  # RGB 451 x 300
    "china": _SKLEARN / "china.jpg",  # RGB 640 x 427
    "coffee": _SKIMAGE / "coffee.png",  # RGB 600 x 400
    "flower": _SKLEARN / "flower.jpg",  # RGB 640 x 427
    "hubble": _SKIMAGE / "hubble_deep_field.jpg",  # RGB 1000 x 872
    "logo": _SKIMAGE / "logo.png",  # RGBA 500 x 500
    "motorcycle": _SKIMAGE / "motorcycle_left.png",  # RGB 741 x 500
    "page": _SKIMAGE / "page.png",  # L 384 x 191
    "retina": _SKIMAGE / "retina.jpg",  # RGB 1411 x 1411
    "rocket": _SKIMAGE / "rocket.jpg",  # RGB 640 x 427
}
ANIMATION = _SKIMAGE / "no_time_for_that_tiny.gif"  # P, 24 frames
MULTIPAGE = _SKIMAGE / "multipage.tif"  # L, 2 pages

# A Pillow mode, and what is special about it: transparency as Pillow holds it after opening a PNG that has a tRNS
# chunk, or levels from below 0 to above 255. The 16-bit modes have levels from 0 to 382, so that some saturate.
MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "F", "I;16", "I;16L", "I;16B"),
    *("I wide", "F wide", "L transparent", "RGB transparent", "P transparent", "P translucent"),
)
DEEP_MODES = ("I;16", "I;16L", "I;16B")


@functools.cache
def _levels(name: str) -> npt.NDArray[np.uint8]:
    with Image.open(PHOTOGRAPHS[name]) as image:
        return np.asarray(image.convert("RGB"))


def levels(width: int, height: int, *, name: str = "chelsea", offset: int = 0) -> npt.NDArray[np.uint8]:
    """Content of a photograph, uint8 [height, width, 3]: every fifth pixel from `offset` on, around and around.

    Skipping makes even a few pixels sharp and rich in contrast, which is what tells two ways of resizing apart.
    """
    source = _levels(name)
    rows = (5 * np.arange(height) + offset) % source.shape[0]
    columns = (5 * np.arange(width) + 2 * offset) % source.shape[1]
    return source[rows][:, columns]


def picture(mode: str, width: int, height: int, *, offset: int = 40) -> Image.Image:
    """A picture in one of MODES. Alpha, where there is one, is another photograph, so that every level occurs."""
    base, _, special = mode.partition(" ")
    rgb = Image.fromarray(levels(width, height, offset=offset))
    alpha = Image.fromarray(levels(width, height, name="astronaut", offset=3 * offset)[..., 1])
    if base in DEEP_MODES:
        deep = np.asarray(rgb)[..., 0].astype(np.uint16) * 3 // 2
        return Image.frombytes(base, (width, height), deep.astype(">u2" if base == "I;16B" else "<u2").tobytes())
    if base == "PA":
        image = Image.merge("PA", (rgb.convert("P"), alpha))
    elif base in ("LA", "La"):
        image = Image.merge("LA", (rgb.convert("L"), alpha)).convert(base)
    elif base in ("RGBA", "RGBa"):
        image = Image.merge("RGBA", (*rgb.split(), alpha)).convert(base)
    else:
        image = (rgb.convert("L") if base in ("I", "F") else rgb).convert(base)
    if special == "wide":
        image = image.point(lambda level: level * 3 + -200)
    elif special:
        image.info["transparency"] = {
            "transparent": image.getpixel((width // 2, height // 2)),
            "translucent": bytes(range(256)),
        }[special]
    return image


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    """The bytes of a file of this format."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_files(directory: Path) -> dict[str, Path]:
    """One file for each way in which pictures reach CLIP, by a name that says what is special about it."""
    rgb = picture("RGB", 123, 91)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: the viewer turns it by 90 degrees
    contents: dict[str, bytes] = {
        "baseline.jpg": encode(rgb, "JPEG", quality=90),
        "progressive.jpg": encode(rgb, "JPEG", quality=80, progressive=True),
        "no-subsampling.jpg": encode(rgb, "JPEG", subsampling=0),
        "grey.jpg": encode(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "exif-rotated.jpg": encode(rgb, "JPEG", exif=exif),
        "rgb.png": encode(rgb, "PNG"),
        "rgba.png": encode(picture("RGBA", 123, 91), "PNG"),
        "grey-alpha.png": encode(picture("LA", 123, 91), "PNG"),
        "palette.png": encode(picture("P", 123, 91), "PNG"),
        "palette-transparent.png": encode(picture("P transparent", 123, 91), "PNG", transparency=7),
        "palette-translucent.png": encode(picture("P", 123, 91), "PNG", transparency=bytes(range(256))),
        "rgb-transparent.png": encode(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        "one-bit.png": encode(picture("1", 123, 91), "PNG"),
        "sixteen-bit.png": encode(picture("I;16", 123, 91), "PNG"),
        "still.gif": encode(picture("P", 123, 91), "GIF"),
        "lossy.webp": encode(rgb, "WEBP"),
        "lossless-alpha.webp": encode(picture("RGBA", 123, 91), "WEBP", lossless=True),
        "rgb.bmp": encode(rgb, "BMP"),
        "lzw.tiff": encode(rgb, "TIFF", compression="tiff_lzw"),
        "sixteen-bit.tiff": encode(picture("I;16", 123, 91), "TIFF"),
        "float.tiff": encode(picture("F", 123, 91), "TIFF"),
        "rgb.ppm": encode(rgb, "PPM"),
        "rgba.tga": encode(picture("RGBA", 123, 91), "TGA"),
        "rgb.jp2": encode(rgb, "JPEG2000"),
    }
    paths = {name: directory / name for name in contents}
    for name, path in paths.items():
        path.write_bytes(contents[name])
    return paths | {"animation.gif": ANIMATION, "two-pages.tif": MULTIPAGE}


def draw_held_out(folder: Path, count: int, *, seed: str) -> None:
    """Write `count` scenes that the demo never saw into `folder`, 00.png and on, 64 x 64 pixels."""
    pool = [scene for scene in scenes.all_scenes() if scenes.is_held_out(scene)]
    for number, scene in enumerate(random.Random(seed).sample(pool, count)):
        scenes.render(scene, number, 64, oversample=1).save(folder / f"{number:02}.png")
