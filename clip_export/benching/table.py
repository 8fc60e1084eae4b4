"""A benchmark as text: ratios first, then what they are made of, then what binds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clip_export.benching.advice import advice
from clip_export.benching.end_to_end import EndToEnd
from clip_export.benching.fresh import Opening
from clip_export.benching.results import Result, Row
from clip_export.benching.timing import CONFIDENCE

Cells = tuple[str, ...]
Block = tuple[str, list[Cells]]

_MIB = 2**20
_RESTLESS = 0.1  # of a median: beyond it a figure says little


def blocks(result: Result) -> Iterator[Block]:
    """(title, table) of each part; the first row of a table is its heading, and a table may have no rows."""
    compared = len({row.contestant for row in result.rows}) > 1
    for title, where in dict.fromkeys((row.title, row.where) for row in result.rows):
        rows = [row for row in result.rows if (row.title, row.where) == (title, where)]
        against = f"; times as fast as {result.baseline}" if compared and result.baseline is not None else ""
        yield f"{title}, {where} to {where}{against}", speed_table(rows, result.baseline if compared else None)
    for found in result.end_to_end:
        yield _heading(found), stage_table(found)
        yield advice(found), []
    if result.openings:
        yield "opening in a fresh process, seconds and MiB", opening_table(result.openings)


def closing_lines(result: Result) -> Iterator[str]:
    """What the figures stand on, and who is not in them."""
    for name, ceiling in result.ceilings.items():
        rate = f"{ceiling.flop_per_second / 1e9:.0f} GFLOP/s"
        made = f"{ceiling.library}, {ceiling.dtype}, {ceiling.size} x {ceiling.size}"
        yield f"the limit of {name} is {rate}, the fastest matrix product measured here ({made})"
    if result.rows:
        rounds = [row.timing.rounds for row in result.rows]
        worst = max(row.timing.error for row in result.rows)
        turns = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
        widest = f"the widest of their {CONFIDENCE:.0%} intervals is within {worst:.1%}"
        yield f"medians of {turns} interleaved rounds; {widest}"
        if worst > _RESTLESS:
            yield "others were at work on this machine, so that times waver: measure again when it is calm"
    yield from result.notes
    for name, why in result.left_out.items():
        yield f"left out: {name}: {why}"


def speed_table(rows: Sequence[Row], baseline: str | None) -> list[Cells]:
    """Rows of one block, by batch, the fastest first; with ratios to `baseline` where there is one."""
    heading: Cells = (
        "batch",
        "inputs/s",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "spread",
        "of limit",
        "min cosine",
        "contestant",
    )
    ordered = sorted(rows, key=lambda row: (row.batch, row.timing.median))
    table = [("ratio", f"{CONFIDENCE:.0%} within", *heading) if baseline is not None else heading]
    for row in ordered:
        timing, limit = row.timing, row.of_ceiling
        cells = (
            str(row.batch),
            f"{row.per_second:.1f}",
            *(f"{seconds * 1e3:.2f}" for seconds in (timing.p50, timing.p90, timing.p99)),
            f"{timing.spread:.1%}",
            "-" if limit is None else f"{limit:.1%}",
            f"{row.min_cosine:.6f}",
            row.contestant,
        )
        table.append((*_ratio(row, baseline), *cells) if baseline is not None else cells)
    return table


def stage_table(found: EndToEnd) -> list[Cells]:
    """Stages in the order that an input passes them, then their sum and what the runtime makes of them."""
    rows: list[Cells] = [("stage", "share", "ms an input", "inputs/s")]
    for stage, seconds in found.stages.items():
        rows.append((stage, f"{found.shares[stage]:.1%}", f"{seconds * 1e3:.3f}", f"{1 / seconds:.0f}"))
    rows.append(("one after the other", "", f"{found.total * 1e3:.3f}", f"{1 / found.total:.0f}"))
    rows.append(
        (f"as the runtime does it, {found.threads} threads", "", f"{found.whole * 1e3:.3f}", f"{1 / found.whole:.0f}")
    )
    return rows


def opening_table(openings: Sequence[Opening]) -> list[Cells]:
    """Load times and memory."""
    gpu = any(opening.device_bytes is not None for opening in openings)
    heading = ("cold, to first", "of it opening", "again, warm", "opened", f"peak, batch {openings[0].batch}")
    rows: list[Cells] = [(*heading, *(("GPU",) if gpu else ()), "contestant")]
    for one in openings:
        times = (f"{one.cold:.2f}", f"{one.opening:.2f}", f"{one.warm:.2f}")
        sizes = (_size(one.opened_bytes), _size(one.peak_bytes), *((_size(one.device_bytes),) if gpu else ()))
        rows.append((*times, *sizes, one.contestant))
    return rows


def _ratio(row: Row, baseline: str) -> Cells:
    if row.ratio is None:  # itself, or the baseline could not run this batch
        return ("1" if row.contestant == baseline else "-", "")
    return (f"{row.ratio.ratio:.2f}", f"{row.ratio.low:.2f} to {row.ratio.high:.2f}")


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / _MIB:.0f}"


def _heading(found: EndToEnd) -> str:
    what = "files" if found.tower == "image" else "strings"
    return f"{found.tower}, from {what} to embeddings: {found.inputs} inputs, batch {found.batch}"
