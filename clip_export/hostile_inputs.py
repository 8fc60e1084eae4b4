"""Inputs that break encoders: texts and pictures as users send them by accident, and as tests of parity use them.

Everything is made in memory. Pixels are drawn in integer arithmetic, the same on every machine but for what a JPEG
encoder loses of two of them. What is asked of an encoder with it: hostile.py.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_export.images import ImageInput

__all__ = ["FIRST_FRAME", "LONE_SURROGATE", "ONE_WORD", "UNROTATED", "hostile_images", "hostile_texts"]

LONE_SURROGATE = "a\ud800b"  # no valid Unicode: repaired by the openai and open_clip dialects, refused by huggingface
ONE_WORD = "a"  # one token in every vocabulary of CLIP, so that the length of a text can be set token by token
UNROTATED = ("jpeg with EXIF rotation", "jpeg without EXIF")  # the same pixels: no original turns them
FIRST_FRAME = ("animated gif", "its first frame")

_SCRIPTS = {
    "Arabic": "صورة قطة على سجادة ١٢٣",
    "Armenian": "քնած կատու",
    "Bengali": "একটি লাল নৌকা ৳৫",
    "Cyrillic": "фотография рыжей кошки",
    "Devanagari": "सोती हुई बिल्ली की तस्वीर",
    "Ethiopic": "የድመት ፎቶ",
    "Georgian": "მძინარე კატა",
    "Greek": "ΟΔΟΣ ΟΔΥΣΣΕΑΣ, μια φωτογραφία",
    "Gurmukhi": "ਲਾਲ ਟਰੈਕਟਰ",
    "Han": "一只猫坐在红色的垫子上",
    "Hangul": "빨간 모자를 쓴 고양이",
    "Hebrew": "שָׁלוֹם, צילום של חתול",
    "Japanese": "赤い帽子をかぶった猫とカタカナー",
    "Kannada": "ಹಳೆಯ ಮನೆ",
    "Khmer": "រូបថតប្រាសាទ",
    "Lao": "ຮູບຖ່າຍຂອງວັດ",
    "Malayalam": "പുഴയും പാലവും",
    "Myanmar": "ကြောင်ဖြူတစ်ကောင်",
    "Sinhala": "ශ්‍රී පාදය",
    "Tamil": "நாய் ஓடுகிறது",
    "Telugu": "ఒక పాత చెట్టు",
    "Thai": "ภาพถ่ายของแมวสีขาว",
    "Tibetan": "གངས་རི།",
    "Turkish": "İstanbul ISPARTA ısı",
    "Vietnamese": "một con mèo trắng",
    "Gothic and cuneiform": "𐌰𐌱 𒀀𒀁 𓀀",
    "mixed scripts": "abcабвαβγאבג一二三12٣",
}
_TEXTS = {
    "empty": "",
    "white space": " \t\r\n\u00a0\u3000\u2028\u200b ",
    "one letter": "a",
    "one mark": "!",
    "one digit": "7",
    "caption": "a photo of a cat",
    "capitals": "A PHOTO OF A CAT",
    "contractions": "it's I'm they're we've you'll he'd CAN'T 'ſ 'S",
    "numbers": "in 1984, 3.14 or 1,000,000; ½ ² Ⅷ ①",
    "punctuation": "wow!!! ... (a) [b] {c} -- ?!? ~^`|\\ _",
    "curly quotes": "“a cat” and ‘a dog’, the photographer’s",
    "ligatures and fullwidth": "ﬁne ﬂour oﬃce ＬＯＵＤ　１２３ ｶﾀｶﾅ",
    "html": "<b>salt &amp; pepper</b> &amp;lt;tag&amp;gt; &#128049; &copy",
    "mojibake": "schÃ¶n cafÃ©, l\u00e2\u20ac\u2122humanit\u00c3\u00a9",
    "byte order mark": "\ufeffa cat",
    "replacement character": "a \ufffd cat",
    "control characters": "a\x00b\x01c\x07d\x1be\x7ff\x1cg\x80h\x85i",
    "ansi colours": "\x1b[31mred\x1b[0m and \x1b[36;44mblue\x1b[0m",
    "line breaks": "a\r\nb\rc\u2028d\u2029e\x0bf\x0cg",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\u00adf",
    "directions": "\u202eabc\u202c \u2066d\u2069",
    "emoji": "😀 a smile 🎉🎉 🐱",
    "joined emoji": "👩‍👩‍👧‍👦 family 🏳️‍🌈 👩🏽‍🚀 👍🏽",
    "flags and keycaps": "🇫🇷🇩🇪 1️⃣ ☎︎ ☎️",
    "combining marks": "re\u0301sume\u0301 q\u0307 a\u0300\u0301\u0302 α\u0345",
    "marks upon marks": "z\u0351\u0352\u0353a\u0310\u0311l\u0360g\u0334o",
    "mathematical letters": "𝓒𝓵𝓲𝓹 𝟙𝟚 x² → ∞ ≠",
    "case that changes length": "ǅ STRASSE straße ẞ ŉ",
    "private use and unassigned": "\ue000 \U000f0000 \u0378 \U0010fffd",
    "end token of openai": "a cat <|endoftext|> a dog",
    "start token of openai": "<|startoftext|>a cat",
    "end tokens alone": "<|endoftext|><|endoftext|>",
    "broken end token": "<|endoftext| > !<|endoftext|> |endoftext|>",
    "end token of open_clip": "a <end_of_text> b <start_of_text>",
    "code": '{"prompt": "a cat", "steps": 20}; DROP TABLE cats; --',
    "path and url": "C:\\Users\\me\\cat.bmp https://example.org/a_b?c=1&d=%20#top",
    "long word": "pneumonoultramicroscopicsilicovolcanoconiosis" * 8,
    "10,000 letters": "a" * 10_000,
    "10,000 characters of words": "a photo of a cat, " * 556,
    "10,000 emoji": "🐱" * 10_000,
}


def hostile_texts() -> dict[str, str]:
    """Name -> text. Every one can be encoded in every dialect once it is cut to the context; none comes twice."""
    return _TEXTS | {f"script: {name}": text for name, text in _SCRIPTS.items()}


def hostile_images() -> dict[str, ImageInput]:
    """Name -> picture: every mode that reaches CLIP, sizes from 1 x 1 to 100 : 1, and files with something to ignore.

    The 16-bit one has levels above 255, for which preprocessing warns.
    """
    rgb, grey = Image.fromarray(_levels(97, 71)), Image.fromarray(_levels(97, 71)[..., 1])
    alpha = Image.fromarray(_levels(97, 71, seed=5)[..., 0])
    deep = _levels(97, 71)[..., 0].astype("<u2") * 3 // 2
    return {
        "1": grey.point(lambda level: 255 * (level > 127)).convert("1"),
        "L": grey,
        "LA": Image.merge("LA", (grey, alpha)),
        "P": _palette(97, 71),
        "P with transparency": _palette(97, 71, transparency=3),
        "P with an alpha for each colour": _palette(97, 71, transparency=bytes(range(0, 256, 16))),
        "RGB": rgb,
        "RGBA": Image.merge("RGBA", (*rgb.split(), alpha)),
        "RGBA, wholly clear": Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0))),
        "CMYK": Image.merge("CMYK", (*rgb.split(), grey)),
        "I;16": Image.frombytes("I;16", (97, 71), deep.tobytes()),
        "array [height, width]": np.asarray(grey),
        "array [height, width, 3]": np.asarray(rgb),
        "black": Image.new("RGB", (64, 64), (0, 0, 0)),
        "white": Image.new("RGB", (64, 64), (255, 255, 255)),
        "checkerboard of pixels": Image.fromarray(_checkerboard(96)),
        "1 x 1": Image.new("RGB", (1, 1), (200, 30, 90)),
        "1 x 90": Image.fromarray(_levels(1, 90)),
        "90 x 1": Image.fromarray(_levels(90, 1)),
        "400 x 4": Image.fromarray(_levels(400, 4)),
        "7 x 5": Image.fromarray(_levels(7, 5)),
        **dict(zip(UNROTATED, (_jpeg(rgb, orientation=6), _jpeg(rgb)), strict=True)),
        **_animation(),
    }


def _levels(width: int, height: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Slopes in another direction for each channel with a disc and stripes on them, uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = 255 * (x + seed * y) // (width + seed * height)
    green = 255 * y // height
    blue = (x * x // (seed + 3) + 7 * y) % 256
    levels = np.stack((red, green, blue), axis=-1)
    disc = (2 * x - width) ** 2 + (2 * y - height) ** 2 < min(width, height) ** 2 // 2
    levels[disc] = 255 - levels[disc]
    return np.where(((x + y) // 9 % 3 == 0)[..., None], levels // 2, levels).astype(np.uint8)


def _checkerboard(side: int) -> npt.NDArray[np.uint8]:
    """Black and white pixel by pixel: what a resize makes of it depends on every weight of its filter."""
    y, x = np.mgrid[0:side, 0:side]
    plane = np.where((x + y) % 2 == 0, 255, 0).astype(np.uint8)
    return np.repeat(plane[..., None], 3, axis=2)


def _palette(width: int, height: int, *, transparency: int | bytes | None = None) -> Image.Image:
    """Mode P with neighbouring indices of unlike colours: resizing indices and resizing colours differ widely."""
    image = Image.fromarray(_levels(width, height)[..., 2] // 16)
    image.putpalette([(index * step) % 256 for index in range(16) for step in (97, 53, 201)])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def _jpeg(image: Image.Image, *, orientation: int | None = None) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation  # EXIF's Orientation; 6: a viewer turns it by 90 degrees
    image.save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


def _animation() -> dict[str, ImageInput]:
    """A GIF of three unlike frames, and a GIF of the first alone."""
    first, *others = (_palette(60, 40).rotate(90 * turn) for turn in range(3))
    files = []
    for frames in (others, []):
        buffer = io.BytesIO()
        first.save(buffer, "GIF", save_all=True, append_images=frames, duration=100)
        files.append(buffer.getvalue())
    return dict(zip(FIRST_FRAME, files, strict=True))
