"""Writes the tables of the C++ tokenizer (cpp/src/tables/*.inc) by asking the libraries that Python tokenizes with.

    python tests/cpp_tables.py            # writes them again, to the same bytes

A library of Unicode has the version of Unicode that it has; what decides on ids are Python's `str.lower`, `str.split`
and `unicodedata`, the tables of ftfy, and those inside the tokenizers library. So nothing here reads a Unicode file:
each table is what one of these does to each code point. tests/test_cpp_tokenizer.py compares the files with this.
"""

from __future__ import annotations

import html.entities
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ftfy.badness
import ftfy.chardata
from tokenizers import Regex, normalizers, pre_tokenizers

FOLDER = Path(__file__).parents[1] / "cpp" / "src" / "tables"
POINTS = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
HEAD = "// Written by tests/cpp_tables.py; do not edit.\n"


def tables() -> dict[str, str]:
    """File name -> content of every table."""
    return {"unicode.inc": _unicode(), "entities.inc": entities(), "ftfy.inc": _ftfy()}


def ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted code points as (first, last) pairs."""
    found: list[tuple[int, int]] = []
    for code in sorted(points):
        if found and found[-1][1] == code - 1:
            found[-1] = found[-1][0], code
        else:
            found.append((code, code))
    return found


def _unicode() -> str:
    letters, numbers, spaces = (_library_class(pattern) for pattern in (r"\p{L}", r"\p{N}", r"\s"))
    python_lower = {code: low for code in POINTS if (low := chr(code).lower()) != chr(code)}
    library_lower = _library_map(normalizers.Lowercase())
    cased = {code for code in POINTS if (chr(code) + "Σ").lower().endswith("ς")}
    ignorable = {code for code in POINTS if ("A" + chr(code) + "Σ").lower().endswith("ς")} - cased
    parts = [
        HEAD,
        "// \\p{L}, \\p{N} and \\s of the tokenizers library.\n",
        _ranges("library_letters", letters),
        _ranges("library_numbers", numbers),
        _ranges("library_spaces", spaces),
        "// str.isprintable of Python.\n",
        _ranges("python_printable", (code for code in POINTS if chr(code).isprintable())),
        "// What str.split and str.strip of Python take for white space, and \\d of its re.\n",
        _ranges("python_spaces", (code for code in POINTS if chr(code).isspace())),
        _ranges("python_digits", (code for code in POINTS if re.fullmatch(r"\d", chr(code)))),
        "// What str.lower looks for around a capital sigma.\n",
        _ranges("python_cased", cased),
        _ranges("python_case_ignorable", ignorable),
        "// Lower case: of Python's str.lower, and of the tokenizers library. One code point, U+0130, becomes two.\n",
        _shifts("python_lower_shifts", python_lower),
        _shifts("library_lower_shifts", library_lower),
        *_normalization(),
    ]
    return "".join(parts)


def _library_class(pattern: str) -> set[int]:
    """The code points that the library's regular expressions take for `pattern`."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    found: set[int] = set()
    for some in _batched(POINTS, 4096):
        text = "".join(map(chr, some))
        for _, (start, end) in split.pre_tokenize_str(text):
            found |= set(map(ord, text[start:end]))
    return found


