"""python -m clip_export, and the `clip-export` script."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line."""
    from clip_export.commands import app

    for stream in (sys.stdout, sys.stderr):
        # A file name that is no text, or an old code page, must not become a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _interrupt)  # what timeout, docker stop and CI send: clean up as for Ctrl-C
    app(prog_name="clip-export")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
