"""What comes before the graphs: the cleaned text, token ids, pixels. They have to be equal, and here is what differs.

The bundle's own tokenizer and preprocessor are compared with the checkpoint's on the input, or, where there is no
checkpoint, with what the build left as golden samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from clip_export.bundle import Bundle
from clip_export.errors import SpecError
from clip_export.explaining.explanation import Cause, Stage
from clip_export.images import ImageInput
from clip_export.preprocess import Preprocessor
from clip_export.spec import PreprocessSpec, TokenizerSpec
from clip_export.text_cleaning import CLEANERS
from clip_export.tokenizer import Tokenizer, Tokens

__all__ = ["Front", "explain_ids", "explain_pixels", "image_front", "text_front"]

_MEANINGS = {"dialect": ": it decides where an odd margin is cut, and what becomes of transparency"}
_SHOWN = 40  # characters of a text
_REBUILD = "Build the bundle again from the checkpoint"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The stages before a graph, what they feed it, and why they differ, where they do."""

    stages: tuple[Stage, ...]
    found: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    cause: Cause | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextSide:
    """One side's tokenizer: its rules, and the text of its tokenizer.json."""

    spec: TokenizerSpec
    tokenizer_json: str

    def clean(self, text: str) -> str:
        """What is left of `text` before it is split into words, white space made one space: no dialect reads more."""
        from tokenizers import Tokenizer as Core

        cleaned = CLEANERS[self.spec.dialect](text)
        normalizer = Core.from_str(self.tokenizer_json).normalizer if self.spec.dialect == "huggingface" else None
        return " ".join((cleaned if normalizer is None else normalizer.normalize_str(cleaned)).split())

    def tokenize(self, texts: list[str]) -> Tokens:
        """Ids of `texts`, what is too long cut."""
        return Tokenizer(self.spec, self.tokenizer_json)(texts, truncate=True)


def text_front(bundle: Bundle, text: str, reference: TextSide | None) -> Front:
    """Cleaning and ids of `text` by the tokenizer of `bundle`, against that of `reference` or the golden samples."""
    assert bundle.spec.tokenizer is not None
    own = TextSide(spec=bundle.spec.tokenizer, tokenizer_json=bundle.tokenizer_json())
    tokens = own.tokenize([text])
    feeds = {"input_ids": tokens.input_ids, "eot_index": tokens.eot_index}
    if reference is None:
        golden = bundle.golden().text
        assert golden is not None
        ids = own.tokenize(list(golden.texts))
        stage, cause = explain_ids(own.spec, ids, Tokens(golden.input_ids, golden.eot_index), against="the build")
        stages = (Stage(name="cleaning", detail=_part_of(own.clean(text))), stage)
        return Front(stages=stages, found=feeds, expected=feeds, cause=cause)
    theirs = reference.tokenize([text])
    stage, cause = explain_ids(own.spec, tokens, theirs, against="the checkpoint", reference=reference.spec)
    stages = (_cleaning(own.clean(text), reference.clean(text)), stage)
    expected = {"input_ids": theirs.input_ids, "eot_index": theirs.eot_index}
    return Front(stages=stages, found=feeds, expected=expected, cause=cause)


def image_front(bundle: Bundle, image: ImageInput, reference: PreprocessSpec | None) -> Front:
    """The pixels of `image` by the preprocessing of `bundle`, against that of `reference` or the golden samples."""
    assert bundle.spec.preprocess is not None
    spec, own = bundle.spec.preprocess, Preprocessor(bundle.spec.preprocess)
    pixels = own([image])
    if reference is None:
        golden = bundle.golden().image
        assert golden is not None
        files: list[ImageInput] = list(golden.files)
        stage, cause = explain_pixels(spec, own(files), golden.pixels, against="the build")
        return Front(stages=(stage,), found={"pixels": pixels}, expected={"pixels": pixels}, cause=cause)
    theirs = Preprocessor(reference)([image])

    def again(other: PreprocessSpec) -> np.ndarray:
        return Preprocessor(other)([image])

    stage, cause = explain_pixels(spec, pixels, theirs, against="the checkpoint", reference=reference, again=again)
    return Front(stages=(stage,), found={"pixels": pixels}, expected={"pixels": theirs}, cause=cause)