def _batched(items: list[int], size: int) -> Iterable[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _library_map(normalizer: Any) -> dict[int, str]:
    return {code: new for code in POINTS if (new := normalizer.normalize_str(chr(code))) != chr(code)}


def _normalization() -> list[str]:
    """Python's decompositions, compositions and combining classes, and which the library's older Unicode lacks."""
    hangul = range(0xAC00, 0xAC00 + 11172)
    whole = {code: new for code in POINTS if code not in hangul and (new := _nfd(chr(code))) != chr(code)}
    pairs = {
        (ord(first), ord(new[-1])): code
        for code, new in whole.items()
        if len(new) > 1 and _nfc(chr(code)) == chr(code) and len(first := _nfc(new[:-1])) == 1
    }
    classes = {code: value for code in POINTS if (value := unicodedata.combining(chr(code)))}
    decompositions = "".join(
        f"{{{code}, {{{', '.join(str(ord(char)) for char in new)}}}}},\n" for code, new in sorted(whole.items())
    )
    compositions = "".join(f"{{{a}, {b}, {code}}},\n" for (a, b), code in sorted(pairs.items()))
    spans = [
        (first, last, value)
        for value in sorted(set(classes.values()))
        for first, last in ranges(code for code, found in classes.items() if found == value)
    ]
    combining = "".join(f"{{{first}, {last}, {value}}},\n" for first, last, value in sorted(spans))
    return [
        "// Canonical decompositions (without Hangul), compositions and combining classes of Python's unicodedata.\n",
        f"constexpr Decomposition decompositions[] = {{\n{decompositions}}};\n",
        f"constexpr Composition compositions[] = {{\n{compositions}}};\n",
        f"constexpr CombiningRange combining_ranges[] = {{\n{combining}}};\n",
        "// What of these the tokenizers library does not know: its Unicode is older.\n",
        _ranges("unknown_to_library", _unknown_to_library(set(whole), classes)),
    ]


def _unknown_to_library(whole: set[int], classes: dict[int, int]) -> set[int]:
    """Code points that it leaves as they are, and marks that it does not put in order among others."""
    library = normalizers.NFD().normalize_str
    unknown = {code for code in whole if library(chr(code)) == chr(code)}
    assert all(library(chr(code)) == _nfd(chr(code)) for code in whole - unknown)
    low, high = "\u0334", "\u0345"  # of the least and the greatest class, 1 and 240
    for code in classes.keys() - whole:
        char = chr(code)
        if library(char + low) != low + char and library(high + char) != char + high:
            unknown.add(code)
    marks = {value: chr(code) for code, value in sorted(classes.items()) if code not in unknown | whole}
    for code in classes.keys() - unknown - whole:
        for text in (f"{a}{b}" for mark in marks.values() for a, b in ((chr(code), mark), (mark, chr(code)))):
            assert library(text) == _nfd(text), f"U+{code:04X} is of another class in the library"
    return unknown


def _nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def entities() -> str:
    """HTML's references as html.unescape has them, and those in capitals that ftfy adds."""
    html5 = dict(html.entities.html5)
    plain = {f"&{name}" for name in html5}
    upper = {name[1:]: new for name, new in ftfy.chardata.HTML_ENTITIES.items() if name not in plain}
    changed = {name[1:]: new for name, new in ftfy.chardata.HTML_ENTITIES.items() if html5.get(name[1:], new) != new}
    assert not changed, "an entity that ftfy reads in another way"
    return HEAD + _strings("html5_entities", html5) + _strings("ftfy_upper_entities", upper)


def _strings(name: str, entries: dict[str, str]) -> str:
    lines = "".join(f'{{"{key}", {_literal(new)}}},\n' for key, new in sorted(entries.items()))
    return f"constexpr Entity {name}[] = {{\n{lines}}};\n"


def _literal(text: str) -> str:
    """A C string of UTF-8; octal escapes have at most three digits, so none runs into what follows."""
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode("utf-8")) + '"'


def _ftfy() -> str:
    data = ftfy.chardata
    controls = [code for code, new in data.CONTROL_CHARS.items() if new is None]
    return "".join(
        [
            HEAD,
            _replacements("ftfy_ligatures", data.LIGATURES),
            _replacements("ftfy_widths", data.WIDTH_MAP),
            _ranges("ftfy_controls", controls),
            _badness(),
        ]
    )


def _replacements(name: str, entries: dict[int, str]) -> str:
    lines = "".join(
        f"{{{code}, {{{', '.join(str(ord(c)) for c in new)}}}}},\n" for code, new in sorted(entries.items())
    )
    return f"constexpr Replacement {name}[] = {{\n{lines}}};\n"


def _ranges(name: str, points: Iterable[int]) -> str:
    spans = "".join(f"{{{first}, {last}}},\n" for first, last in ranges(points))
    return f"constexpr Range {name}[] = {{\n{spans}}};\n"


def _shifts(name: str, mapping: dict[int, str]) -> str:
    """Runs of code points, every one or every other, that move by the same distance."""
    single = {code: ord(new) - code for code, new in mapping.items() if len(new) == 1}
    assert {code: new for code, new in mapping.items() if len(new) != 1} == {0x130: "i\u0307"}
    runs: list[list[int]] = []  # first, last, step, shift
    for code, shift in sorted(single.items()):
        last = runs[-1] if runs else None
        gap = code - last[1] if last else 0
        if last and last[3] == shift and gap in (1, 2) and (last[0] == last[1] or gap == last[2]):
            last[1], last[2] = code, gap
        else:
            runs.append([code, code, 1, shift])
    lines = "".join("{" + ", ".join(map(str, run)) + "},\n" for run in runs)
    return f"constexpr Shift {name}[] = {{\n{lines}}};\n"


# ftfy's regular expression for what looks like mojibake, as an automaton that reads one code point after the other.

Nfa = list[list[tuple[frozenset[int] | None, int]]]


