"""clip-export explain: where a variant and its reference part, stage by stage, on one input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_export.commands._group import NOT_MEASURED, say_error
from clip_export.commands._output import print_columns, print_json, print_line
from clip_export.errors import ClipExportError

if TYPE_CHECKING:
    from clip_export.explaining import Explanation, LayerRanges, Stage

_SHOWN = 80  # characters of the input


def explain(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    *,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which one to explain.", show_default="the only one beside fp32"),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Walk this text.", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Walk this picture.", show_default=False)] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Compare with this checkpoint in float32 torch, fp32 by default.",
            show_default="the fp32 graph of the bundle",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a precision and its reference part, on one text or one picture.

    Walks cleaning, token ids, pixels, embedding, every block, pooling and projection, and names the first stage that
    errs by more than its tolerance, with what its layer reads and holds, the likely cause, and what to do. Every stage
    is given what the reference gives to it, so the stage that is named is the one that errs. Half and 8-bit precisions
    are simulated on the CPU. Needs torch for --against alone. The exit code is 1 where they part, 2 where that could
    not be measured.
    """
    from clip_export.explaining import explain as walk

    try:
        found = walk(bundle, text=text, image=image, precision=precision, against=against)
    except ClipExportError as error:
        say_error(error.message, error.hint)
        raise typer.Exit(NOT_MEASURED) from error
    if json:
        print_json(found.to_dict())
    else:
        _print(found)
    if not found.passed:
        raise typer.Exit(1)


def _print(found: Explanation) -> None:
    typer.echo(f"{found.bundle}, {found.tower}: {found.variant}")
    typer.echo(f"against {found.reference}")
    print_columns([("input", found.input if len(found.input) <= _SHOWN else f"{found.input[:_SHOWN]} …")])
    typer.echo()
    header = ("stage", "worst layer", "own error", "allowed", "error so far", "cosine so far", "max abs", "")
    print_columns([header, *(_row(stage, found) for stage in found.stages)])
    typer.echo()
    if found.ranges is not None:
        print_columns(_ranges(found.ranges))
        typer.echo()
    for note in found.notes:
        print_line(f"note: {note}")
    for sentence in found.sentences:
        print_line(sentence)


def _row(stage: Stage, found: Explanation) -> tuple[str, ...]:
    verdict = "ok" if stage.passed else "PARTS" if stage is found.first else "parts"
    layer = stage.blamed
    if layer is None:
        return stage.name, stage.detail, "", "", "", "", "", verdict
    errors = (f"{layer.own_error:.1e}", f"{layer.tolerance:.1e}", f"{layer.error:.1e}")
    return stage.name, layer.name, *errors, f"{layer.cosine:.7f}", f"{layer.max_abs:.1e}", verdict


def _ranges(ranges: LayerRanges) -> list[tuple[str, str]]:
    """What the worst layer reads, gives and can hold."""
    rows = [("worst layer", ranges.layer)]
    if not math.isnan(ranges.input):
        rows.append(("reads", f"up to {ranges.input:.4g}, its median channel up to {ranges.typical_input:.4g}"))
    # In 8 bits that is of what it reads, in half of what it gives.
    held = [] if ranges.held is None else [("can hold", f"up to {ranges.held:.4g}")]
    if ranges.step is not None:
        rows += [*held, ("8-bit step", f"{ranges.step:.4g}; {ranges.clipped:.2%} of what it reads is clipped")]
    rows += [("gives", f"up to {ranges.output:.4g}"), *(held if ranges.step is None else [])]
    return rows
