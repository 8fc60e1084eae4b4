"""What can be asked of `verify`, checked before anything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from clip_export.errors import InputError
from clip_export.verifying.vectors import IndexInputs

__all__ = ["Asked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to verify. `min_cosine` and `max_recall_drop` (points) take the place of every engine's own contract.

    `index` is a .npy file of vectors, `inputs` what they were made of. `skip_errors` leaves out pictures of `pairs`
    that cannot be decoded.
    """

    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    against: str | None = None
    pairs: str | os.PathLike[str] | None = None
    index: str | os.PathLike[str] | None = None
    inputs: IndexInputs | None = None
    hostile: bool = True
    skip_errors: bool = False
    min_cosine: float | None = None
    max_recall_drop: float | None = None

    def __post_init__(self) -> None:
        if (self.index is None) is not (self.inputs is None):
            raise InputError(
                "an index and the inputs that it was made of go together",
                hint="give both: --index vectors.npy with --images PATH... or --texts FILE",
            )
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise InputError(f"a cosine of at least {self.min_cosine:g} was asked for", hint="give -1 to 1")
        if self.max_recall_drop is not None and not 0 <= self.max_recall_drop <= 100:
            raise InputError(f"R@1 may drop by {self.max_recall_drop:g} points?", hint="give 0 to 100")
