"""How commands print: columns that line up without colour, sizes with units, and JSON that is nothing but JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import typer

from clip_export.json_text import json_text

_MARGIN, _GAP = "  ", "  "
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(data: Any) -> None:
    """`data` as JSON on stdout: ASCII, so that it is right in every encoding; a number that is not finite is null."""
    typer.echo(json_text(data))


def print_line(text: str) -> None:
    """`text` on stdout, whatever file names and captions in it hold."""
    typer.echo(printable(text))


def print_columns(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> None:
    """`rows` with their columns below each other; `numbers` sets every column but the first to the right."""
    table = _cells(rows)
    widths = _widths(table)
    for row in table:
        cells = [_aligned(*cell, right=numbers and i > 0) for i, cell in enumerate(zip(row, widths, strict=True))]
        typer.echo(f"{_MARGIN}{_GAP.join(cells)}".rstrip())


def columns_width(rows: Iterable[Sequence[str]]) -> int:
    """How many terminal cells `print_columns` needs."""
    widths = _widths(_cells(rows))
    return len(_MARGIN) + sum(widths) + len(_GAP) * (len(widths) - 1)


def printable(text: str) -> str:
    """`text` without the control characters that file names and texts can carry to a terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def _cells(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[printable(cell.replace("\n", " ")) for cell in row] for row in rows]


def _widths(table: list[list[str]]) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, column)) for column in zip(*table, strict=True)]


def _aligned(cell: str, width: int, *, right: bool) -> str:
    from rich.cells import cell_len

    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def size_text(size: int) -> str:
    """A number of bytes with its unit: 61.2 MiB."""
    value, unit = float(size), 0
    while value >= 1024 and unit + 1 < len(_UNITS):
        value, unit = value / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
