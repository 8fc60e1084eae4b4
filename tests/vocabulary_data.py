"""Where clip_export/vocabulary/ comes from: CLIP's merges, and the character classes that CLIP's word pattern means.

    python tests/vocabulary_data.py        # writes the package data again; the tests compare what is there with this

The merges are read from open_clip's copy of OpenAI's file. The character classes are asked from the `regex` module,
which both originals use, one code point at a time and with their IGNORECASE flag: nothing is taken from its tables.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

import regex

VOCABULARY = Path(__file__).parent.parent / "clip_export" / "vocabulary"
MERGES = 49152 - 256 - 2  # a first line is a heading, and of what follows CLIP uses this many
CLASSES = {"letters": r"[\p{L}]+", "numbers": r"[\p{N}]", "others": r"[^\s\p{L}\p{N}]+"}  # the parts of CLIP's pattern


def open_clip_merges() -> list[str]:
    """CLIP's merges as "left right", best first, from the open_clip package (found, not imported)."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None, "install the dev extra: open_clip is needed"
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    return gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]


def unicode_classes() -> dict[str, str]:
    """Each class as space-separated hexadecimal ranges. `separators` is what none of the others takes."""
    members = {name: _matching(pattern) for name, pattern in CLASSES.items()}
    taken = set().union(*members.values())
    assert sum(map(len, members.values())) == len(taken), "the classes overlap: their order would matter"
    separators = sorted(set(range(0x110000)) - taken)
    return {
        "unicode": _unicode_version(),
        "source": f"regex {importlib.metadata.version('regex')}",
        "letters": _ranges(members["letters"]),
        "numbers": _ranges(members["numbers"]),
        "separators": _ranges(separators),
    }


def _matching(pattern: str) -> list[int]:
    matcher = regex.compile(pattern, regex.IGNORECASE)
    return [code for code in range(0x110000) if matcher.fullmatch(chr(code))]


def _ranges(codes: list[int]) -> str:
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return " ".join(f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in ranges)


def _unicode_version() -> str:
    found = re.search(r"supports Unicode ([\d.]+\d)", importlib.metadata.metadata("regex").get_payload())
    assert found, "the regex package no longer says which Unicode it supports"
    return found.group(1)


def main() -> int:
    """Write merges.txt.gz and unicode_classes.json, the same bytes each time."""
    merges = "\n".join(open_clip_merges()).encode("utf-8")
    (VOCABULARY / "merges.txt.gz").write_bytes(gzip.compress(merges, 9, mtime=0))
    classes = json.dumps(unicode_classes(), indent=1)
    (VOCABULARY / "unicode_classes.json").write_text(classes + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
