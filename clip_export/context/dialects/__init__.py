"""What a prompt means to a tool. One file a tool, whose name is the dialect's.

A dialect offers `prepare(prompt, unit)`: which rows the encoder is given, and what is made of their states; and
`zeros(negatives, context)`: whether negative prompts are zeros instead of being encoded.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Literal, Protocol, cast

from clip_export.context.units import Prepared, Unit
from clip_export.errors import InputError
from clip_export.spec import ContextSpec

__all__ = ["Dialect", "PromptDialect", "dialect_names", "find_dialect"]

PromptDialect = Literal["diffusers", "comfyui", "a1111", "compel"]


class Dialect(Protocol):
    """What a module of this package offers."""

    def prepare(self, prompt: str, unit: Unit, *, negative: bool = False) -> Prepared:
        """What to ask of the encoder for `prompt`. Raises InputError for a prompt that the tool cannot read.

        `negative`: it is a negative one, which tools read as any other but where a dialect says so.
        """

    def zeros(self, negatives: Sequence[str | None], context: ContextSpec) -> list[bool]:
        """For each negative prompt, None where none is given, whether its Context is zeros."""


def dialect_names() -> list[str]:
    """The dialects there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find_dialect(name: str) -> Dialect:
    """The dialect called `name`. Raises InputError, listing what there is."""
    if name not in dialect_names():
        raise InputError(
            f"there is no dialect {name!r} of prompts", hint=f"choose one of: {', '.join(dialect_names())}"
        )
    return cast(Dialect, importlib.import_module(f"{__name__}.{name}"))
