"""clip-export verify: a bundle proves itself on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_export.commands._group import NOT_MEASURED, say, say_error, surviving_readers
from clip_export.commands._output import print_json
from clip_export.commands._progress import Bar
from clip_export.commands._verification import print_verification
from clip_export.errors import BundleIntegrityError, ClipExportError

if TYPE_CHECKING:
    from clip_export.verifying import IndexInputs, Verification


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
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="PAIRS",
            help="Rank pictures and captions: a folder with captions.csv or .jsonl, a .tar (WebDataset), or demo.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy",
            help="Say whether new vectors may be mixed with these, which were made of --images or --texts.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH...", help="Images or folders that --index was made of.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The texts that --index was made of, one a line.", show_default=False),
    ] = None,
    golden_only: Annotated[
        bool, typer.Option("--golden-only", help="Leave out hostile inputs, batches and threads.")
    ] = False,
    min_cosine: Annotated[
        float | None, typer.Option(metavar="X", help="The least cosine.", show_default="the contract of each precision")
    ] = None,
    max_recall_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="By how much R@1 may fall.", show_default="the contract of each precision"),
    ] = None,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave out pictures of --pairs that cannot be used.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a page, and all figures as JSON, to DIR.", show_default=False),
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

    Replays its golden samples and compares with the reference's outputs; then tries hostile inputs, every batch of
    every profile, any company in a batch, and threads. Token ids and pixels have to be equal, embeddings to keep the
    accuracy contract. A half or 8-bit precision that no GPU runs here is simulated on the CPU, and said to be. Needs no
    torch but for --against. The exit code is 1 where something is not as it has to be, also for a precision that missed
    its contract when it was built, and 2 where something that was asked for could not be measured.
    """
    import clip_export

    try:
        if report is not None:
            _check_place(report)
        with Bar() as progress:
            found = clip_export.verify(
                bundle,
                backend=backend,
                device=device,
                precision=precision,
                against=against,
                pairs=pairs,
                index=index,
                inputs=_inputs(images, texts),
                hostile=not golden_only,
                min_cosine=min_cosine,
                max_recall_drop=max_recall_drop,
                skip_errors=skip_errors,
                progress=progress,
            )
    except BundleIntegrityError:
        raise  # what the bundle has is not what it was: that has been measured
    except ClipExportError as error:
        say_error(error.message, error.hint)
        raise typer.Exit(NOT_MEASURED) from error
    # Files first: whoever reads what is printed may have had enough of it, as head has.
    written = all(
        [
            report is None or _done(lambda: _write_report(found, bundle, report, pairs)),
            polygraphy is None or _done(lambda: _write_polygraphy(bundle, polygraphy, precision)),
        ]
    )
    with surviving_readers():
        if json:
            print_json(found.to_dict())
        else:
            print_verification(found)
    if found.verdict == "failed":
        raise typer.Exit(1)
    if not (found.passed and written):
        raise typer.Exit(NOT_MEASURED)


def _done(write: Callable[[], None]) -> bool:
    """Whether a file could be written; an error that says why not takes nothing from what was found."""
    try:
        write()
    except ClipExportError as error:
        say_error(error.message, error.hint)
        return False
    return True


def _check_place(directory: Path) -> None:
    from clip_export.verifying.report import check_place

    check_place(directory)


def _inputs(images: list[Path] | None, texts: Path | None) -> IndexInputs | None:
    from clip_export import IndexInputs

    return None if not images and texts is None else IndexInputs(images=tuple(images or ()), texts=texts)


def _write_report(found: Verification, bundle: Path, directory: Path, pairs: str | None) -> None:
    from clip_export import Bundle
    from clip_export.pair_sources import open_pairs
    from clip_export.verifying.report import write

    # What was left out when the pairs were ranked was said then.
    source = None if pairs is None else open_pairs(pairs, skip_errors=True)
    command = shlex.join(["clip-export", *sys.argv[1:]])
    page = write(found, Bundle.open(bundle, check_files=False), directory, pairs=source, command=command)
    say(f"report: {page}")


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
