"""python -m clip_export, and the `clip-export` script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    from clip_export.commands import app

    for stream in (sys.stdout, sys.stderr):
        # A file name that is no text, or an old code page, must not become a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="clip-export")


if __name__ == "__main__":
    main()
