"""A bundle against what it stands in for, stage by stage: token ids, pixels, embeddings.

    CHECKPOINT                    the checkpoint itself, its towers in float32 torch (pipeline.reference)
    transformers:DIRECTORY        transformers' CLIPModel, CLIPTokenizer and CLIPImageProcessor on PIL
    open_clip:NAME                open_clip's model, transform and tokenizer: a directory with open_clip_config.json,
    open_clip:NAME@FILE           an hf-hub: id, or the name of an architecture with the weights for it

The inputs are the golden samples and the hostile ones, so that what a tokenizer or a preprocessor does to odd ones is
compared with the original too. What stands behind the names: originals.py.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from clip_export import verification
from clip_export.bundle import Bundle
from clip_export.encoder import Encoder, Floats
from clip_export.errors import CheckpointError, InputError
from clip_export.hostile_inputs import hostile_images, hostile_texts
from clip_export.images import ImageInput
from clip_export.originals import OpenClip, TorchTowers, Transformers
from clip_export.preprocess import SaturatedImageWarning
from clip_export.progress import Progress, silent
from clip_export.spec import Tower

__all__ = [
    "Comparison",
    "Difference",
    "Expected",
    "Reference",
    "Row",
    "Stage",
    "compare",
    "open_reference",
    "run_reference",
]

Ints = npt.NDArray[np.integer]
Pixels = npt.NDArray[np.uint8]

_FRONT: dict[Tower, str] = {"text": "ids", "image": "pixels"}  # what stands before a tower and is compared first


class Reference(Protocol):
    """What a bundle is compared with. Everything takes a list, and gives one row for each input in its order.

    `name` and `version` say what it is, as in "transformers" and "5.23.0"; `facts` are fields of a ModelSpec by their
    dotted names, as far as it knows them; `notes` is what a reader of the result should know.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, object]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def ids(self, texts: Sequence[str]) -> Ints:
        """Token ids, [n, context_length], what is too long cut."""
        ...

    def pixels(self, images: Sequence[ImageInput]) -> Pixels:
        """Pixels before normalization, uint8 [n, 3, height, width]."""
        ...

    def embed_text(self, texts: Sequence[str]) -> Floats:
        """Embeddings as they leave the tower, float32 [n, embedding_dim]."""
        ...

    def embed_image(self, images: Sequence[ImageInput]) -> Floats:
        """Embeddings as they leave the tower, float32 [n, embedding_dim]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where the first input that differs first differs: `position` within its row, and both values."""

    input: str
    position: tuple[int, ...]
    found: int
    expected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """`name` is ids or pixels; of `inputs` that were compared, `differing` are not equal in every value."""

    name: str
    inputs: int
    differing: int
    first: Difference | None

    @property
    def passed(self) -> bool:
        """Whether all are equal."""
        return self.differing == 0

    @property
    def failure(self) -> str:
        """What differs, in a sentence; empty where nothing does."""
        if self.first is None:
            return ""
        found = f"{self.first.found} at {list(self.first.position)}, expected {self.first.expected}"
        return (
            f"{self.name} of {self.differing} of {self.inputs} inputs differ; the first, {self.first.input!r}: {found}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(verification.Row):
    """One tower's embeddings against the reference's. `furthest` is the name of the input with the smallest cosine."""

    furthest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` found. Ids and pixels come before embeddings: where they differ, embeddings have to."""

    reference: str
    version: str
    stages: tuple[Stage, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether ids and pixels are equal and every row keeps its contract."""
        return all(stage.passed for stage in self.stages) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[str, ...]:
        """What differs, or is below its contract, a sentence for each."""
        stages = [stage.failure for stage in self.stages if not stage.passed]
        rows = [
            f"{row.tower} embeddings are below their contract: min cosine {row.min_cosine:.7f} to {self.reference}, "
            f"required {row.required_cosine:.7g}, furthest is {row.furthest!r}"
            for row in self.rows
            if not row.passed
        ]
        return (*stages, *rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        parts = {
            "stages": [{**dataclasses.asdict(stage), "passed": stage.passed} for stage in self.stages],
            "rows": [row.to_dict() for row in self.rows],
        }
        about = {"reference": self.reference, "version": self.version, "notes": list(self.notes)}
        return {**about, **parts, "passed": self.passed}


def open_reference(against: str, bundle: Bundle) -> Reference:
    """Open what `against` names, as the docstring of this module lists it, to compare `bundle` with.

    Raises MissingDependencyError where a library is not installed; CheckpointError where it cannot be read, has no
    weights, or is not the model of `bundle`: the message lists the fields of the spec that differ.
    """
    kind, separator, name = against.partition(":")
    originals: dict[str, type[Transformers] | type[OpenClip]] = {"transformers": Transformers, "open_clip": OpenClip}
    if not separator or kind not in originals:
        return TorchTowers(against, bundle)
    if not name:
        raise InputError(f"{against!r} names no model", hint=f"write {kind}:DIRECTORY")
    return originals[kind](name, bundle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a reference gives, by tower: `inputs` by name, ids or pixels in `front`, and embeddings.

    It is asked once, whatever is compared with it, and can be freed before an engine is opened. The first `golden` of a
    tower's inputs are golden samples; `lacking` says in words whose embeddings there are none of.
    """

    reference: str
    version: str
    notes: tuple[str, ...]
    lacking: tuple[str, ...]
    golden: Mapping[Tower, int]
    inputs: Mapping[Tower, Mapping[str, Any]]
    front: Mapping[Tower, Ints]
    embeddings: Mapping[Tower, Floats]


def run_reference(
    reference: Reference,
    bundle: Bundle,
    *,
    texts: Mapping[str, str] | None = None,
    images: Mapping[str, ImageInput] | None = None,
    hostile: bool = True,
    progress: Progress = silent,
) -> Expected:
    """Ask `reference` for all that the towers of `bundle` are compared with.

    `texts` and `images` are named inputs; by default the golden samples of the bundle and, with `hostile`, those.
    """
    odd_texts, odd_images = (hostile_texts(), hostile_images()) if hostile else ({}, {})
    inputs: dict[Tower, Mapping[str, Any]] = {
        "text": {**_golden_texts(bundle), **odd_texts} if texts is None else texts,
        "image": {**_golden_images(bundle), **odd_images} if images is None else images,
    }
    towers = bundle.spec.towers
    front: dict[Tower, Ints] = {}
    embeddings: dict[Tower, Floats] = {}
    with _quietly():
        for done, tower in enumerate(towers):
            progress(f"{reference.name}: {tower}", done, len(towers))
            text, items = tower == "text", list(inputs[tower].values())
            front[tower] = reference.ids(items) if text else reference.pixels(items)
            if "embedding" in bundle.graph(tower).outputs:
                embeddings[tower] = reference.embed_text(items) if text else reference.embed_image(items)
    progress(reference.name, len(towers), len(towers))
    lacking = [
        f"the {tower} graph gives no embeddings, so only its {_FRONT[tower]} were compared with {reference.name}"
        for tower in towers
        if tower not in embeddings
    ]
    return Expected(
        reference=reference.name,
        version=reference.version,
        notes=reference.notes,
        lacking=tuple(lacking),
        golden={"text": len(_golden_texts(bundle)), "image": len(_golden_images(bundle))},
        inputs={tower: inputs[tower] for tower in towers},
        front=front,
        embeddings=embeddings,
    )


def compare(
    encoder: Encoder, expected: Expected, *, precision: str, required: float, all_judged: bool = True
) -> Comparison:
    """Compare `encoder`, which runs `precision`, with what a reference gave; `required` is the least cosine.

    Where not `all_judged`, only golden samples are: what hostile inputs lose is told in `notes`. Raises CheckpointError
    where ids or pixels have another shape.
    """
    stages: list[Stage] = []
    rows: list[Row] = []
    told: list[str] = []
    with _quietly():
        for tower in encoder.towers:
            text, names, items = tower == "text", list(expected.inputs[tower]), list(expected.inputs[tower].values())
            front = encoder.tokenize(items, truncate=True) if text else encoder.preprocess(items)
            stages.append(_stage(_FRONT[tower], names, front, expected.front[tower]))
            if tower in expected.embeddings:
                options = {"precision": precision, "engine": encoder.engine, "required": required}
                found = (
                    encoder.encode_text(items, truncate=True, normalize=False)
                    if text
                    else encoder.encode_image(items, normalize=False)
                )
                count = len(items) if all_judged else expected.golden[tower]
                goal = expected.embeddings[tower]
                rows.append(_row(tower, names[:count], found[:count], goal[:count], **options))
                if count < len(items):
                    other = _row(tower, names[count:], found[count:], goal[count:], **options)
                    told.append(
                        f"{precision} {tower}: hostile inputs are told of and not judged: least cosine "
                        f"{other.min_cosine:.7f} to {expected.reference}, of {other.furthest!r}"
                    )
    return Comparison(
        reference=expected.reference,
        version=expected.version,
        stages=tuple(stages),
        rows=tuple(rows),
        notes=(*expected.notes, *told),
    )


def _golden_texts(bundle: Bundle) -> dict[str, str]:
    golden = bundle.golden().text
    return {} if golden is None else {f"golden text {i}": text for i, text in enumerate(golden.texts)}


def _golden_images(bundle: Bundle) -> dict[str, bytes]:
    golden = bundle.golden().image
    return {} if golden is None else {f"golden picture {i}": file for i, file in enumerate(golden.files)}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without our warning of 16-bit pictures, and Pillow's of what the originals do to palettes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturatedImageWarning)
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
        yield


def _stage(name: str, names: Sequence[str], found: Ints, expected: Ints) -> Stage:
    if found.shape != expected.shape:
        raise CheckpointError(
            f"expected {name} {list(found.shape)} as the bundle gives, the reference gives {list(expected.shape)}",
            hint="it is not the model of this bundle, or its tokenizer or preprocessor was changed",
        )
    differs = found != expected
    rows = differs.reshape(len(found), -1).any(axis=1)
    if not rows.any():
        return Stage(name=name, inputs=len(found), differing=0, first=None)
    row = int(rows.argmax())
    position = tuple(int(index) for index in np.argwhere(differs[row])[0])
    mine, theirs = (int(array[(row, *position)]) for array in (found, expected))
    first = Difference(input=names[row], position=position, found=mine, expected=theirs)
    return Stage(name=name, inputs=len(found), differing=int(rows.sum()), first=first)


def _row(tower: Tower, names: Sequence[str], found: Floats, expected: Floats, **options: Any) -> Row:
    plain = verification.compare(tower, "embedding", found, expected, **options)
    worst = int(np.nan_to_num(plain.cosines, nan=-1.0).argmin())
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return Row(**fields, furthest=names[worst])
