"""The compiler's nested phases as one number that a progress bar can show."""

from __future__ import annotations

import threading
from typing import Any

STEPS = 1000  # of progress, from nothing to a plan


class Phases:
    """Nested phases of unequal length as one number of STEPS that never falls. Safe from several threads."""

    def __init__(self) -> None:
        self._open: dict[str, list[Any]] = {}  # name: [parent, steps, steps done]
        self._reached = 0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> int:
        """A phase of `steps` begins, within one step of `parent`."""
        with self._lock:
            self._open[name] = [parent, max(1, steps), 0]
            return self._measure()

    def advance(self, name: str, done: int) -> int:
        """`done` steps of a phase are done."""
        with self._lock:
            if name in self._open:
                self._open[name][2] = max(self._open[name][2], done)
            return self._measure()

    def finish(self, name: str) -> int:
        """A phase ends; what it stood for is counted by its parent's next step."""
        with self._lock:
            self._open.pop(name, None)
            return self._measure()

    def _measure(self) -> int:
        outer = [name for name, (parent, _, _) in self._open.items() if parent not in self._open]
        fraction = max(map(self._fraction, outer), default=0.0)
        # The last step is the written plan's, not the compiler's.
        self._reached = max(self._reached, min(STEPS - 1, int(fraction * STEPS)))
        return self._reached

    def _fraction(self, name: str) -> float:
        _, steps, done = self._open[name]
        within = max((self._fraction(child) for child in self._open if self._open[child][0] == name), default=0.0)
        return float(min(1.0, (done + within) / steps))


__all__ = ["STEPS", "Phases"]
