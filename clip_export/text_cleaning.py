"""What the original tokenizers do to a text before they split it into words, and which texts need none of it."""

from __future__ import annotations

import html
from collections.abc import Callable

from clip_export.spec import Dialect

__all__ = ["CLEANERS", "PLAIN_LENGTH", "is_plain"]

PLAIN_LENGTH = 1000  # characters; longer texts are rare, and their words would fill a cache


def is_plain(text: str) -> bool:
    """Whether cleaning can only lower the case of `text` in every dialect: printable ASCII, no markup, not long.

    ftfy and html.unescape act on `&`, on control characters and beyond ASCII; special tokens start with `<`.
    """
    return len(text) <= PLAIN_LENGTH and text.isascii() and text.isprintable() and "&" not in text and "<" not in text


def clean_openai(text: str) -> str:
    """OpenAI's cleaning. White space within is left as it is: the word pattern skips any amount alike."""
    return _unbroken(text).lower()


def clean_open_clip(text: str) -> str:
    """open_clip's default cleaning ("lower"), where Python decides what is white space."""
    return " ".join(_unbroken(text).split()).lower()


def clean_nothing(text: str) -> str:
    """Hugging Face's: normalization is part of the checkpoint's tokenizer."""
    return text


def _unbroken(text: str) -> str:
    import ftfy  # here: it costs 75 ms to import, and plain texts never need it

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


CLEANERS: dict[Dialect, Callable[[str], str]] = {
    "openai": clean_openai,
    "open_clip": clean_open_clip,
    "huggingface": clean_nothing,
}
