"""clip-export verify: a bundle proves itself on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_export.commands._output import print_columns, print_json
from clip_export.commands._progress import Bar

if TYPE_CHECKING:
    from clip_export.verification import Verification


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which backend runs it.", show_default="the best that works here")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda:0.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a bundle prove itself on this machine.

    Replays its golden samples and compares with the reference's outputs. Token ids and pixels have to be equal,
    embeddings to keep the accuracy contract; the exit code is 1 where they are not. Needs no torch.
    """
    import clip_export

    with Bar() as progress:
        result = clip_export.verify(bundle, backend=backend, device=device, progress=progress)
    if json:
        print_json(result.to_dict())
    else:
        _print(result)
    if not result.passed:
        raise typer.Exit(1)


def _print(result: Verification) -> None:
    typer.echo(f"{result.name} on {result.backend}, {result.device}")
    typer.echo()
    table = [("tower", "output", "precision", "samples", "min cosine", "required", "mean cosine", "max abs", "")]
    for row in result.rows:
        cosines = (f"{row.min_cosine:.7f}", f"{row.required_cosine:.7g}", f"{row.mean_cosine:.7f}")
        verdict = "ok" if row.passed else "FAILED"
        table.append((row.tower, row.output, row.precision, str(row.samples), *cosines, f"{row.max_abs:.1e}", verdict))
    print_columns(table)
    typer.echo()
    typer.echo("token ids and pixels: equal")  # loading the bundle has compared them; one that differs is an error
    typer.echo("passed" if result.passed else "FAILED: below the contract")
