"""Many inputs to one file of embeddings: streamed in chunks, no input left out without being named.

    from clip_export.inputs import find_images, read_lines

    with clip_export.load("engines/demo") as clip:
        embed_texts(clip, read_lines(file), "captions.npy")
        embed_images(clip, find_images(["photos"]).files, "photos.parquet", skip_errors=True)

An input that cannot be encoded is reported at once. Without `skip_errors` the run goes on only to name the others, and
then nothing is written; with it, their rows are left out. An output that exists is replaced when the new one is whole.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from clip_export.embedding_file import embedding_file
from clip_export.encoder import Encoder
from clip_export.errors import InputError, TextError
from clip_export.preprocess import Preprocessor
from clip_export.progress import Progress, silent

Floats = npt.NDArray[np.float32]
T = TypeVar("T")  # an input
P = TypeVar("P")  # what it is prepared to


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One input that could not be encoded. `index` is its place among the inputs, from 0."""

    index: int
    message: str
    hint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What was written: float32 [rows, dim] at `output`; `skipped` inputs have no row."""

    output: Path
    rows: int
    dim: int
    skipped: int


def _ignore(failure: Failure) -> None:
    """The default for `report`: the count in the result, or the error at the end, says enough."""


def embed_texts(
    encoder: Encoder,
    texts: Iterable[str | TextError],
    output: str | os.PathLike[str],
    *,
    normalize: bool = True,
    truncate: bool | None = None,
    skip_errors: bool = False,
    total: int = 0,
    report: Callable[[Failure], None] = _ignore,
    progress: Progress = silent,
) -> Embedded:
    """Write the embeddings of `texts`, in their order, to `output` (.npy or .parquet; see `embedding_file`).

    `texts` is read as it is needed; `total` is its length where that is known. A TextError among them, as `read_lines`
    gives for a line that is not UTF-8, is a text that failed. Raises InputError where a text failed and `skip_errors`
    is False, or where none is left; OutputError where `output` cannot be written.
    """

    def prepare(chunk: Sequence[str | TextError]) -> list[str | InputError]:
        return _checked_texts(encoder, chunk, truncate)

    def encode(good: Sequence[str]) -> Floats:
        return encoder.encode_text(good, normalize=normalize, truncate=truncate)

    encoder.tokenize([])  # raises the error of an encoder without this tower, once
    run = _Run("text", total, skip_errors, report, progress)
    named = ((text, "" if isinstance(text, TextError) else text) for text in texts)
    return run(named, prepare, encode, output, chunk_size=encoder.batch_size * 16)


def embed_images(
    encoder: Encoder,
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    normalize: bool = True,
    skip_errors: bool = False,
    report: Callable[[Failure], None] = _ignore,
    progress: Progress = silent,
) -> Embedded:
    """Write the embeddings of the image files `images`, in their order, to `output`; see `embed_texts`.

    While a chunk runs through the engine, the next one is decoded.
    """
    if encoder.spec.preprocess is None:
        encoder.preprocess([])  # raises the error of an encoder without this tower
    assert encoder.spec.preprocess is not None
    preprocessor = Preprocessor(encoder.spec.preprocess)

    def encode(good: Sequence[npt.NDArray[np.uint8]]) -> Floats:
        return encoder.encode_pixels(np.stack(good), normalize=normalize)

    run = _Run("image", len(images), skip_errors, report, progress)
    named = ((image, os.fsdecode(image)) for image in images)
    return run(named, preprocessor.attempt, encode, output, chunk_size=encoder.batch_size)


class _Run:
    """The loop that both kinds of input share: prepare, sort out what failed, encode the rest, write."""

    def __init__(
        self, kind: str, total: int, skip_errors: bool, report: Callable[[Failure], None], progress: Progress
    ) -> None:
        self._kind, self._total, self._skip_errors = kind, total, skip_errors
        self._report, self._progress = report, progress
        self._failures = 0
        self._first_failure = ""

    def __call__(
        self,
        named: Iterable[tuple[T, str]],
        prepare: Callable[[Sequence[T]], Sequence[P | InputError]],
        encode: Callable[[Sequence[P]], Floats],
        output: str | os.PathLike[str],
        *,
        chunk_size: int,
    ) -> Embedded:
        done = rows = dim = 0
        with embedding_file(output) as writer, closing(_prepared(named, prepare, chunk_size)) as chunks:
            self._progress(f"{self._kind}s", 0, self._total)
            for names, outcomes in chunks:
                good = self._sort_out(outcomes, first=done)
                if good and (self._skip_errors or not self._failures):
                    embeddings = encode([prepared for _, prepared in good])
                    writer.write([(done + i, names[i]) for i, _ in good], embeddings)
                    rows, dim = rows + len(good), embeddings.shape[1]
                done += len(names)
                self._progress(f"{self._kind}s", done, self._total)
            self._check(done, rows)
        return Embedded(output=Path(output), rows=rows, dim=dim, skipped=self._failures)

    def _sort_out(self, outcomes: Sequence[P | InputError], *, first: int) -> list[tuple[int, P]]:
        """Those that did not fail, each with its place; the others are reported."""
        good = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, InputError):
                # The cause is the same error without the place in its chunk, which means nothing here.
                cause = outcome.__cause__ if isinstance(outcome.__cause__, InputError) else outcome
                failure = Failure(index=first + i, message=cause.message, hint=cause.hint)
                self._first_failure = self._first_failure or f"{self._kind} {failure.index}: {failure.message}"
                self._failures += 1
                self._report(failure)
            else:
                good.append((i, outcome))
        return good

    def _check(self, count: int, rows: int) -> None:
        if count == 0:
            raise InputError(f"there are no {self._kind}s to encode", hint=f"give at least one {self._kind}")
        if self._failures and not self._skip_errors:
            raise InputError(
                f"{self._failures} of {count} {self._kind}s cannot be encoded, and nothing was written; "
                f"the first: {self._first_failure}",
                hint="repair them, or leave them out with --skip-errors (skip_errors=True)",
            )
        if rows == 0:
            raise InputError(
                f"none of {count} {self._kind}s can be encoded, and nothing was written; "
                f"the first: {self._first_failure}"
            )


def _prepared(
    named: Iterable[tuple[T, str]], prepare: Callable[[Sequence[T]], Sequence[P | InputError]], chunk_size: int
) -> Generator[tuple[list[str], Sequence[P | InputError]], None, None]:
    """(names, outcomes) of each chunk. The next chunk is prepared while the caller works on this one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="clip-export-embed")
    try:
        waiting = None
        for chunk in _chunks(named, chunk_size):
            inputs, names = [item for item, _ in chunk], [name for _, name in chunk]
            following = names, pool.submit(prepare, inputs)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _checked_texts(encoder: Encoder, chunk: Sequence[str | TextError], truncate: bool | None) -> list[str | InputError]:
    """Each text, or why it cannot be tokenized. One by one only where the whole chunk does not pass."""
    texts = [text for text in chunk if not isinstance(text, TextError)]
    try:
        encoder.tokenize(texts, truncate=truncate)
    except InputError:
        return [_checked_text(encoder, text, truncate) for text in chunk]
    return list(chunk)


def _checked_text(encoder: Encoder, text: str | TextError, truncate: bool | None) -> str | InputError:
    if isinstance(text, TextError):
        return text
    try:
        encoder.tokenize([text], truncate=truncate)
    except InputError as error:
        # "text 0" is its place in this list of one, which means nothing here.
        return TextError(error.message.removeprefix("text 0 "), hint=error.hint)
    return text