def _badness() -> str:
    tree = re._parser.parse(ftfy.badness.BADNESS_RE.pattern, ftfy.badness.BADNESS_RE.flags)  # type: ignore[attr-defined]
    category = {"CATEGORY_SPACE": _matching(r"\s"), "CATEGORY_WORD": _matching(r"\w")}
    nfa: Nfa = [[], []]
    anchored: list[int] = []
    _add(tree, nfa, (0, 1), category, anchored)
    atoms = {atom for arcs in nfa for atom, _ in arcs if atom is not None}
    member: dict[int, list[int]] = {code: [] for code in range(0x110000)}
    ordered = sorted(atoms, key=lambda atom: (len(atom), min(atom)))
    for number, atom in enumerate(ordered):
        for code in atom:
            member[code].append(number)
    kinds = {key: number for number, key in enumerate(dict.fromkeys(tuple(found) for found in member.values()))}
    kind_of = [kinds[tuple(member[code])] for code in range(0x110000)]
    states, rows = _determined(nfa, anchored, [frozenset(ordered[n] for n in key) for key in kinds])
    spans: list[tuple[int, int]] = []
    for code, kind in enumerate(kind_of):
        if not spans or spans[-1][1] != kind:
            spans.append((code, kind))
    lines = "".join(f"{{{first}, {kind}}},\n" for first, kind in spans)
    table = "".join("{" + ", ".join(map(str, row)) + "},\n" for row in rows)
    return (
        f"// Kinds of code points: from the first on. Then state -> kind -> state; 255 is a match.\n"
        f"constexpr Kind bad_kinds[] = {{\n{lines}}};\n"
        f"constexpr std::uint8_t bad_states[{states}][{len(kinds)}] = {{\n{table}}};\n"
    )


def _matching(pattern: str) -> frozenset[int]:
    compiled = re.compile(pattern)
    return frozenset(code for code in range(0x110000) if compiled.fullmatch(chr(code)))


def _add(tree: Any, nfa: Nfa, ends: tuple[int, int], category: dict[str, frozenset[int]], anchored: list[int]) -> None:
    """Arcs from one of `ends` to the other for re's parsed nodes; an arc without an atom takes no code point."""
    start, end = ends
    nodes = list(tree)
    for position, (kind, value) in enumerate(nodes):
        name, last = str(kind), position == len(nodes) - 1
        after = end if last else _new(nfa)
        if name == "BRANCH":
            for branch in value[1]:
                _add(branch, nfa, (start, after), category, anchored)
        elif name == "SUBPATTERN":
            _add(value[3], nfa, (start, after), category, anchored)
        elif name == "MAX_REPEAT":
            assert value[:2] == (0, 1), value
            _add(value[2], nfa, (start, after), category, anchored)
            nfa[start].append((None, after))
        elif name == "AT":
            assert str(value) == "AT_BEGINNING" and start == 0, value
            anchored.append(after)
        else:
            nfa[start].append((_atom(name, value, category), after))
        start = after
    if not nodes:
        nfa[start].append((None, end))


def _new(nfa: Nfa) -> int:
    nfa.append([])
    return len(nfa) - 1


def _atom(name: str, value: Any, category: dict[str, frozenset[int]]) -> frozenset[int]:
    everything = frozenset(range(0x110000))
    if name == "ANY":
        return everything - {ord("\n")}
    if name == "LITERAL":
        return frozenset([value])
    assert name == "IN", name
    found: set[int] = set()
    negated = False
    for kind, item in value:
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                found.add(item)
            case "RANGE":
                found |= set(range(item[0], item[1] + 1))
            case "CATEGORY":
                found |= category[str(item)]
            case other:
                raise AssertionError(other)
    return everything - found if negated else frozenset(found)


def _determined(nfa: Nfa, anchored: list[int], kinds: list[frozenset[frozenset[int]]]) -> tuple[int, list[list[int]]]:
    """The automaton that searches: it is in the start as well, whatever it has read; the first state is the text's."""

    def closed(states: Iterable[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            for atom, target in nfa[todo.pop()]:
                if atom is None and target not in found:
                    found.add(target)
                    todo.append(target)
        return frozenset(found)

    first = closed([0, *anchored])
    numbers = {first: 0}
    rows: list[list[int]] = []
    todo = [first]
    while todo:
        here = todo.pop(0)
        row = []
        for atoms in kinds:
            reached = closed(
                [0, *(target for s in here for atom, target in nfa[s] if atom is not None and atom in atoms)]
            )
            if 1 in reached:
                row.append(255)
                continue
            if reached not in numbers:
                numbers[reached] = len(numbers)
                todo.append(reached)
            row.append(numbers[reached])
        rows.append(row)
    assert len(numbers) < 255 > len(kinds), (len(numbers), len(kinds))
    return len(numbers), rows


def main() -> None:
    for name, content in tables().items():
        (FOLDER / name).write_text(content, encoding="ascii")
        sys.stdout.write(f"{FOLDER / name}: {len(content)} bytes\n")


if __name__ == "__main__":
    main()
