"""The inputs of an index through an engine: images or texts in the order of its rows, float32 [n, dim]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_export.encoder import Encoder, Floats
from clip_export.errors import InputError, TextError
from clip_export.inputs import find_images, read_lines
from clip_export.progress import Progress

__all__ = ["IndexInputs", "embed_inputs"]

_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexInputs:
    """What the vectors of an index were made of, in its order: images (files or folders), or the lines of a file."""

    images: Sequence[Path] = ()
    texts: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.images) == (self.texts is not None):
            raise InputError(
                "an index is compared with the inputs that it was made of, images or texts",
                hint="give them as embed takes them: --images PATH..., or --texts FILE",
            )

    def read(self) -> list[str] | list[Path]:
        """Texts, or files of images. Raises TextError for a line that is not UTF-8, InputError for no such file."""
        if self.texts is None:
            return list(find_images(self.images).files)
        try:
            with self.texts.open("rb") as file:
                return list(_lines(self.texts, read_lines(file)))
        except OSError as error:
            raise InputError(f"{self.texts} cannot be read: {error.strerror}", hint="check the path") from error


def embed_inputs(encoder: Encoder, inputs: Sequence[str] | Sequence[Path], *, progress: Progress) -> Floats:
    """Embeddings of length 1. Texts that are too long are cut. Raises InputError, naming the input."""
    parts = []
    for start in range(0, len(inputs), _AT_ONCE):
        progress("inputs of the index", start, len(inputs))
        chunk = inputs[start : start + _AT_ONCE]
        texts = [item for item in chunk if isinstance(item, str)]
        images = [item for item in chunk if not isinstance(item, str)]
        parts.append(encoder.encode_text(texts, truncate=True) if texts else encoder.encode_image(images))
    return np.concatenate(parts)


def _lines(path: Path, lines: Iterator[str | TextError]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if isinstance(line, TextError):
            raise TextError(f"{path}, line {number}: {line.message}", hint=line.hint)
        yield line
