"""clip-export verify: a bundle proves itself on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_export.commands._group import say, say_error
from clip_export.commands._output import print_columns, print_json
from clip_export.commands._progress import Bar

if TYPE_CHECKING:
    from clip_export.comparing import ComparedBundle
    from clip_export.verification import Verification


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    *,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which backend runs it.", show_default="the best that works here")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu or cuda:0.", show_default="what the backend runs on")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Verify this one alone.", show_default="every one there is")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Compare with this checkpoint in float32 torch, or with transformers:DIRECTORY or open_clip:NAME.",
            show_default="the golden samples",
        ),
    ] = None,
    polygraphy: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write the samples as files for NVIDIA's polygraphy.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a bundle prove itself on this machine.

    Replays its golden samples and compares with the reference's outputs. Token ids and pixels have to be equal,
    embeddings to keep the accuracy contract; the exit code is 1 where they are not, and for a precision that missed its
    contract when it was built. A half precision that no GPU runs here is simulated on the CPU, and said to be. Needs no
    torch but for --against, where the golden samples and hostile inputs go through the original too; the exit code is 2
    where that could not be measured.
    """
    import clip_export

    if against is not None:
        _compare(bundle, against, backend=backend, device=device, precision=precision, json=json)
        return
    with Bar() as progress:
        result = clip_export.verify(bundle, backend=backend, device=device, precision=precision, progress=progress)
    if json:
        print_json(result.to_dict())
    else:
        _print(result)
    if polygraphy is not None:
        _write_polygraphy(bundle, polygraphy, precision)
    if not result.passed:
        raise typer.Exit(1)


def _compare(bundle: Path, against: str, *, json: bool, **asked: str | None) -> None:
    from clip_export.comparing import verify_against
    from clip_export.errors import MissingDependencyError

    try:
        with Bar() as progress:
            result = verify_against(bundle, against, progress=progress, **asked)
    except MissingDependencyError as error:
        say_error(error.message, error.hint)
        raise typer.Exit(2) from error
    if json:
        print_json(result.to_dict())
    else:
        _print_compared(result)
    if not result.passed:
        raise typer.Exit(1)


def _print_compared(result: ComparedBundle) -> None:
    for run in result.runs:
        found = run.comparison
        typer.echo(f"{result.name} on {run.title}, {run.precision}, against {found.reference} {found.version}")
        typer.echo()
        for stage in found.stages:
            verdict = "equal" if stage.passed else f"{stage.differing} DIFFER, first {stage.first}"
            typer.echo(f"  {stage.name} of {stage.inputs} inputs: {verdict}")
        table: list[tuple[str, ...]] = [
            ("tower", "inputs", "min cosine", "required", "p1 cosine", "mean cosine", "max abs", "furthest", "")
        ]
        for row in found.rows:
            cosines = (f"{row.min_cosine:.7f}", f"{row.required_cosine:.7g}", f"{row.p1_cosine:.7f}")
            last = (f"{row.mean_cosine:.7f}", f"{row.max_abs:.1e}", row.furthest, "ok" if row.passed else "FAILED")
            table.append((row.tower, str(row.samples), *cosines, *last))
        print_columns(table)
        typer.echo()
    for note in dict.fromkeys([*result.notes, *(note for run in result.runs for note in run.comparison.notes)]):
        typer.echo(note)
    typer.echo("passed" if result.passed else "FAILED")


def _write_polygraphy(bundle: Path, directory: Path, precision: str | None) -> None:
    from clip_export import Bundle
    from clip_export.polygraphy_files import command_lines, write

    opened, chosen = Bundle.open(bundle, check_files=False), precision or "fp32"
    write(opened, directory, precision=chosen)
    say(f"wrote samples for polygraphy to {directory}; compare with")
    # A half graph on a CPU proves nothing, and fp32 attention has no kernel in TensorRT.
    backends = ("onnxruntime",) if chosen == "fp32" else ("tensorrt-rtx", "tensorrt")
    profiles = {plan.tower: plan.profiles for plan in opened.manifest.plans if plan.precision == chosen}
    for line in command_lines(opened, directory, precision=chosen, backends=backends, profiles=profiles):
        say(f"  {line}")


def _print(result: Verification) -> None:
    engines = list(dict.fromkeys(row.engine for row in result.rows))
    typer.echo(f"{result.name} on {'; '.join(engines)}")
    typer.echo()
    table: list[tuple[str, ...]] = [
        ("tower", "output", "precision", "samples", "min cosine", "required", "mean cosine", "max abs", "")
    ]
    for row in result.rows:
        cosines = (f"{row.min_cosine:.7f}", f"{row.required_cosine:.7g}", f"{row.mean_cosine:.7f}")
        verdict = "ok" if row.passed else "FAILED"
        cells = [row.tower, row.output, row.precision, str(row.samples), *cosines, f"{row.max_abs:.1e}", verdict]
        table.append(tuple([*cells, row.engine] if len(engines) > 1 else cells))
    print_columns([(*row, *[""] * (max(map(len, table)) - len(row))) for row in table])
    typer.echo()
    typer.echo("token ids and pixels: equal")  # loading the bundle has compared them; one that differs is an error
    for note in result.notes:
        typer.echo(note)
    for name, missed in result.missed.items():
        typer.echo(f"{name} was published below its contract: {'; '.join(missed)}")
    typer.echo("passed" if result.passed else "FAILED: below the contract")
