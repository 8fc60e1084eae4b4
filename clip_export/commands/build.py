"""clip-export build: a checkpoint becomes a bundle."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, cast

import typer

from clip_export.commands._group import say
from clip_export.commands._output import size_text
from clip_export.commands._progress import Bar
from clip_export.spec import TOWERS, Activation, Dialect, Tower


def build(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A directory, a file, a Hugging Face hub id, or demo.", show_default=False
        ),
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the bundle goes.", show_default="engines/NAME")
    ] = None,
    towers: Annotated[
        str | None, typer.Option(metavar="text,image", help="The towers to export.", show_default="all there are")
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Any of embedding, pooled and hidden_states, with commas.", show_default="embedding"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    activation: Annotated[
        Activation | None, typer.Option(help="State the activation where the checkpoint does not.", show_default=False)
    ] = None,
    tokenizer_dialect: Annotated[
        Dialect | None, typer.Option(help="Whose tokenizer to match.", show_default="the checkpoint's own")
    ] = None,
    preprocess_dialect: Annotated[
        Dialect | None, typer.Option(help="Whose preprocessing to match.", show_default="the checkpoint's own")
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle of engines.

    They give the same embeddings as the original: the bundle is published only once its engines have replayed its
    golden samples. Its path is printed on stdout.
    """
    import clip_export

    chosen = _towers(towers)
    names = None if outputs is None else _names(outputs)
    started = time.perf_counter()
    with Bar() as progress:
        bundle = clip_export.build(
            checkpoint,
            output,
            towers=chosen,
            outputs=names,
            force=force,
            activation=activation,
            tokenizer_dialect=tokenizer_dialect,
            preprocess_dialect=preprocess_dialect,
            progress=progress,
        )
    place = _shortest(bundle.path)
    total = size_text(sum(entry.size for entry in bundle.manifest.files.values()))
    say(f"built {' and '.join(bundle.manifest.spec.towers)} in {time.perf_counter() - started:.1f} s, {total}")
    say(f"next: clip-export verify {place}")
    typer.echo(place)


def _names(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _towers(value: str | None) -> tuple[Tower, ...] | None:
    if value is None:
        return None
    names = _names(value)
    unknown = [name for name in names if name not in TOWERS]
    if unknown or not names:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise typer.BadParameter(f"expected {' or '.join(TOWERS)}, found {found}", param_hint="'--towers'")
    return cast("tuple[Tower, ...]", names)


def _shortest(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return os.fspath(path.relative_to(here) if path.is_relative_to(here) else path)
