"""clip-export embed: many texts or images to one file of embeddings."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypedDict

import typer

from clip_export.commands._group import say
from clip_export.commands._progress import Bar
from clip_export.errors import OutputError, TextError
from clip_export.progress import Progress

if TYPE_CHECKING:
    from clip_export.embed import Embedded, Failure
    from clip_export.encoder import Encoder


def embed(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="OUT.npy or OUT.parquet.")],
    texts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A UTF-8 file with one text a line; - is stdin.")
    ] = None,
    images: Annotated[
        list[Path] | None, typer.Option(metavar="PATH...", help="Image files, and directories of them.")
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Make every embedding one of length 1.")] = True,
    truncate: Annotated[
        bool | None,
        typer.Option(
            "--truncate/--no-truncate", help="Cut a text that is too long, or fail it.", show_default="as the original"
        ),
    ] = None,
    skip_errors: Annotated[bool, typer.Option("--skip-errors", help="Leave out what cannot be encoded.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="How many inputs the engine takes at once.")] = 32,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which backend runs it.", show_default="the best that works here")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda:0.")] = "cpu",
) -> None:
    """Write embeddings of many texts or images.

    OUT gets one row each, in their order. OUT.npy is float32 [n, dim], with the rows' names in OUT.rows.jsonl;
    OUT.parquet has columns index, input and embedding. An existing OUT is replaced once the new one is complete.
    Inputs that cannot be encoded are listed; then nothing is written and the exit code is 1, unless --skip-errors
    leaves them out.
    """
    import clip_export

    if (texts is None) == (images is None):
        raise typer.BadParameter(
            "give one of them: --texts FILE or --images PATH...", param_hint="'--texts', '--images'"
        )
    if images is not None and truncate is not None:
        raise typer.BadParameter("only texts can be cut", param_hint="'--truncate'")
    encoder = clip_export.load(bundle, backend=backend, device=device, batch_size=batch_size)
    started = time.perf_counter()
    with encoder, Bar() as progress:
        options: _Options = {"normalize": normalize, "skip_errors": skip_errors, "progress": progress}
        if images is not None:
            result = _images(encoder, images, output, options)
        else:
            assert texts is not None
            result = _texts(encoder, texts, output, truncate, options)
    _summarize(result, time.perf_counter() - started)


class _Options(TypedDict):
    normalize: bool
    skip_errors: bool
    progress: Progress


def _images(encoder: Encoder, paths: list[Path], output: Path, options: _Options) -> Embedded:
    from clip_export.embed import embed_images
    from clip_export.inputs import find_images

    found = find_images(paths)
    if found.left_out:
        suffixes = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(found.left_out.items())
        )
        say(f"note: {len(found.files)} images; other files left out: {suffixes}")

    def report(failure: Failure) -> None:
        say(f"failed: {failure.message}")

    return embed_images(encoder, found.files, output, report=report, **options)


def _texts(encoder: Encoder, source: str, output: Path, truncate: bool | None, options: _Options) -> Embedded:
    from clip_export.embed import embed_texts
    from clip_export.embedding_file import rows_path
    from clip_export.inputs import count_lines, read_lines

    def report(failure: Failure) -> None:
        say(f"failed: line {failure.index + 1}: {failure.message}")

    if source != "-" and Path(source).resolve() in {path.resolve() for path in (output, rows_path(output))}:
        raise OutputError(f"{source} is read, and would be replaced by what is written", hint="choose another -o OUT")
    with _opened(source) as file:
        total = 0 if source == "-" else count_lines(source)
        return embed_texts(encoder, read_lines(file), output, truncate=truncate, total=total, report=report, **options)


@contextlib.contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(source).open("rb")  # noqa: SIM115  # closed below; what the caller does is no part of this try
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TextError(f"{source} cannot be read: {reason}", hint="--texts takes a file, or - for stdin") from error
    with file:
        yield file


def _summarize(result: Embedded, seconds: float) -> None:
    skipped = f"; {result.skipped} left out, listed above" if result.skipped else ""
    rate = result.rows / seconds
    say(f"{result.rows} rows of {result.dim} in {seconds:.1f} s ({rate:.0f} a second){skipped}")
    typer.echo(os.fspath(result.output))
