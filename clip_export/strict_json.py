"""JSON from files that nobody vouches for: one object without duplicate keys, NaN, or numbers beyond 64 bits."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from clip_export.errors import BundleSchemaError

__all__ = ["MAX_MESSAGE", "REBUILD", "json_object", "printable"]

REBUILD = "build the bundle again, or copy it again from where it came"

MAX_MESSAGE = 400  # characters: a hostile value must not fill the terminal


def json_object(data: bytes, *, where: str) -> dict[str, Any]:
    """Strict JSON: one object, no duplicate keys, no NaN or infinity, integers of 64 bits. Raises BundleSchemaError."""
    try:
        plain = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_int64,
        )
    except (ValueError, RecursionError) as error:
        raise BundleSchemaError(printable(f"{where} is not valid JSON: {error}"), hint=REBUILD) from error
    if not isinstance(plain, dict):
        raise BundleSchemaError(f"{where}: expected an object, found {type(plain).__name__}", hint=REBUILD)
    return plain


def printable(message: str) -> str:
    """The message without control characters or lone surrogates, which hostile keys can carry to the terminal."""
    cut = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in cut)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {repeated!r}")
    return plain


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:24]} is out of range")
    return int(text)
