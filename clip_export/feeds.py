"""Inputs for the graphs of a bundle, in batches: its golden samples, pictures, and texts of the user's or built in.

What is quantized is calibrated on one part of these and judged by another. Nothing is in both: no picture under two
names, and no text that stands there twice. The golden samples are never calibrated on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TypeAlias

import numpy as np

from clip_export.bundle import Bundle
from clip_export.context_inputs import sampled_feeds
from clip_export.errors import InputError
from clip_export.inputs import find_images, read_lines
from clip_export.pairs import Pairs, find_pairs, group, hold_out, spread
from clip_export.prompts import prompts
from clip_export.runtime import front
from clip_export.spec import Tower, to_dict

Feeds: TypeAlias = dict[str, np.ndarray]

BATCH = 8
LEAST_INPUTS = 8  # different ones of one tower, to calibrate on and to judge by
LEAST_HELD_OUT = 2  # of these: a quarter; the others are the least to calibrate on

_KINDS: Mapping[Tower, str] = {"image": "pictures", "text": "texts"}


def golden_feeds(bundle: Bundle, tower: Tower) -> Iterator[Feeds]:
    """The golden samples of `tower` as its graph takes them."""
    golden = bundle.golden()
    if tower == "text":
        assert golden.text is not None
        feeds = {"input_ids": golden.text.input_ids, "eot_index": golden.text.eot_index}
        yield from _batches(feeds if bundle.spec.context is None else sampled_feeds(feeds, bundle.spec))
    else:
        assert golden.image is not None
        yield from _batches({"pixels": golden.image.pixels})


def text_feeds(bundle: Bundle, texts: Sequence[str]) -> Iterator[Feeds]:
    """`texts` in their order; each batch is cut to its longest text where the graph may be given less."""
    tokenizer, _ = front(bundle.spec, bundle.tokenizer_json())
    assert tokenizer is not None
    tokens = tokenizer(texts, truncate=True)
    context = bundle.spec.context is not None
    for number, batch in enumerate(_batches({"input_ids": tokens.input_ids, "eot_index": tokens.eot_index})):
        if context:  # all positions, padding too: they are what a diffusion model is given
            yield sampled_feeds(batch, bundle.spec, first=number * BATCH)
            continue
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

    `items` are picture files or texts, `held_out` bool [items]; `source` says in words where they come from. `known` is
    for `identities` alone: that of each item, once it was asked for.
    """

    bundle: Bundle
    tower: Tower
    items: tuple[Path | str, ...]
    held_out: np.ndarray
    source: str
    known: dict[Path | str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """How many inputs are calibrated on."""
        return int((~self.held_out).sum())

    def calibration(self, most: int | None = None) -> Iterator[Feeds]:
        """Batches to calibrate on, all or `most`, read as they are asked for; texts by length: hardly any padding."""
        items = list(compress(self.items, ~self.held_out))
        if most is not None:
            items = [items[place] for place in spread(len(items), most)]
        if self.tower == "text":
            lengths = {item: len(tokens) for item, tokens in zip(self.items, self.identities(), strict=True)}
            items.sort(key=lengths.__getitem__)
        yield from self._feeds(items)

    @cached_property
    def judges(self) -> list[Feeds]:
        """The held-out inputs, in their order."""
        return list(self._feeds(list(compress(self.items, self.held_out))))

    def identities(self) -> list[bytes]:
        """For each item what is equal for the same input: the sha256 of the picture file, or the text's tokens.

        So "A cat" and "a cat" are one where the tokenizer knows no capitals. Each file is read once, however often it
        is asked for. Raises InputError naming one that cannot be read.
        """
        unknown = [item for item in dict.fromkeys(self.items) if item not in self.known]
        texts, files = _texts(unknown), _files(unknown)
        self.known.update(zip(texts, _tokens(text_feeds(self.bundle, texts) if texts else ()), strict=True))
        self.known.update((file, _sha256(file)) for file in files)
        return [self.known[item] for item in self.items]

    def digests(self, *, held_out: bool = False) -> Iterator[bytes]:
        """What stands for what the graph is fed of the data that is calibrated on, or held out.

        First how inputs are made ready, then the sha256 of each picture file, or text.
        """
        yield self._front_digest()
        identified = zip(self.items, self.identities(), strict=True)
        for item, identity in compress(identified, self.held_out == held_out):
            yield hashlib.sha256(item.encode("utf-8")).digest() if isinstance(item, str) else identity

    def different(self, *, held_out: bool) -> int:
        """How many different inputs are calibrated on, or held out."""
        return len(set(compress(self.identities(), self.held_out == held_out)))

    def _front_digest(self) -> bytes:
        """Stands for the tokenizer or the preprocessing: the same graph may be fed other ids or pixels by another."""
        spec = self.bundle.spec
        front = spec.tokenizer if self.tower == "text" else spec.preprocess
        assert front is not None
        rules = json.dumps(to_dict(front), sort_keys=True).encode()
        vocabulary = self.bundle.tokenizer_json() if self.tower == "text" else ""
        return hashlib.sha256(rules + vocabulary.encode()).digest()

    def _feeds(self, items: Sequence[Path | str]) -> Iterator[Feeds]:
        if self.tower == "text":
            return text_feeds(self.bundle, _texts(items))
        return image_feeds(self.bundle, _files(items))


@dataclass(frozen=True, kw_only=True)
class Data:
    """The samples of each tower. `paired`: item i of one tower belongs to item i of the other.

    No input is both calibrated on and held out. Where paired, the towers hold out the same items, and no picture or
    caption of a held-out pair is in another pair that is not.
    """

    towers: Mapping[Tower, Samples]
    paired: bool

    @cached_property
    def digest(self) -> str:
        """Stands for all of it, in hex: what is calibrated on and what is held out, of both towers, in their order."""
        digest = hashlib.sha256()
        for samples in self.towers.values():
            for held_out in (False, True):
                for item in samples.digests(held_out=held_out):
                    digest.update(item)
                digest.update(b"|")
        return digest.hexdigest()

    def held_out(self, tower: Tower) -> list[bytes]:
        """What duplicates are told by, of each held-out item of `tower`: equal for the same picture, or text."""
        samples = self.towers[tower]
        return list(compress(samples.identities(), samples.held_out))


def gather(bundle: Bundle, pictures: Sequence[Path], texts: Path | None) -> Data:
    """What `bundle` is calibrated on: `pictures`, files or directories, and the lines of `texts`.

    Directories with captions.csv or captions.jsonl hold pairs, whose captions are the texts if there are no others.
    Without texts the built-in prompts are taken. What is held out is whole groups of what is the same or, of pairs, of
    what shares a picture or a caption: see `pairs.hold_out`. Raises InputError where there are no pictures (random ones
    would calibrate for what nobody sees), too few different ones, or too few that share nothing.
    """
    pairs = _pairs(pictures, for_texts=texts is None and "text" in bundle.spec.towers)
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
    return _parted(towers, paired=pairs is not None and texts is None and len(towers) == 2)


def require_inputs(pictures: Sequence[Path], texts: Path | None, *, image: bool, text: bool) -> None:
    """Raise InputError for what `gather` would refuse of these, before a bundle is built.

    It will have an `image` tower, unless its checkpoint has none, and is known to have a `text` tower.
    """
    pairs = _pairs(pictures, for_texts=text and texts is None)
    if pictures and image:
        files = find_images(pictures).files if pairs is None else pairs.files
        _require_enough("image", len(set(files)), len(files))
    if texts is not None:
        lines = read_texts(texts)
        _require_enough("text", len(set(lines)), len(lines))


def check_varied(data: Data) -> None:
    """Raise InputError where every picture that is held out is of one colour: no range of real ones is found on such.

    They are a quarter, taken by no rule that would prefer dull ones.
    """
    images = data.towers.get("image")
    if images is None:
        return
    count = 0
    for batch in images.judges:
        count += len(batch["pixels"])
        if any((pixels != pixels[:, :1, :1]).any() for pixels in batch["pixels"]):
            return
    raise InputError(
        f"all of the {count} calibration pictures that are held out are of one colour each",
        hint="calibrate on pictures like those that will be encoded",
    )


def _pairs(pictures: Sequence[Path], *, for_texts: bool = False) -> Pairs | None:
    """Those of all directories, in their order; None unless every path is a directory with captions.

    Raises InputError where captions are wanted `for_texts` and some paths have none: they would be passed over.
    """
    found = {path: find_pairs(path) if path.is_dir() else None for path in pictures}
    pairs = [each for each in found.values() if each is not None]
    bare = next((path for path, each in found.items() if each is None), None)
    if not pairs or (bare is not None and not for_texts):
        return None
    if bare is not None:
        named = next(path for path, each in found.items() if each is not None)
        raise InputError(
            f"{named} has captions, and {bare} has none",
            hint="give directories that all have captions, or texts of their own: --calibration-texts FILE",
        )
    return Pairs(
        files=tuple(file for each in pairs for file in each.files),
        captions=tuple(caption for each in pairs for caption in each.captions),
    )


def _text_samples(bundle: Bundle, path: Path | None, captions: Sequence[str]) -> Samples:
    if path is not None:
        found = read_texts(path)
        return _samples(bundle, "text", found, f"{len(found)} texts of {path.name}")
    if captions:
        return _samples(bundle, "text", captions, f"{len(captions)} captions of the pictures")
    built_in = prompts()
    return _samples(bundle, "text", built_in, f"{len(built_in)} built-in prompts, since no texts were given")


def _samples(bundle: Bundle, tower: Tower, items: Iterable[Path | str], source: str) -> Samples:
    """With nothing held out as yet."""
    found = tuple(items)
    samples = Samples(bundle=bundle, tower=tower, items=found, held_out=np.zeros(len(found), np.bool_), source=source)
    _require_enough(tower, samples.different(held_out=False), len(found))
    return samples


def _require_enough(tower: Tower, different: int, found: int) -> None:
    if different < LEAST_INPUTS:
        among = f" among {found}" if different < found else ""
        message = f"expected at least {LEAST_INPUTS} different {_KINDS[tower]} to calibrate on and to judge by, "
        raise InputError(f"{message}found {different}{among}", hint="some hundred are a good number")


def _parted(towers: Mapping[Tower, Samples], *, paired: bool) -> Data:
    identities = {tower: samples.identities() for tower, samples in towers.items()}
    if paired:
        together = group(*identities.values())
        held_out = dict.fromkeys(towers, hold_out(together))
    else:
        held_out = {tower: hold_out(items) for tower, items in identities.items()}
    parted = {tower: dataclasses.replace(found, held_out=held_out[tower]) for tower, found in towers.items()}
    for samples in parted.values():
        _check_parts(samples, _most_shared(towers) if paired else "")
    return Data(towers=parted, paired=paired)


def _check_parts(samples: Samples, why: str) -> None:
    """Raise InputError where one side has too few different inputs. `why` says what keeps them together."""
    calibrated, held = (samples.different(held_out=held_out) for held_out in (False, True))
    if held < LEAST_HELD_OUT or calibrated < LEAST_INPUTS - LEAST_HELD_OUT:
        raise InputError(
            f"expected at least {LEAST_INPUTS - LEAST_HELD_OUT} different {_KINDS[samples.tower]} to calibrate on and "
            f"{LEAST_HELD_OUT} to judge by, found {calibrated} and {held}: what is the same is on one side{why}",
            hint="leave out what is repeated, add others, or give texts of their own: --calibration-texts FILE",
        )


def _most_shared(towers: Mapping[Tower, Samples]) -> str:
    """The caption that keeps the most pairs together, in words."""
    ((caption, count),) = Counter(towers["text"].items).most_common(1)
    return f", and so are pairs that share a picture or a caption, such as {str(caption)!r:.80} of {count}"


def _texts(items: Iterable[Path | str]) -> list[str]:
    return [item for item in items if isinstance(item, str)]


def _files(items: Iterable[Path | str]) -> list[Path]:
    return [item for item in items if isinstance(item, Path)]


def _tokens(batches: Iterable[Feeds]) -> Iterator[bytes]:
    """What the graph is given of each text, up to its end: the token that it reads the embedding at."""
    for batch in batches:
        for ids, end in zip(batch["input_ids"], batch["eot_index"], strict=True):
            yield ids[: end + 1].tobytes()


def _sha256(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
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
