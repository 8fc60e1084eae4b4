"""Which optimization profile runs a batch, and how a batch is cut and padded so that one does.

Axis 0 of every input is the batch; the other axes are taken as they are. Pure functions over the ranges that a plan was
built for: nothing here knows TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from clip_export.backends.building import Profile, Shape, ShapeRange
from clip_export.errors import InputError

Shapes: TypeAlias = Mapping[str, Shape]

HINT = "build the plan again with a profile that holds it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some rows of a batch and how they are run: `rows` of them, padded to `size`, with profile number `profile`."""

    rows: int
    size: int
    profile: int


def choose(profiles: Sequence[Profile], shapes: Shapes) -> int | None:
    """The number of the tightest profile that holds all `shapes`, or None.

    The tightest is the one with the smallest largest volume; of equal ones, the one whose `opt` is nearest.
    """
    holding = [number for number, profile in enumerate(profiles) if _holds(profile, shapes)]

    def tightness(number: int) -> tuple[int, float, int]:
        profile = profiles[number]
        volume = sum(math.prod(span.max) for span in profile.values())
        return volume, sum(_distance(profile[name].opt, shape) for name, shape in shapes.items()), number

    return min(holding, key=tightness, default=None)


def limits(profiles: Sequence[Profile]) -> dict[str, ShapeRange]:
    """The smallest and the largest size on every axis that some profile has; `opt` is that of the largest profile."""
    largest = max(profiles, key=lambda profile: sum(math.prod(span.max) for span in profile.values()))
    return {
        name: ShapeRange(
            min=tuple(min(sizes) for sizes in zip(*(profile[name].min for profile in profiles), strict=True)),
            opt=span.opt,
            max=tuple(max(sizes) for sizes in zip(*(profile[name].max for profile in profiles), strict=True)),
        )
        for name, span in largest.items()
    }


def split(rows: int, profiles: Sequence[Profile], rest: Shapes, *, cap: int | None = None) -> list[Part]:
    """How a batch of `rows` is run, in the order of its rows.

    `rest` are the shapes of one row of each input, without the batch; `cap` is the most rows that a run may have, with
    its padding, for want of memory. As few runs as the profiles allow: where the last would be small and has no profile
    of its own, all become equally large instead. A size that no profile has is padded to the next that one has, unless
    that more than doubles the work and a smaller profile can do it.

    Raises InputError where no profile holds `rest`, or none runs `cap` rows.
    """
    ranges = _batch_ranges(profiles, rest, cap)
    if not ranges:
        raise _outside(profiles, rest) or InputError(f"no profile runs {cap} rows or fewer", hint=HINT)
    return [_part(size, profiles, rest, ranges) for size in _sizes(rows, ranges)]


def smallest(profiles: Sequence[Profile], rest: Shapes) -> int | None:
    """The smallest batch that some profile runs with `rest`, or None where no profile holds `rest`."""
    return min((low for low, _ in _batch_ranges(profiles, rest, None)), default=None)


def padded(rows: int, profiles: Sequence[Profile], rest: Shapes, *, cap: int | None = None) -> int | None:
    """The smallest batch of at least `rows` that some profile runs; None where there is none."""
    return _padded(rows, _batch_ranges(profiles, rest, cap))


def _sizes(rows: int, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """How many rows each run takes. `ranges` are the batches that profiles run: (least, most)."""
    most = max(high for _, high in ranges)
    if rows > most:
        runs = -(-rows // most)
        last = rows - (runs - 1) * most
        full, even = [most] * (runs - 1) + _sizes(last, ranges), _balanced(rows, runs)
        own_profile = last == most or any(low <= last <= high < most for low, high in ranges)
        return full if own_profile or _work(full, ranges) < _work(even, ranges) else even
    smaller = [(low, high) for low, high in ranges if high < rows]
    size = _padded(rows, ranges)
    assert size is not None  # rows <= most
    return _sizes(rows, smaller) if size > 2 * rows and smaller else [rows]


def _balanced(rows: int, runs: int) -> list[int]:
    less, more = divmod(rows, runs)
    return [less + 1] * more + [less] * (runs - more)


def _work(sizes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> int:
    """The rows that are computed for parts of `sizes`, with their padding."""
    return sum(_padded(size, ranges) or 0 for size in sizes)


def _padded(rows: int, ranges: Sequence[tuple[int, int]]) -> int | None:
    return min((max(rows, low) for low, high in ranges if rows <= high), default=None)


def _part(rows: int, profiles: Sequence[Profile], rest: Shapes, ranges: Sequence[tuple[int, int]]) -> Part:
    size = _padded(rows, ranges)
    assert size is not None  # rows is no more than the most that a profile runs
    number = choose(profiles, {name: (size, *shape) for name, shape in rest.items()})
    assert number is not None
    return Part(rows=rows, size=size, profile=number)


def _batch_ranges(profiles: Sequence[Profile], rest: Shapes, cap: int | None) -> list[tuple[int, int]]:
    """(least, most) rows of every profile that holds `rest`; what `cap` forbids is cut off."""
    found = []
    for profile in profiles:
        if profile.keys() != rest.keys() or not all(_holds_row(profile[name], shape) for name, shape in rest.items()):
            continue
        low, high = max(span.min[0] for span in profile.values()), min(span.max[0] for span in profile.values())
        high = high if cap is None else min(high, cap)
        if low <= high:
            found.append((low, high))
    return found


def _holds(profile: Profile, shapes: Shapes) -> bool:
    return profile.keys() == shapes.keys() and all(profile[name].holds(shape) for name, shape in shapes.items())


def _holds_row(span: ShapeRange, shape: Shape) -> bool:
    return len(shape) == len(span.min) - 1 and all(
        low <= size <= high for low, size, high in zip(span.min[1:], shape, span.max[1:], strict=True)
    )


def _distance(opt: Shape, shape: Shape) -> float:
    return sum(abs(math.log(size / best)) for size, best in zip(shape, opt, strict=True))


def _outside(profiles: Sequence[Profile], rest: Shapes) -> InputError | None:
    """The sentence for inputs that no profile holds, whatever the batch; None where some profile does."""
    if _batch_ranges(profiles, rest, None):
        return None
    whole = limits(profiles)
    if whole.keys() != rest.keys():
        return InputError(f"expected inputs {', '.join(whole)}, found {', '.join(rest)}")
    for name, shape in rest.items():
        low, high = whole[name].min, whole[name].max
        if len(shape) != len(low) - 1:
            return InputError(f"{name}: expected {len(low)} axes, found {len(shape) + 1}")
        for axis, size in enumerate(shape, start=1):
            if not low[axis] <= size <= high[axis]:
                if low[axis] == high[axis]:
                    return InputError(f"{name}: expected {low[axis]} on axis {axis}, found {size}", hint=HINT)
                span = f"{low[axis]}..{high[axis]}"
                return InputError(f"{name}: {size} on axis {axis} is outside the profiles {span}", hint=HINT)
    found = ", ".join(f"{name} [rows, {', '.join(map(str, shape))}]" for name, shape in rest.items())
    return InputError(f"no single profile holds {found}", hint=HINT)


__all__ = ["Part", "choose", "limits", "padded", "smallest", "split"]
