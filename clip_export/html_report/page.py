"""A report as one page: from `ReportContents` to HTML, and to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path

from clip_export.html_report import numbers
from clip_export.html_report.contents import (
    Check,
    CheckGroup,
    Figure,
    IndexSafety,
    MeasuredRow,
    ReportContents,
    Retrieval,
    Similarities,
    Verdict,
)
from clip_export.html_report.flips import flips
from clip_export.html_report.histogram import Axis, histogram
from clip_export.html_report.markup import Content, Html, cut, element
from clip_export.html_report.matrices import matrices
from clip_export.output_file import staged_file, writing

__all__ = ["page", "write_report"]

FILE = "index.html"
_NAME = 80  # characters of a name in a table

# Nothing is fetched and nothing runs: what a caption smuggled in could not do more than be text.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_HEADLINES: dict[Verdict, str] = {"passed": "Passed", "failed": "Failed", "not measured": "Could not be measured"}
_MARKS: dict[Verdict, str] = {"passed": "✓", "failed": "✗", "not measured": "–"}


def write_report(directory: str | os.PathLike[str], contents: ReportContents) -> Path:
    """Write the report to `directory`/index.html, whole or not at all, and return that path.

    The directory is made where it is missing; a report that is there is replaced. Equal contents give equal bytes.
    Raises OutputError where it cannot be written, ImageError for a picture that cannot be read, ValueError where
    similarities do not have the shape of their images and texts.
    """
    data = page(contents).encode("utf-8")
    path = Path(directory) / FILE
    with writing(directory):
        path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as file, writing(path):
        file.write(data)
    return path


def page(contents: ReportContents) -> str:
    """The whole document."""
    _check_shapes(contents.similarities)
    style = (resources.files("clip_export") / "html_report" / "style.css").read_text(encoding="utf-8")
    title = f"{contents.name}: {_HEADLINES[contents.verdict].lower()}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", cut(title)),
        element("style", Html(style)),
    )
    body = element("body", element("main", _masthead(contents), list(_sections(contents))))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _masthead(contents: ReportContents) -> Html:
    state = contents.verdict.replace(" ", "-")
    return element(
        "header",
        element("p", "clip-export verify · ", element("bdi", cut(contents.name)), class_="faint"),
        element(
            "h1",
            element("span", _MARKS[contents.verdict], class_="mark", aria_hidden="true"),
            _HEADLINES[contents.verdict],
        ),
        [element("p", sentence) for sentence in contents.sentences],
        class_=f"masthead {state}",
    )


def _sections(contents: ReportContents) -> list[Html]:
    made = [
        _section("Accuracy", _accuracy(contents.rows)),
        *(_section(group.title, [_checks(group)]) for group in contents.checks),
        _section("Similarities", [_titled(matrices, shown) for shown in contents.similarities]),
        _section("Retrieval", [_retrieval(found) for found in contents.retrievals]),
        _section("Index", [_index(found) for found in contents.indexes]),
        _section("Not measured", _listed(contents.unmeasured)),
        _section("Notes", _listed(contents.notes)),
        _section("Environment", _environment(contents)),
    ]
    return [section for section in made if section is not None]


def _listed(sentences: Sequence[str]) -> list[Html]:
    return [element("ul", [element("li", sentence) for sentence in sentences])] if sentences else []


def _section(title: str, blocks: Sequence[Html]) -> Html | None:
    return element("section", element("h2", cut(title)), blocks) if blocks else None


def _titled(draw: Callable[[Similarities], Html], shown: Similarities) -> Html:
    return element("div", element("h3", element("bdi", cut(shown.engine))), draw(shown))


# Accuracy


def _accuracy(rows: Sequence[MeasuredRow]) -> list[Html]:
    if not rows:
        return []
    columns = ("output", "verdict", "min cosine", "required", "1st percentile", "mean", "max abs", "samples")
    head = _head(columns, numbers_from=2)
    groups = groupby(rows, key=lambda row: (row.precision, row.engine))
    bodies = [_engine_rows(precision, engine, list(members), len(columns)) for (precision, engine), members in groups]
    drawn = [row for row in rows if row.cosines.size]
    axis = Axis.of(drawn)
    charts = [element("div", [histogram(row, axis) for row in drawn], class_="charts")] if drawn else []
    return [_scrolled("Accuracy", element("table", head, bodies)), *charts]


def _engine_rows(precision: str, engine: str, rows: Sequence[MeasuredRow], width: int) -> Html:
    name = [element("b", cut(precision, _NAME)), " ", element("bdi", cut(engine))]
    title = element("tr", element("th", name, colspan=width, scope="rowgroup"), class_="group")
    return element("tbody", title, [_row(row) for row in rows])


def _row(row: MeasuredRow) -> Html:
    figures = (
        numbers.cosine(row.min_cosine),
        f"{row.required_cosine:.7g}",
        numbers.cosine(row.p1_cosine),
        numbers.cosine(row.mean_cosine),
        numbers.scientific(row.max_abs),
        f"{row.samples:,}",
    )
    return element(
        "tr",
        element("th", cut(f"{row.tower} {row.output}", _NAME), scope="row"),
        element("td", _mark(row.passed)),
        [element("td", figure, class_="number") for figure in figures],
        class_=None if row.passed else "failing",
    )


def _mark(passed: bool | None) -> Html:
    """Said in a word as well as by colour and sign."""
    if passed is None:
        return element("span", "– not measured", class_="not-measured")
    return element("span", "✓ passed" if passed else "✗ FAILED", class_="passed" if passed else "failed")


# Checks


def _checks(group: CheckGroup) -> Html:
    counts = [sum(1 for check in group.checks if check.passed is wanted) for wanted in (True, False, None)]
    told = [f"{counts[0]} of {len(group.checks)} passed"]
    told += [f"{counts[1]} failed"] * bool(counts[1]) + [f"{counts[2]} could not be measured"] * bool(counts[2])
    # What needs attention stands first and open; the rest is there for who wants to see what was tried.
    troubled = [check for check in group.checks if check.passed is not True]
    fine = [check for check in group.checks if check.passed is True]
    blocks = [_check_table(group.title, troubled)] if troubled else []
    if fine:
        summary = element("summary", f"{len(fine)} that passed")
        blocks.append(element("details", summary, _check_table(group.title, fine)))
    return element("div", element("p", ", ".join(told) + "."), blocks)


def _check_table(title: str, checks: Sequence[Check]) -> Html:
    rows = [
        element(
            "tr",
            element("th", element("bdi", cut(check.name)), scope="row"),
            element("td", _mark(check.passed)),
            element("td", element("bdi", cut(check.detail)), class_="prose"),
        )
        for check in checks
    ]
    return _scrolled(title, element("table", _head(("what", "verdict", "detail")), element("tbody", rows)))


# Retrieval and index


def _retrieval(found: Retrieval) -> Html:
    return element(
        "div",
        element("h3", element("bdi", cut(found.engine))),
        element("p", f"{found.pairs:,} pairs."),
        _figures("Retrieval", found.figures),
        [element("p", note) for note in found.notes],
        flips(found.flips),
    )


def _figures(title: str, figures: Sequence[Figure]) -> Html | None:
    """A table without the columns that would be empty."""
    if not figures:
        return None
    compared = any(figure.reference is not None for figure in figures)
    judged = any(figure.passed is not None for figure in figures)
    columns = ("figure", *(("reference", "engine", "difference") if compared else ("value",)))
    rows = [
        element(
            "tr",
            element("th", cut(figure.name, _NAME), scope="row"),
            [element("td", text, class_="number") for text in _written(figure, compared=compared)],
            element("td", None if figure.passed is None else _mark(figure.passed)) if judged else None,
        )
        for figure in figures
    ]
    head = _head(columns, ["verdict"] if judged else [], numbers_from=1)
    return _scrolled(title, element("table", head, element("tbody", rows)))


def _written(figure: Figure, *, compared: bool) -> tuple[str, ...]:
    write, minus = (numbers.percent, numbers.points) if figure.share else (numbers.plain, numbers.change)
    reference, found = ("" if value is None else write(value) for value in (figure.reference, figure.found))
    if not compared:
        return (found,)
    if figure.reference is None or figure.found is None:
        return reference, found, ""
    return reference, found, minus(figure.found - figure.reference)


def _index(found: IndexSafety) -> Html:
    state = found.verdict.replace(" ", "-")
    mark = element("span", f"{_MARKS[found.verdict]} {_HEADLINES[found.verdict]}", class_=state)
    return element(
        "div",
        element("h3", element("bdi", cut(found.engine))),
        element("p", mark, ". ", found.sentence),
        _figures("Index", found.figures),
    )


# Environment


def _environment(contents: ReportContents) -> list[Html]:
    pairs = [
        element("div", element("dt", name), element("dd", element("bdi", value)))
        for name, value in contents.environment
    ]
    blocks = [element("dl", pairs)] if pairs else []
    if contents.command:
        command = element("pre", element("bdi", contents.command), tabindex=0, aria_label="The command")
        blocks += [element("p", "Made by"), command]
    return blocks


def _head(names: Sequence[str], more: Sequence[str] = (), *, numbers_from: int = 99) -> Html:
    """Headings; those of numbers, from that place on, stand above their last digits, and `more` after them do not."""
    kinds = [*("number" if place >= numbers_from else None for place in range(len(names))), *(None for _ in more)]
    cells = [element("th", name, scope="col", class_=kind) for name, kind in zip([*names, *more], kinds, strict=True)]
    return element("thead", element("tr", cells))


def _scrolled(title: str, table: Content) -> Html:
    """A table wider than a phone moves by itself, with the keyboard too, and not the page."""
    return element("div", table, class_="scroll", role="region", tabindex=0, aria_label=title)


def _check_shapes(similarities: Sequence[Similarities]) -> None:
    for shown in similarities:
        expected = (len(shown.images), len(shown.texts))
        if shown.reference.shape != expected or shown.found.shape != expected or 0 in expected:
            shapes = f"{list(shown.reference.shape)} and {list(shown.found.shape)}"
            raise ValueError(f"similarities of {shapes}, expected {list(expected)}, and at least one of each")
