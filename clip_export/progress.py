"""How long work says how far it is: a callback, so that nothing below the command line knows of terminals.

    def build(..., progress: Progress = silent): ...
        progress("exporting the text tower", 1, 4)

`step` names what is being done, in the words a user reads; `done` and `total` count its units. A `total` of 0 means
that the end is not known. A call is cheap but not free: make one per unit of visible work, not one per array element.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(step: str, done: int, total: int) -> None:
    """The default: say nothing."""
