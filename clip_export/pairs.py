"""Images with their captions, from a folder: what calibration and recall are measured on, and which are held out.

A folder of pairs has one of two files, in UTF-8, one line a pair:

    captions.csv      a header with the columns file and caption (others are passed over), then rows; quotes as in
                      spreadsheets, so that a caption may hold commas and line breaks
    captions.jsonl    {"file": "cat.jpg", "caption": "a cat on a mat"}

Files are relative to the folder and inside it (a link is followed). A file may have several captions, and several files
the same. A third column, or key, label says what the picture is of in a word or two, for zero-shot accuracy; it is
empty where that is not known.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from clip_export.errors import InputError

__all__ = ["Pairs", "find_pairs", "group", "hold_out", "spread"]

_CSV, _JSONL = "captions.csv", "captions.jsonl"
_COLUMNS = ("file", "caption")
_LABEL = "label"
_JSON_HINT = 'write one object a line: {"file": "cat.jpg", "caption": "a cat on a mat"}'
_CSV_HINT = "write the header file,caption, then one row a picture; put a caption with commas in double quotes"
_FILE_HINT = "check the name, or remove the line"
_UTF8_HINT = "convert the file to UTF-8, for instance: iconv -f latin1 -t utf-8 FILE"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Images and what they show: caption i is that of file i. Files are paths with the folder in front.

    `labels` has those of files that have one.
    """

    files: tuple[Path, ...]
    captions: tuple[str, ...]
    labels: Mapping[Path, str] = field(default_factory=dict)


class _Row(NamedTuple):
    line: int  # where it starts, from 1
    file: str
    caption: str
    label: str


def find_pairs(folder: Path) -> Pairs | None:
    """The pairs of `folder`, in the order of its captions file; None where it has none.

    Raises InputError, with file and line, for both captions files at once, for one that cannot be read, and for a line
    that is malformed or repeated, has no caption, names no file inside the folder, or gives a file a second label.
    """
    readers: dict[str, Callable[[Path, str], Iterator[_Row]]] = {_CSV: _csv_rows, _JSONL: _json_rows}
    there = [name for name in readers if os.path.lexists(folder / name)]
    if not there:
        return None
    if len(there) > 1:
        raise InputError(f"{folder} has both {_CSV} and {_JSONL}, expected one", hint="remove one of them")
    path = folder / there[0]
    lines: dict[tuple[Path, str], int] = {}
    labels: dict[Path, str] = {}
    for row in readers[path.name](path, _text(path)):
        pair = _file(path, row), row.caption
        if not row.caption.strip():
            raise _error(path, row.line, f"the caption of {_short(row.file)} is empty", "write one, or remove the line")
        if pair in lines:
            raise _error(path, row.line, f"the same file and caption as line {lines[pair]}", "remove one of them")
        lines[pair] = row.line
        label = row.label.strip()
        if label and labels.setdefault(pair[0], label) != label:
            message = f"{_short(row.file)} is labelled {_short(label)} here, and {_short(labels[pair[0]])} before"
            raise _error(path, row.line, message, "a file has one label")
    if not lines:
        raise InputError(f"{path} has no pairs", hint=_CSV_HINT if path.name == _CSV else _JSON_HINT)
    return Pairs(files=tuple(file for file, _ in lines), captions=tuple(caption for _, caption in lines), labels=labels)


def group(*keys: Sequence[Hashable]) -> list[int]:
    """Which items belong together: for each the number of the first item of its group.

    `keys[k][i]` is what item i is told by in one respect, such as its picture, or its caption. Items that share one
    are of one group, and so is what shares one with any of them: the connected components. Raises ValueError for keys
    of different lengths.
    """
    parents: list[int] = []
    first: dict[tuple[int, Hashable], int] = {}
    for item, values in enumerate(zip(*keys, strict=True)):
        parents.append(item)
        for key in enumerate(values):
            earlier, later = sorted((_root(parents, item), _root(parents, first.setdefault(key, item))))
            parents[later] = earlier
    return [_root(parents, item) for item in range(len(parents))]


def spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` of the numbers 0 to `count`, ascending: the middles of equal parts, int64 [min(count, most)].

    The same on every machine, whatever is numbered; of what is sorted, each kind is taken in its proportion.
    """
    taken = min(count, most)
    # In whole numbers. They are distinct, since a part has at least one item.
    return (2 * np.arange(taken, dtype=np.int64) + 1) * count // max(2 * taken, 1)


def hold_out(groups: Sequence[Hashable], share: float = 0.25, most: int = 256) -> npt.NDArray[np.bool_]:
    """Which items are held out, bool [items], where item i is of `groups[i]`: whole groups, `share` of them.

    They are spread evenly over the groups in the order of their first items, and are fewer where they would have more
    than `most` items. A group that alone has more than `most`, or than `share` of all items, is passed over; where
    every group is as large, the smallest is held out. Of two groups or more, at least one is on each side. Raises
    ValueError for a share outside 0 to 1.
    """
    if not 0 < share < 1 or most < 1:
        raise ValueError(f"a share of {share} and at most {most}, expected between 0 and 1, and at least 1")
    numbers: dict[Hashable, int] = {}
    of_items = np.array([numbers.setdefault(name, len(numbers)) for name in groups], np.int64)
    held: npt.NDArray[np.bool_] = np.zeros(len(numbers), np.bool_)
    if len(numbers) >= 2:
        held[_held_groups(np.bincount(of_items), share, most)] = True
    return held[of_items]


def _held_groups(sizes: npt.NDArray[np.int64], share: float, most: int) -> npt.NDArray[np.int64]:
    """Which of at least two groups with so many items are held out, at least one, but not all."""
    room = min(max(round(float(sizes.sum()) * share), 1), most)
    small = np.flatnonzero(sizes <= room)
    if not len(small):
        return np.flatnonzero(sizes == sizes.min())[:1]
    wanted = min(max(round(len(sizes) * share), 1), len(sizes) - 1, len(small), most)
    choices = (small[spread(len(small), count)] for count in range(wanted, 0, -1))
    return next(chosen for chosen in choices if sizes[chosen].sum() <= most)  # the last has one group, and that fits


def _root(parents: list[int], item: int) -> int:
    while parents[item] != item:
        parents[item] = parents[parents[item]]  # so that the way is half as long for whoever takes it next
        item = parents[item]
    return item


def _text(path: Path) -> str:
    """What the file holds, without a byte-order mark."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="check the file") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(path, line, f"not UTF-8: byte 0x{data[error.start]:02x}", _UTF8_HINT) from error


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1  # a row may take several
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _error(path, line, f"malformed: {error}", _CSV_HINT) from error
        if row is None:
            return
        if not row:
            continue  # an empty line, as at the end of many files
        if header is None:
            header = _header(path, line, row)
            continue
        if len(row) != len(header):
            fields = f"{len(row)} field{'s' * (len(row) > 1)}"
            raise _error(path, line, f"{fields}, expected {len(header)} as in the header", _CSV_HINT)
        label = row[header.index(_LABEL)] if _LABEL in header else ""
        file, caption = (row[header.index(column)] for column in _COLUMNS)
        yield _Row(line, file, caption, label)


def _header(path: Path, line: int, row: list[str]) -> list[str]:
    if any(row.count(column) != 1 for column in _COLUMNS) or row.count(_LABEL) > 1:
        raise _error(
            path, line, f"expected a header with the columns file and caption, found {','.join(row)}", _CSV_HINT
        )
    return row


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # no other break: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _error(path, number, f"not JSON: {error}", _JSON_HINT) from error
        values = fields if isinstance(fields, dict) else {}
        file, caption, label = values.get("file"), values.get("caption"), values.get(_LABEL) or ""
        if not (isinstance(file, str) and isinstance(caption, str)):
            raise _error(path, number, 'expected an object with the strings "file" and "caption"', _JSON_HINT)
        if not caption.isascii():
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                message = f"the caption holds half of a surrogate pair, {caption[error.start]!a}"
                raise _error(path, number, message, "write the character itself, or both halves") from error
        if not isinstance(label, str):
            raise _error(path, number, f"the label is {label!r}, expected a string", _JSON_HINT)
        yield _Row(number, file, caption, label)


def _file(path: Path, row: _Row) -> Path:
    """The file that the row names, with the folder in front. Raises InputError for what is not inside the folder."""
    named = Path(row.file)
    if not row.file.strip():
        raise _error(path, row.line, "the file name is empty", "write one, or remove the line")
    if named.anchor or ".." in named.parts:
        hint = "name files inside the folder, relative to it"
        raise _error(path, row.line, f"{_short(row.file)} is outside {path.parent}", hint)
    found = path.parent / named
    try:
        there = found.is_file()
    except OSError:  # such as a name that is too long; False for what can be no name at all
        there = False
    if not there:
        raise _error(path, row.line, f"{_short(row.file)} is not a file in {path.parent}", _FILE_HINT)
    return found


def _short(name: str) -> str:
    """The name in quotes, with what cannot be printed escaped, and at most 80 characters of it."""
    return repr(name if len(name) <= 80 else f"{name[:79]}…")


def _error(path: Path, line: int, message: str, hint: str) -> InputError:
    return InputError(f"{path}, line {line}: {message}", hint=hint)
