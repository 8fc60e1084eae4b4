"""Numbers as a report writes them: as many digits as say something, a true minus sign, and NaN as NaN."""

from __future__ import annotations

import math

__all__ = ["change", "cosine", "percent", "plain", "points", "power", "rounded", "scientific", "signed"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def cosine(value: float) -> str:
    """Seven digits after the point: what float32 can tell apart near 1, and what `clip-export verify` prints."""
    return rounded(value, 7)


def scientific(value: float) -> str:
    """Two digits and a power of ten: 3.1×10⁻⁴; 0 is 0."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}×{power(int(exponent))}".replace("-", "−")


def power(exponent: int) -> str:
    """10⁻⁴."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def rounded(value: float, digits: int) -> str:
    """`digits` after the point."""
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else _not_finite(value)


def signed(value: float, digits: int) -> str:
    """With its sign, and 0 without one."""
    if not math.isfinite(value):
        return _not_finite(value)
    written = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(written) == 0 else written.replace("-", "−")


def plain(value: float) -> str:
    """Four digits after the point, or a power of ten where these would hide the number."""
    return scientific(value) if 0 < abs(value) < 1e-3 else rounded(value, 4)


def change(difference: float) -> str:
    """As `plain`, with its sign."""
    written = plain(difference)
    return f"+{written}" if difference > 0 else written


def percent(share: float) -> str:
    """A share, 0 to 1, in percent."""
    return f"{rounded(100 * share, 2)} %" if math.isfinite(share) else _not_finite(share)


def points(difference: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{signed(100 * difference, 2)} points" if math.isfinite(difference) else _not_finite(difference)


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