def explain_ids(
    spec: TokenizerSpec, found: Tokens, expected: Tokens, *, against: str, reference: TokenizerSpec | None = None
) -> tuple[Stage, Cause | None]:
    """The stage of token ids, and why they differ from those of `against`: the padding, the end, or the words."""
    same_end = found.eot_index == expected.eot_index
    differs = found.input_ids != expected.input_ids
    if same_end.all() and not differs.any():
        return Stage(name="ids", detail=_ids_text(found)), None
    row = int(np.argmax(differs.any(axis=1) | ~same_end))
    share = float((differs.any(axis=1) | ~same_end).mean())
    after = np.arange(differs.shape[1]) > expected.eot_index[:, None]
    fields = _fields(spec, reference)
    if same_end.all() and not (differs & ~after).any():
        mine, theirs = (int(tokens.input_ids[differs][0]) for tokens in (found, expected))
        detail = f"all ids up to the end are equal, after it {mine} stands where {against} pads with {theirs}"
        said = f"The padding alone differs: {mine} instead of {theirs}{fields}."
        advice = f"{_REBUILD}, so that pad_id is {theirs}; a causal tower gives the same embedding for both."
        return Stage(name="ids", differing=share, detail=detail), Cause(name="pad", found=said, suggestion=advice)
    if not differs.any():
        mine, theirs = int(found.eot_index[row]), int(expected.eot_index[row])
        detail = f"all ids are equal, position {mine} is pooled and {against} pools {theirs}"
        said = f"The position of the end is found by another rule{fields}."
        cause = Cause(name="pooling rule", found=said, suggestion=f"{_REBUILD}: the rule is read from its config.")
        return Stage(name="ids", differing=share, detail=detail), cause
    column = int(np.argmax(differs[row]))
    mine, theirs = (int(tokens.input_ids[row, column]) for tokens in (found, expected))
    detail = f"at position {column} the id is {mine}, {against} has {theirs}"
    said = f"The texts are split into other words from position {column} on{fields}."
    advice = f"{_REBUILD}, with the tokenizer dialect of the library that you compare with."
    return Stage(name="ids", differing=share, detail=detail), Cause(name="tokenizer", found=said, suggestion=advice)


def explain_pixels(
    spec: PreprocessSpec,
    found: np.ndarray,
    expected: np.ndarray,
    *,
    against: str,
    reference: PreprocessSpec | None = None,
    again: Callable[[PreprocessSpec], np.ndarray] | None = None,
) -> tuple[Stage, Cause | None]:
    """The stage of pixels, uint8 [n, 3, height, width], and why they differ from those of `against`.

    What is tried: BGR, a picture shifted by some pixels, and `again`, the bundle's preprocessing with one field of its
    spec taken from `reference`.
    """
    differs = found != expected
    if not differs.any():
        return Stage(name="pixels", detail=f"{found.shape[2]} x {found.shape[3]}, equal"), None
    off = int(np.abs(found.astype(np.int16) - expected.astype(np.int16)).max())
    stage = Stage(
        name="pixels",
        differing=float(differs.mean()),
        detail=f"{differs.mean():.1%} of the levels differ from those of {against}, by up to {off}",
    )
    tries = (_channels(found, expected), _one_field(spec, expected, reference, again), _shift(found, expected))
    cause = next((each for each in tries if each is not None), None)
    if cause is None:
        said = f"Neither channels nor a shift explain it{_fields(spec, reference)}."
        advice = "Compare the versions of Pillow and its JPEG codec with those in the manifest: clip-export doctor."
        cause = Cause(name="pixels", found=said, suggestion=advice)
    return stage, cause


