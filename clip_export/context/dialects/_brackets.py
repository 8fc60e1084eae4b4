"""How deep brackets may stand in brackets: what reads them level by level takes longer with each."""

from __future__ import annotations

import re

from clip_export.errors import InputError

__all__ = ["require_shallow"]


def require_shallow(text: str, deepest: int) -> None:
    """Raise InputError where more than `deepest` parentheses are open at once; escaped ones do not count."""
    depth = 0
    for bracket in re.findall(r"[()]", re.sub(r"\\.", "", text)):
        depth = depth + 1 if bracket == "(" else max(0, depth - 1)
        if depth > deepest:
            message = f"expected at most {deepest} parentheses inside of each other in the prompt, found more"
            raise InputError(message, hint="state the weight instead")
