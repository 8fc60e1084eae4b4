"""JSON that every reader takes: ASCII, and null where a number is not finite."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["json_text"]


def json_text(data: Any) -> str:
    """`data` as indented JSON, without a line end; NaN and infinities, which JSON has not, become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=True, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
