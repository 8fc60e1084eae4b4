"""Whether the profiles of a request fit the inputs of a graph, as the parser found them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clip_export.backends.building import Profile, Shape
from clip_export.errors import InputError


def check_profiles(inputs: Mapping[str, Shape], profiles: Sequence[Profile]) -> None:
    """Raises InputError unless every profile covers every input with a free axis (-1), within the fixed axes."""
    free = {name: shape for name, shape in inputs.items() if -1 in shape}
    if free and not profiles:
        found = ", ".join(f"{name} {_shape(shape)}" for name, shape in free.items())
        raise InputError(f"no profile is given for the free axes of {found}", hint="give at least one range of batches")
    for number, ranges in enumerate(profiles, start=1):
        unknown = ", ".join(sorted(set(ranges) - set(inputs)))
        if unknown:
            message = f"profile {number} names {unknown}; the graph's inputs are {', '.join(inputs)}"
            raise InputError(message, hint="name inputs of the graph")
        absent = ", ".join(name for name in free if name not in ranges)
        if absent:
            raise InputError(f"profile {number} gives no range for input {absent}", hint="give min, opt and max")
        for name, shapes in ranges.items():
            for given in (shapes.min, shapes.opt, shapes.max):
                _check_shape(f"profile {number}", name, given, inputs[name])


def _check_shape(where: str, name: str, given: Shape, fixed: Shape) -> None:
    fits = len(given) == len(fixed) and all(wanted in (-1, size) for wanted, size in zip(fixed, given, strict=True))
    if not fits:
        message = f"{where} has {name} {_shape(given)}; the graph's is {_shape(fixed)}"
        raise InputError(message, hint="only axes shown as * may differ")


def _shape(shape: Shape) -> str:
    return "x".join("*" if size < 0 else str(size) for size in shape) or "a scalar"


__all__ = ["check_profiles"]
