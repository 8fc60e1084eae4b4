"""The demo checkpoint: a small CLIP that comes with the package, in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clip_export.checkpoints import Checkpoint, Options
from clip_export.checkpoints.huggingface import read as read_huggingface
from clip_export.errors import CheckpointError

NAME = "demo"
EXPECTS = f'the word "{NAME}": the small CLIP inside the package'


def claims(checkpoint: str | Path) -> bool:
    """The word "demo"; a directory of that name is written ./demo."""
    return checkpoint == NAME


def read(checkpoint: str | Path, options: Options) -> Checkpoint:
    """Read the checkpoint inside the package. Raises CheckpointError if the install lacks it."""
    directory = _directory()
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            "the demo checkpoint is missing from this install of clip_export",
            hint="install the package again; a checkout needs the files under clip_export/demo",
        )
    found = read_huggingface(directory, options)
    return dataclasses.replace(found, source=dataclasses.replace(found.source, format=NAME, name=NAME))


def _directory() -> Path:
    return Path(__file__).parents[1] / NAME