def _cleaning(found: str, expected: str) -> Stage:
    if found == expected:
        return Stage(name="cleaning", detail=_part_of(found))
    pairs = zip(found, expected, strict=False)
    at = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(found), len(expected)))
    detail = f"the bundle reads {_part_of(found, at)}, the checkpoint {_part_of(expected, at)}"
    return Stage(name="cleaning", differing=1.0, detail=detail)


def _part_of(text: str, at: int = 0) -> str:
    """As much of `text` around `at` as fits in a table."""
    start = max(at - _SHOWN // 2, 0)
    part = text[start : start + _SHOWN]
    return repr(part) if part == text else f"{'… ' * (start > 0)}{part!r}{' …' * (start + _SHOWN < len(text))}"


def _ids_text(tokens: Tokens) -> str:
    end = int(tokens.eot_index[0])
    return f"{end + 1} tokens, equal" if len(tokens.input_ids) == 1 else f"golden ids of {len(tokens.input_ids)} equal"


def _channels(found: np.ndarray, expected: np.ndarray) -> Cause | None:
    if not np.array_equal(found[:, ::-1], expected):
        return None
    said = "With red and blue exchanged the pixels are equal: one side reads BGR."
    return Cause(name="channel order", found=said, suggestion="Hand over RGB: OpenCV's pictures need [..., ::-1].")


def _one_field(
    spec: PreprocessSpec,
    expected: np.ndarray,
    reference: PreprocessSpec | None,
    again: Callable[[PreprocessSpec], np.ndarray] | None,
) -> Cause | None:
    """The one field of the spec that makes the pixels equal when it is the reference's."""
    if reference is None or again is None:
        return None
    for field, mine, theirs in _differing(spec, reference):
        try:
            other = dataclasses.replace(spec, **{field: theirs})
        except SpecError:  # a field that needs another beside it
            continue
        pixels = again(other)
        if pixels.shape == expected.shape and np.array_equal(pixels, expected):
            said = f"With {field} {theirs!r} instead of {mine!r} the pixels are equal{_MEANINGS.get(field, '')}."
            return Cause(name=field, found=said, suggestion=f"{_REBUILD}, or state {field} {theirs!r} when building.")
    return None


def _shift(found: np.ndarray, expected: np.ndarray, reach: int = 2) -> Cause | None:
    """A crop that begins some pixels off: what both hold is equal where they overlap."""
    for down, right in _offsets(reach):
        moved = found[:, :, _part(-down, found.shape[2]), _part(-right, found.shape[3])]
        still = expected[:, :, _part(down, found.shape[2]), _part(right, found.shape[3])]
        same = (moved == still).all(axis=(1, 2, 3)) | (found == expected).all(axis=(1, 2, 3))
        if same.all():
            said = f"The crop begins {down:+d} rows and {right:+d} columns off; shifted back, the pixels are equal."
            advice = f"{_REBUILD}, with the preprocess dialect of the library that you compare with."
            return Cause(name="crop", found=said, suggestion=advice)
    return None


def _offsets(reach: int) -> Iterator[tuple[int, int]]:
    steps = range(-reach, reach + 1)
    every = [(down, right) for down in steps for right in steps if (down, right) != (0, 0)]
    return iter(sorted(every, key=lambda offset: abs(offset[0]) + abs(offset[1])))


def _part(offset: int, side: int) -> slice:
    """What of `side` is left when the first `offset`, or the last where it is negative, are cut."""
    return slice(max(offset, 0), side + min(offset, 0))


def _differing(one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    values = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return [(name, mine, theirs) for name, mine, theirs in values if mine != theirs]


def _fields(spec: Any, reference: Any) -> str:
    """The fields in which two specs differ, as the end of a sentence."""
    if reference is None:
        return ""
    listed = [f"{name} is {mine!r} here and {theirs!r} there" for name, mine, theirs in _differing(spec, reference)]
    return f"; {', '.join(listed)}" if listed else ""
