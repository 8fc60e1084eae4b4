"""Small pictures inside the page, as data: nothing is fetched, and no path of this machine is told."""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageOps

from clip_export.images import ImageInput, open_image

__all__ = ["thumbnail"]


def thumbnail(image: ImageInput, side: int) -> str:
    """The centre square, as the image tower sees most images, `side` pixels wide, as a data URI of a JPEG.

    Transparency is shown over white. Raises ImageError for an image that cannot be read.
    """
    opened = open_image(image)
    if "A" in opened.getbands() or "transparency" in opened.info:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
    square = ImageOps.fit(opened.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    square.info.clear()  # a comment in the file may be of any length, and is nobody's business
    packed = io.BytesIO()
    square.save(packed, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode("ascii")
