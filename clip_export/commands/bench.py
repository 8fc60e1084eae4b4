"""clip-export bench: how fast a bundle is on this machine, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_export.commands._group import NOT_MEASURED, say, say_error, surviving_readers
from clip_export.commands._output import print_columns, print_line
from clip_export.commands._progress import Bar
from clip_export.errors import ClipExportError

if TYPE_CHECKING:
    from clip_export.benching.results import Result


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    *,
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Which backends run it.", show_default="the best that works here"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAMES", help="In which precisions.", show_default="what is loaded by default")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu or cuda:0.", show_default="what the backend runs on")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="SIZES", help="Inputs a call.")] = "1,8,64",
    lengths: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Of texts: natural, or numbers of tokens, as in natural,77.")
    ] = "natural",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With torch, compile, transformers, onnxruntime.",
            show_default="torch,compile,transformers where --checkpoint is given",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="What the bundle was built from, for torch.", show_default=False),
    ] = None,
    end_to_end: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Pictures, and captions.csv, to time every stage from files on.", show_default=False
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON to FILE.", show_default=False)] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw throughput to FILE (.png).", show_default=False)
    ] = None,
) -> None:
    """Measure a bundle on this machine.

    Latency and throughput of each tower at each batch size, in rounds that take everybody in turn, beside torch and
    transformers where they are asked for: ratios first, each with its interval. Percentages are of the fastest matrix
    product that this machine reaches. The exit code is 2 where something that was asked of the bundle could not be
    measured, as on a GPU that is not here.
    """
    from clip_export.benching.measuring import bench as measure
    from clip_export.output_file import check_place

    asked = ("torch,compile,transformers" if checkpoint is not None else "") if compare is None else compare
    sizes = _sizes(batch)
    try:
        for place in filter(None, (json, plot)):
            check_place(place)
        with Bar() as progress:
            result = measure(
                bundle,
                backends=_names(backend) or [None],
                precisions=_names(precision) or [None],
                device=device,
                batches=sizes,
                lengths=_names(lengths),
                compare=_names(asked),
                checkpoint=checkpoint,
                end_to_end=end_to_end,
                progress=progress,
            )
        _write(result, json, plot)
    except ClipExportError as error:
        say_error(error.message, error.hint)
        raise typer.Exit(NOT_MEASURED) from error
    with surviving_readers():
        _print(result)
    if not result.measured:
        say("error: not everything that was asked for could be measured")
        say("\nhint: see above why, and what clip-export doctor says of this machine")
        raise typer.Exit(NOT_MEASURED)


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _sizes(text: str) -> list[int]:
    parts = _names(text)
    if not parts or not all(part.isascii() and part.isdigit() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(f"expected sizes such as 1,8,64, found {text!r}", param_hint="'--batch'")
    return sorted({int(part) for part in parts})


def _print(result: Result) -> None:
    from clip_export.benching.table import blocks, closing_lines

    machine = result.machine
    gpu = "" if machine["gpu"] is None else f", {machine['gpu'].get('name', 'a GPU')}"
    typer.echo(f"{result.bundle} on {machine['cpu']}, {machine['cpus']} CPUs{gpu}")
    for title, rows in blocks(result):
        typer.echo(f"\n{title}")
        if rows:
            print_columns(rows)
    if result.rows:
        typer.echo()
    for line in closing_lines(result):
        print_line(line)


def _write(result: Result, json: Path | None, plot: Path | None) -> None:
    if json is not None:
        from clip_export.benching.results import write_json

        write_json(result, json)
        say(f"written: {json}")
    if plot is not None and result.rows:
        from clip_export.benching.chart import draw

        draw(result, plot)
        say(f"drawn: {plot}")
