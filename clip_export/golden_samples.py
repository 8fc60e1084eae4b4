"""The inputs of the golden samples: texts that tell tokenizer dialects apart, pictures that tell preprocessing apart.

The pictures are drawn in integer arithmetic alone, so that they are the same on every machine; their encoding depends
on the version of Pillow, which is why a bundle carries the files.
"""

from __future__ import annotations

import io
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["golden_images", "golden_texts"]

Plane: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]

_TEXTS = (
    # What most users send.
    "a photo of a cat",
    "Two dogs, one black and one white, running along the beach at sunset.",
    "a red circle to the left of a small blue square on a grey background",
    "A 35mm film still, f/1.4, ISO-400, 1/250s; price: $1,299.99 (20% off!)",
    "it's what we'd call \"they'll've been there\" -- isn't it?",
    # The shortest, and white space that has to fold into one space.
    "",
    "  \t a   cat \r\n on\u00a0the\u3000mat  ",
    # ftfy: curly quotes, ligatures, fullwidth forms, UTF-8 read as Windows-1252, a terminal's colour codes.
    "“curly” quotes and the photographer’s café",
    "the ﬁrst oﬃce ＦＵＬＬＷＩＤＴＨ １２３",
    "l\u00e2\u20ac\u2122humanit\u00c3\u00a9 \u2014 schÃ¶n",
    "\x1b[31mred\x1b[0m and \ufeffa byte order mark",
    # html.unescape, twice.
    "<b>salt &amp; pepper</b> &amp;lt;tag&amp;gt; &#128049;",
    # The special tokens as a user may write them: ids in one dialect, punctuation in another.
    "a cat <|endoftext|> a dog",
    # Case folding that depends on the language, or on the position in the word.
    "ΟΔΟΣ ΟΔΥΣΣΕΑΣ",
    "İstanbul ǅ STRASSE ẞ",
    # NFC and NFD of the same word; marks that have no composed form.
    "re\u0301sume\u0301 and r\u00e9sum\u00e9, q\u0307",
    # Scripts.
    "一只猫坐在红色的垫子上",
    "赤い帽子をかぶった猫の写真",
    "빨간 모자를 쓴 고양이",
    "صورة قطة على سجادة حمراء",
    "बिल्ली की एक तस्वीर",
    "фотография кошки на ковре",
    # Beyond the first plane: joined emoji, a flag, mathematical letters.
    "👩‍👩‍👧‍👦 family 🇺🇳 flag 👍🏽 thumbs 🐱",
    "𝓒𝓵𝓲𝓹 ½ x² → ∞",
)


def golden_texts() -> tuple[str, ...]:
    """The sample texts. Most are short; a few are longer than a small context and have to be truncated for it."""
    return _TEXTS


def golden_images() -> tuple[bytes, ...]:
    """The sample pictures, as PNG files: every mode that PNG has up to 8 bits, from one pixel to 640 x 480."""
    pictures = (
        _scene(640, 480, seed=1),
        _scene(333, 500, seed=2),
        _scene(224, 224, seed=3),
        _scene(500, 61, seed=4),
        _scene(37, 411, seed=5),
        _scene(7, 5, seed=6),
        Image.new("RGB", (1, 1), (200, 30, 90)),
        _scene(301, 200, seed=7).convert("L"),
        _translucent(_scene(257, 255, seed=8)),
        _translucent(_scene(180, 243, seed=9)).convert("LA"),
        _palette(320, 213, seed=10, transparent=False),
        _palette(129, 130, seed=11, transparent=True),
        Image.fromarray(_field(190, 161, 48, seed=12) > 127),
    )
    return tuple(map(_png, pictures))


def _scene(width: int, height: int, *, seed: int) -> Image.Image:
    """What a photograph has, in small: light that falls off, surfaces with texture, and edges. RGB."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    side = max(width, height)
    channels = []
    for channel in range(3):
        key = 16 * seed + channel
        light = 70 + 130 * (x * (1 + key % 3) + y * (3 - key % 3)) // (4 * side)
        clouds = _field(width, height, side // 4 + 1, seed=key) - 128
        grain = _field(width, height, 5, seed=key + 997) - 128
        channels.append(light + clouds // 2 + grain // 8)
    image = np.stack(channels, axis=-1)
    for index in range(5):
        image[_shape(x, y, side, 32 * seed + index)] += np.array([_hash(seed, index, c) % 161 - 80 for c in range(3)])
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _shape(x: Plane, y: Plane, side: int, seed: int) -> Mask:
    """A disc, a bar or a checkerboard somewhere in the picture, as a mask [height, width]."""
    width, height = x.shape[1], x.shape[0]
    cx, cy, size = _hash(seed, 0) % width, _hash(seed, 1) % height, side // 12 + _hash(seed, 2) % (side // 6 + 1) + 1
    disc: Mask = (x - cx) ** 2 + (y - cy) ** 2 < size**2
    bar: Mask = abs((x - cx) + (y - cy) * (1 + seed % 2)) < size // 3 + 1
    cell = size // 6 + 1
    checkerboard: Mask = disc & ((x // cell + y // cell) % 2 == 0)
    return (disc, bar, checkerboard)[seed % 3]


def _translucent(picture: Image.Image) -> Image.Image:
    """The same with an alpha that goes from clear to opaque, with clear holes: RGBA."""
    alpha = _field(picture.width, picture.height, 20, seed=77)
    ramp = 255 * np.arange(picture.width, dtype=np.int64) // picture.width
    alpha = np.where(alpha > 170, 0, (ramp[None, :] + alpha) // 2)
    picture = picture.copy()
    picture.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return picture


def _palette(width: int, height: int, *, seed: int, transparent: bool) -> Image.Image:
    """Mode P with neighbouring indices of unlike colours: resizing indices and resizing colours differ widely."""
    indices = Image.fromarray((_field(width, height, 40, seed=seed) // 16).astype(np.uint8))
    indices.putpalette([_hash(seed, index, channel) % 256 for index in range(16) for channel in range(3)])
    if transparent:
        indices.info["transparency"] = 3
    return indices


def _field(width: int, height: int, cell: int, *, seed: int) -> Plane:
    """Value noise, int64 [height, width] in 0..255: hashes on a lattice of `cell` pixels, blended smoothly between."""
    y, x = np.arange(height, dtype=np.int64), np.arange(width, dtype=np.int64)
    rows, columns = (np.arange(size // cell + 2, dtype=np.int64) for size in (height, width))
    lattice = _hash(seed, rows[:, None], columns) % 256
    down, right = _smooth(y % cell, cell)[:, None], _smooth(x % cell, cell)
    above, below = lattice[y // cell], lattice[y // cell + 1]
    upright = above * (1024 - down) + below * down
    blend: Plane = (upright[:, x // cell] * (1024 - right) + upright[:, x // cell + 1] * right) >> 20
    return blend


def _smooth(offset: Plane, cell: int) -> Plane:
    """3t² - 2t³ with t = offset / cell, in 1/1024."""
    return 1024 * (3 * cell - 2 * offset) * offset**2 // cell**3


def _hash(*keys: Any) -> Any:
    """A number below 2**23 out of small integers or arrays of them; a linear congruence, kept within int64."""
    value: Any = 1
    for key in keys:
        value = (value * 1103515245 + key * 12345679 + 12345) % 2**31
        value = value ^ (value >> 15)
    return value >> 8


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
