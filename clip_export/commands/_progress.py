"""Progress in a terminal: a bar on stderr for work that takes longer than two seconds, and silence anywhere else."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any, TextIO

DELAY_S = 2.0


class Bar:
    """A `Progress` that draws. Nothing is drawn before `delay_s`, nor where `stream` is no terminal.

    with Bar() as progress:
        clip_export.build("demo", progress=progress)
    """

    def __init__(self, stream: TextIO | None = None, *, delay_s: float = DELAY_S) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._lock = threading.Lock()
        self._latest = ("", 0, 0)
        self._display: Any = None
        self._timer = threading.Timer(delay_s, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Bar:
        if self._stream.isatty():
            self._timer.start()
        return self

    def __call__(self, step: str, done: int, total: int) -> None:
        with self._lock:
            self._latest = (step, done, total)
            self._draw()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            if self._display is not None:
                self._display.stop()
            self._display = None

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        console = Console(file=self._stream)
        with self._lock:
            if self._timer.finished.is_set():  # the work ended while rich was being imported
                return
            self._display = Progress(
                *columns, TimeElapsedColumn(), console=console, transient=True, redirect_stdout=False
            )
            self._display.add_task("", total=None)
            self._draw()
            self._display.start()

    def _draw(self) -> None:
        if self._display is not None:
            step, done, total = self._latest
            self._display.update(self._display.task_ids[0], description=step, completed=done, total=total or None)
