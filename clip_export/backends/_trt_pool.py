"""The slots of an engine: a bounded number, each used by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from clip_export.backends._trt_context import Slot
from clip_export.backends._trt_plan import Plan
from clip_export.errors import BackendError


class SlotPool:
    """Lends slots, and makes them when they are first needed.

    At the limit, a thread waits for another to finish; an idle slot of another profile makes room first.
    """

    def __init__(self, plan: Plan, limit: int) -> None:
        self._plan = plan
        self._limit = limit
        self._idle: list[Slot] = []  # the last one used is the last one here
        self._count = 0  # idle, lent and being made
        self._lent = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def lend(self, profile: int, rows: int) -> Iterator[Slot]:
        """A slot for `profile` with room for `rows` rows, until the block ends; after an error it is closed.

        Raises GpuMemoryError where there is no memory for another.
        """
        slot = self._take(profile, rows)
        try:
            yield slot
        except BaseException as error:
            slot.close(error)
            self._give_back(slot, keep=False)
            raise
        self._give_back(slot, keep=True)

    def drop_idle(self) -> int:
        """Free what nobody uses now; how many slots that were."""
        with self._changed:
            dropped, self._idle = self._idle, []
        self._close(dropped)
        return len(dropped)

    def wait_for_others(self) -> bool:
        """Wait until a thread gives its slot back; False at once where none has one."""
        with self._changed:
            waiting = self._lent > 0
            if waiting:
                self._changed.wait()
            return waiting

    def close(self) -> None:
        """Wait for the slots that are lent, and free all. Twice does no harm."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._lent:
                self._changed.wait()
        self.drop_idle()

    def _take(self, profile: int, rows: int) -> Slot:
        found, evicted = self._reserve(profile, rows)
        if found is not None:
            return found
        try:
            if evicted is not None:
                evicted.close()
            return Slot(self._plan, profile, rows)
        except BaseException:
            with self._changed:
                self._count -= 1
                self._lent -= 1
                self._changed.notify_all()
            raise

    def _reserve(self, profile: int, rows: int) -> tuple[Slot | None, Slot | None]:
        """An idle slot that fits, or room for a new one and the slot that has to go for it."""
        with self._changed:
            while True:
                if self._closed:
                    raise BackendError("this engine is closed", hint="load the bundle again")
                fitting = [slot for slot in self._idle if slot.profile == profile and slot.rows >= rows]
                if fitting:
                    self._idle.remove(fitting[-1])
                    self._lent += 1
                    return fitting[-1], None
                evicted = None
                if self._count >= self._limit and self._idle:
                    evicted = self._idle.pop(0)
                    self._count -= 1
                if self._count < self._limit:
                    self._count += 1
                    self._lent += 1
                    return None, evicted
                self._changed.wait()

    def _give_back(self, slot: Slot, *, keep: bool) -> None:
        with self._changed:
            self._lent -= 1
            if keep:
                self._idle.append(slot)
            else:
                self._count -= 1
            self._changed.notify_all()

    def _close(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.close()
        with self._changed:
            self._count -= len(slots)
            self._changed.notify_all()


__all__ = ["SlotPool"]
