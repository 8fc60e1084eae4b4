"""Opening images: a path, the bytes of a file, a PIL image or an array -> a decoded PIL image, or an ImageError.

Pixels are exactly what `PIL.Image.open(...).load()` gives; what is added is that no failure of a decoder leaves this
module as anything but an ImageError that names its source, and that no file stays open.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from clip_export.errors import ImageError

__all__ = ["BOMB_HINT", "ImageInput", "describe", "open_image", "reason"]

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]

# Pillow's decoders are parsers in Python over C: on damaged files they raise whatever the first wrong byte leads to.
# SyntaxError: broken PNG chunks; struct.error, LookupError, TypeError: short or absurd headers; ArithmeticError: sizes
# of 0 or overflowing ones; zlib.error: PNG text; RuntimeError (NotImplementedError among it): codecs; AttributeError:
# closed files; Warning: Pillow's own remarks under `python -W error`.
_DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)
_DAMAGED = "the file is damaged, cut short or not an image: fetch or export it again"
BOMB_HINT = "scale it down first, or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
# An image that Pillow has opened but not decoded is decoded in place: two threads must not do that at once.
_DECODE_LOCKS = tuple(threading.Lock() for _ in range(64))


def open_image(source: ImageInput) -> Image.Image:
    """The decoded image behind a path, the bytes of a file, a PIL image, or a uint8 array.

    Arrays are [height, width] (greyscale), [height, width, 3] (RGB) or [height, width, 4] (RGBA). A PIL image is
    returned as it is, at its current frame. Raises ImageError, which names the source.
    """
    name = describe(source)
    if isinstance(source, Image.Image):
        with _DECODE_LOCKS[(id(source) >> 6) % len(_DECODE_LOCKS)], _decoding(name):
            source.load()
        image = source
    elif isinstance(source, np.ndarray):
        image = Image.fromarray(_checked_array(source))
    elif isinstance(source, bytes):
        image = _decode(io.BytesIO(source), name)
    elif isinstance(source, (str, os.PathLike)):
        with _open_file(os.fsdecode(source), name) as file:
            image = _decode(file, name)
    else:
        raise ImageError(
            f"expected a path, bytes, a PIL image or a uint8 array, found {name}",
            hint="torch: pass tensor.permute(1, 2, 0).numpy() of a uint8 [3, height, width] tensor",
        )
    if min(image.size) < 1:
        raise ImageError(f"{name} has 0 pixels ({image.width} x {image.height})")
    return image


def _decode(file: BinaryIO, name: str) -> Image.Image:
    with _decoding(name), Image.open(file) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            shape = f"{image.width} x {image.height} = {image.width * image.height} pixels"
            raise ImageError(f"{name}: {shape}, over Pillow's limit of {limit}", hint=BOMB_HINT)
        if image.format == "EPS":
            raise ImageError(f"{name} is PostScript; decoding it would run Ghostscript", hint="convert it to PNG first")
        image.load()
        return image


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever Pillow's decoders raise becomes an ImageError that names the source."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that Pillow reads", hint=_DAMAGED) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error}", hint=BOMB_HINT) from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be decoded: {reason(error)}", hint=_DAMAGED) from error


def _open_file(path: str, name: str) -> BinaryIO:
    if _URL.match(path):
        raise ImageError(
            f"{name} is a URL, and nothing is fetched", hint="download it, then pass the path or the bytes"
        )
    try:
        status = Path(path).stat()
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return Path(path).open("rb")
    except FileNotFoundError as error:
        raise ImageError(
            f"{name}: there is no such file", hint="check the path; it is relative to the current directory"
        ) from error
    except PermissionError as error:
        raise ImageError(
            f"{name}: no permission to read it", hint="change its permissions, or run as its owner"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ImageError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a directory, expected an image file", hint="pass the files in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is not a regular file", hint="read it, then pass the bytes")
    raise ImageError(f"{name} is empty (0 bytes)", hint=_DAMAGED)


def _checked_array(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype != np.uint8:
        raise ImageError(
            f"expected an array of uint8, found {describe(array)}",
            hint="levels 0..1: (array * 255).round().astype(np.uint8); levels 0..255: array.astype(np.uint8)",
        )
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise ImageError(
            f"expected [height, width], [height, width, 3] or [height, width, 4], found {describe(array)}",
            hint="channels come last: array.transpose(1, 2, 0)" if channels_first else "pass one array for each image",
        )
    if array.size == 0:
        raise ImageError(f"{describe(array)} has 0 pixels")
    return array


def describe(source: object) -> str:
    """What an error calls the source: the path where there is one, otherwise its kind and size."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        return repr(path if len(path) <= 300 else f"{path[:200]}…{path[-80:]}")
    if isinstance(source, bytes):
        return f"bytes of length {len(source)}"
    if isinstance(source, np.ndarray):
        return f"a {source.dtype} array {list(source.shape)}"
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", "")
        return f"a PIL image ({source.mode}, {source.width} x {source.height})" + (f" of {file!r}" if file else "")
    return "None" if source is None else f"an object of type {type(source).__name__}"


def reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
