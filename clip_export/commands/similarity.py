"""clip-export similarity: N images against M texts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from clip_export.commands._group import say
from clip_export.commands._output import columns_width, print_columns, print_json
from clip_export.commands._progress import Bar

Matrix = list[list[float]]


def similarity(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    *,
    images: Annotated[list[Path], typer.Option(metavar="PATH...", help="Image files, and directories of them.")],
    texts: Annotated[list[str], typer.Option(metavar="TEXT...", help="Texts.")],
    softmax: Annotated[bool, typer.Option("--softmax", help="For each image, probabilities over the texts.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the matrix to FILE (.png).", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which backend runs it.", show_default="the best that works here")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda:0.")] = "cpu",
) -> None:
    """Compare images with texts.

    Gives exp(logit_scale) x cosine, CLIP's own similarity, for every image and every text. Several values may follow
    one flag: --images a.jpg b.jpg --texts "a cat" "a dog". The best text of each image is marked with a star, and
    outlined in the picture.
    """
    import clip_export
    from clip_export.inputs import find_images

    files = find_images(images).files
    with Bar(), clip_export.load(bundle, backend=backend, device=device) as encoder:
        matrix: Matrix = encoder.similarity(files, texts).tolist()
    shown = [_softmax(row) for row in matrix] if softmax else matrix
    if plot is not None:
        _draw(shown, files, texts, plot, title=f"{bundle.name}: {'probability' if softmax else 'similarity'}")
    if json:
        result = {"images": [str(file) for file in files], "texts": texts, "similarity": matrix}
        print_json({**result, "probability": shown} if softmax else result)
    else:
        _print_table(shown, _names(files), texts, digits=4 if softmax else 2)
    if plot is not None:
        say(f"drawn: {plot}")


def _names(files: Sequence[Path]) -> list[str]:
    """File names, with their directories only where two would be the same."""
    names = [file.name for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]


def _softmax(row: Sequence[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def _draw(matrix: Matrix, files: Sequence[Path], texts: Sequence[str], path: Path, *, title: str) -> None:
    from clip_export.plot import save_picture, similarity_picture

    save_picture(similarity_picture(matrix, files, texts, title=title), path)


def _print_table(matrix: Matrix, names: Sequence[str], texts: Sequence[str], *, digits: int) -> None:
    """Images down, texts across; where the window is too narrow for the texts, numbers stand for them."""
    rows = [[name, *_cells(row, digits)] for name, row in zip(names, matrix, strict=True)]
    table = [["", *texts], *rows]
    fits = columns_width(table) <= shutil.get_terminal_size().columns
    if fits:
        print_columns(table, numbers=True)
    else:
        print_columns([["", *(str(number) for number in range(1, len(texts) + 1))], *rows], numbers=True)
        typer.echo()
        print_columns([(str(number), text) for number, text in enumerate(texts, start=1)])


def _cells(row: Sequence[float], digits: int) -> list[str]:
    best = max(range(len(row)), key=row.__getitem__)
    return [f"{'*' if i == best else ''}{value:.{digits}f}" for i, value in enumerate(row)]
