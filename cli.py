"""A door for a checkout: `python cli.py build demo` is `clip-export build demo`."""

from clip_export.__main__ import main

main()
