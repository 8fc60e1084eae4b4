"""Inputs for the graphs of a bundle, in batches: its golden samples, pictures, and texts of the user's or built in.

What is quantized is calibrated on one part of these and judged by another. The golden samples are never calibrated on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np

from clip_export.bundle import Bundle
from clip_export.errors import InputError
from clip_export.inputs import find_images, read_lines
from clip_export.pairs import find_pairs, hold_out, spread
from clip_export.prompts import prompts
from clip_export.runtime import front
from clip_export.spec import Tower

Feeds: TypeAlias = dict[str, np.ndarray]

BATCH = 8
LEAST_INPUTS = 8  # of one tower, to calibrate on and to judge by


def golden_feeds(bundle: Bundle, tower: Tower) -> Iterator[Feeds]:
    """The golden samples of `tower` as its graph takes them."""
    golden = bundle.golden()
    if tower == "text":
        assert golden.text is not None
        yield from _batches({"input_ids": golden.text.input_ids, "eot_index": golden.text.eot_index})
    else:
        assert golden.image is not None
        yield from _batches({"pixels": golden.image.pixels})


def text_feeds(bundle: Bundle, texts: Sequence[str]) -> Iterator[Feeds]:
    """`texts` in their order; each batch is cut to its longest text where the graph may be given less."""
    tokenizer, _ = front(bundle.spec, bundle.tokenizer_json())
    assert tokenizer is not None
    tokens = tokenizer(texts, truncate=True)
    for batch in _batches({"input_ids": tokens.input_ids, "eot_index": tokens.eot_index}):
        if bundle.graph("text").sequence_dynamic:
            batch["input_ids"] = np.ascontiguousarray(batch["input_ids"][:, : int(batch["eot_index"].max()) + 1])
        yield batch


def image_feeds(bundle: Bundle, files: Sequence[Path]) -> Iterator[Feeds]:
    """The pictures in `files`, read batch by batch. Raises ImageError naming one that cannot be read."""
    _, preprocessor = front(bundle.spec, None if bundle.spec.text is None else bundle.tokenizer_json())
    assert preprocessor is not None
    for start in range(0, len(files), BATCH):
        yield {"pixels": preprocessor(files[start : start + BATCH], first_index=start)}


def read_texts(path: Path) -> list[str]:
    """The texts in a file, one a line. Raises InputError naming the line that is not UTF-8, or for none at all."""
    try:
        with path.open("rb") as file:
            texts = [_text(path, number, line) for number, line in enumerate(read_lines(file), start=1)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    if not texts:
        raise InputError(f"expected texts in {path}, found none", hint="one text a line, UTF-8")
    return texts


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Real inputs of one tower: what it is calibrated on, and what is held out to judge it by.

    `items` are picture files or texts, `held_out` bool [items]; `source` says in words where they come from.
    """

    bundle: Bundle
    tower: Tower
    items: tuple[Path | str, ...]
    held_out: np.ndarray
    source: str

    @property
    def count(self) -> int:
        """How many inputs are calibrated on."""
        return int((~self.held_out).sum())

    def calibration(self, most: int | None = None) -> Iterator[Feeds]:
        """Batches to calibrate on, all or `most`, read as they are asked for; texts by length: hardly any padding."""
        items = [item for item, held in zip(self.items, self.held_out, strict=True) if not held]
        if most is not None:
            items = [items[place] for place in spread(len(items), most)]
        if self.tower == "text":
            items = sorted(items, key=self._length)
        yield from self._feeds(items)

    @cached_property
    def judges(self) -> list[Feeds]:
        """The held-out inputs, in their order."""
        return list(self._feeds([item for item, held in zip(self.items, self.held_out, strict=True) if held]))

    def digests(self, *, held_out: bool = False) -> Iterator[bytes]:
        """What stands for the data that is calibrated on, or held out: the sha256 of each picture file, or text."""
        for item, held in zip(self.items, self.held_out, strict=True):
            if held == held_out:
                data = item.encode("utf-8") if isinstance(item, str) else _file_bytes(item)
                yield hashlib.sha256(data).digest()

    def _feeds(self, items: Sequence[Path | str]) -> Iterator[Feeds]:
        if self.tower == "text":
            return text_feeds(self.bundle, [item for item in items if isinstance(item, str)])
        return image_feeds(self.bundle, [item for item in items if isinstance(item, Path)])

    @cached_property
    def _lengths(self) -> Mapping[str, int]:
        texts = [item for item in self.items if isinstance(item, str)]
        ends = [int(end) for batch in text_feeds(self.bundle, texts) for end in batch["eot_index"]]
        return dict(zip(texts, ends, strict=True))

    def _length(self, item: Path | str) -> int:
        return self._lengths[str(item)]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The samples of each tower. `paired`: item i of one tower belongs to item i of the other."""

    towers: Mapping[Tower, Samples]
    paired: bool

    def held_out(self, tower: Tower) -> list[str]:
        """The held-out items of `tower`, by which duplicates are told: texts, or paths of pictures."""
        samples = self.towers[tower]
        return [str(item) for item, held in zip(samples.items, samples.held_out, strict=True) if held]


def gather(bundle: Bundle, pictures: Sequence[Path], texts: Path | None) -> Data:
    """What `bundle` is calibrated on: `pictures`, files or directories, and the lines of `texts`.

    A directory with captions.csv or captions.jsonl holds pairs, whose captions are the texts if there are no others.
    Without texts the built-in prompts are taken. Raises InputError where there are too few pictures, or no pictures at
    all: random ones would calibrate for what nobody sees.
    """
    pairs = find_pairs(pictures[0]) if len(pictures) == 1 and pictures[0].is_dir() else None
    towers: dict[Tower, Samples] = {}
    if "image" in bundle.spec.towers:
        if not pictures:
            raise InputError(
                "8-bit precisions are calibrated on real pictures, and none were given",
                hint="--calibration DIRECTORY, with some hundred pictures like those that will be encoded",
            )
        files = find_images(pictures).files if pairs is None else pairs.files
        named = ", ".join(path.name or str(path) for path in pictures)
        towers["image"] = _samples(bundle, "image", files, f"{len(files)} pictures of {named}")
    if "text" in bundle.spec.towers:
        towers["text"] = _text_samples(bundle, texts, () if pairs is None else pairs.captions)
    return Data(towers=towers, paired=pairs is not None and texts is None and len(towers) == 2)


def _text_samples(bundle: Bundle, path: Path | None, captions: Sequence[str]) -> Samples:
    if path is not None:
        found = read_texts(path)
        return _samples(bundle, "text", tuple(found), f"{len(found)} texts of {path.name}")
    if captions:
        return _samples(bundle, "text", tuple(captions), f"{len(captions)} captions of the pictures")
    built_in = prompts()
    return _samples(bundle, "text", built_in, f"{len(built_in)} built-in prompts, since no texts were given")


def _samples(bundle: Bundle, tower: Tower, items: Iterable[Path | str], source: str) -> Samples:
    found = tuple(items)
    if len(found) < LEAST_INPUTS:
        kind = "pictures" if tower == "image" else "texts"
        message = f"expected at least {LEAST_INPUTS} {kind} to calibrate on and to judge by, found {len(found)}"
        raise InputError(message, hint="some hundred are a good number")
    return Samples(bundle=bundle, tower=tower, items=found, held_out=hold_out(len(found)), source=source)


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error


def _text(path: Path, number: int, line: str | Exception) -> str:
    if isinstance(line, str):
        return line
    raise InputError(f"{path}, line {number}: {line}") from line


def _batches(feeds: Mapping[str, np.ndarray]) -> Iterator[Feeds]:
    count = len(next(iter(feeds.values())))
    for start in range(0, count, BATCH):
        yield {name: array[start : start + BATCH] for name, array in feeds.items()}
