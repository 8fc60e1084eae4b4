"""Encoders with a fault planted in one place: everything else is the part of a sound encoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clip_export.encoder import Encoder, Run
from clip_export.errors import BackendError
from clip_export.images import open_image
from clip_export.spec import Tower

Feeds = Mapping[str, np.ndarray]
Fault = Callable[[Run], Run]


def planted(sound: Encoder, *, run: Fault | None = None, kind: type[Encoder] = Encoder, **parts: Any) -> Encoder:
    """`sound` with `run` around both engines, as another class, or with another tokenizer or preprocessor."""
    given = {"tokenizer": sound._tokenizer, "preprocessor": sound._preprocessor} | parts
    return kind(
        sound.spec,
        run_text=_around(sound, "text", run),
        run_image=_around(sound, "image", run),
        trim=sound._trim,
        batch_size=sound.batch_size,
        engine=sound.engine,
        **given,
    )


def _around(sound: Encoder, tower: Tower, fault: Fault | None) -> Run | None:
    run = sound._run[tower]
    return run if run is None or fault is None else fault(run)


def shuffled(run: Run) -> Run:
    """Rows of a batch come back one further."""
    return lambda feeds: {name: np.roll(array, 1, axis=0) for name, array in run(feeds).items()}


def leaking(run: Run) -> Run:
    """A batch leaks into its rows: each gets a part of the mean."""
    return lambda feeds: {
        name: array + np.float32(0.02) * array.mean(axis=0, keepdims=True) for name, array in run(feeds).items()
    }


def padding_counts(run: Run) -> Run:
    """What a text is padded to decides on its embedding. Pictures have no length."""

    def faulty(feeds: Feeds) -> Mapping[str, np.ndarray]:
        ids = feeds.get("input_ids")
        outputs = {name: np.array(array) for name, array in run(feeds).items()}
        for array in outputs.values():
            array[..., 0] += 0 if ids is None else 0.01 * ids.shape[1]
        return outputs

    return faulty


def unsafe(run: Run) -> Run:
    """One buffer for all threads, filled before and read after a pause."""
    shared: dict[str, Feeds] = {}

    def faulty(feeds: Feeds) -> Mapping[str, np.ndarray]:
        shared["feeds"] = feeds
        time.sleep(0.05 if threading.active_count() > 1 else 0)
        return run(shared["feeds"])

    return faulty


def nan_in_the_dark(run: Run) -> Run:
    """NaN for pictures that are black, and for texts without a word."""

    def faulty(feeds: Feeds) -> Mapping[str, np.ndarray]:
        outputs = {name: np.array(array) for name, array in run(feeds).items()}
        dark = feeds["eot_index"] == 1 if "eot_index" in feeds else (feeds["pixels"] == 0).all(axis=(1, 2, 3))
        for array in outputs.values():
            array[dark] = np.nan
        return outputs

    return faulty


def nan_in_company(run: Run) -> Run:
    """NaN in the last row of a batch, where there is more than one."""

    def faulty(feeds: Feeds) -> Mapping[str, np.ndarray]:
        outputs = {name: np.array(array) for name, array in run(feeds).items()}
        for array in outputs.values():
            array[-1] = np.nan if len(array) > 1 else array[-1]
        return outputs

    return faulty


def wrong_when_full(run: Run) -> Run:
    """A kernel for batches of 32 that adds up wrongly."""

    def faulty(feeds: Feeds) -> Mapping[str, np.ndarray]:
        return {name: array[::-1] if len(array) == 32 else array for name, array in run(feeds).items()}

    return faulty


def small(run: Run) -> Run:
    """An engine that fails on more than 8 rows."""

    def faulty(feeds: Feeds) -> Mapping[str, np.ndarray]:
        rows = len(next(iter(feeds.values())))
        if rows > 8:
            raise BackendError(f"no kernel for {rows} rows")
        return run(feeds)

    return faulty


def inexact(run: Run) -> Run:
    """Off by a tenth, in one direction for odd and another for even features, the same for every input."""

    def off(array: np.ndarray) -> np.ndarray:
        sign = np.where(np.arange(array.shape[-1]) % 2, 1, -1)
        return (array + np.float32(0.1) * sign * np.abs(array).mean(axis=-1, keepdims=True)).astype(np.float32)

    return lambda feeds: {name: off(array) for name, array in run(feeds).items()}


class Unnormalized(Encoder):
    """Embeddings of any length."""

    def encode_text(self, texts: Sequence[str], **options: Any) -> Any:
        return super().encode_text(texts, **options | {"normalize": False})

    def encode_image(self, images: Sequence[Any], **options: Any) -> Any:
        return super().encode_image(images, **options | {"normalize": False})


class Unsorted(Encoder):
    """Texts are sorted by length, and their embeddings not put back."""

    def encode_text(self, texts: Sequence[str], **options: Any) -> Any:
        return super().encode_text(sorted(texts, key=len), **options)


def turning(preprocessor: Any) -> Any:
    """Preprocessing that follows EXIF, as an image viewer does."""

    def faulty(images: Sequence[Any], **options: Any) -> np.ndarray:
        return preprocessor([ImageOps.exif_transpose(open_image(image)) for image in images], **options)

    return faulty


def last_frame(preprocessor: Any) -> Any:
    """Preprocessing that takes the last frame of an animation."""

    def last(image: Any) -> Image.Image:
        if not isinstance(image, bytes):
            return open_image(image)
        import io

        opened = Image.open(io.BytesIO(image))
        opened.seek(getattr(opened, "n_frames", 1) - 1)
        return opened

    return lambda images, **options: preprocessor([last(image) for image in images], **options)


def swapped(preprocessor: Any) -> Any:
    """Preprocessing that gives BGR."""
    return lambda images, **options: np.ascontiguousarray(preprocessor(images, **options)[:, ::-1])


class Forgiving:
    """A tokenizer that cuts, whatever it is asked."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], *, truncate: bool | None = None) -> Any:
        return self._tokenizer([text.encode(errors="replace").decode() for text in texts], truncate=True)
