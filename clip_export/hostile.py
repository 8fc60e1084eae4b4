"""What golden samples do not show: hostile inputs, any composition of a batch, many threads at once.

`check` asks one opened encoder, whatever runs it. Most answers need no reference: an embedding is finite and of length
1, the same input gives the same embedding in every company (company.py), rows come back in their order. How far
hostile inputs are from the fp32 graphs is measured too. Runs without torch.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from clip_export.asking import Check, Subject, few, same_cosines
from clip_export.bundle import Bundle
from clip_export.company import AGREEMENT, ask_composition, ask_order, ask_threads, batch_sizes
from clip_export.encoder import Encoder, Floats
from clip_export.errors import ClipExportError, TextError
from clip_export.hostile_inputs import (
    FIRST_FRAME,
    LONE_SURROGATE,
    ONE_WORD,
    UNROTATED,
    hostile_images,
    hostile_texts,
)
from clip_export.images import ImageInput, open_image
from clip_export.preprocess import SaturatedImageWarning
from clip_export.progress import Progress, silent
from clip_export.spec import ModelSpec, Tower

__all__ = ["Check", "check"]

_UNIT = 1e-5  # how far the length of a normalized embedding may be from 1: float32


def check(
    encoder: Encoder,
    bundle: Bundle,
    *,
    precision: str,
    reference: Encoder | None,
    required: float | None = None,
    texts: Mapping[str, str] | None = None,
    images: Mapping[str, ImageInput] | None = None,
    progress: Progress = silent,
) -> tuple[Check, ...]:
    """Ask `encoder`, which runs `precision` of `bundle`, everything that can be asked without its checkpoint.

    `reference` runs the fp32 graphs of the same bundle; hostile inputs have at least the cosine `required` to it, or
    any where that is None. Without a reference they are not compared. `texts` and `images` are named inputs instead of
    the built-in ones. An input or a batch that raises a ClipExportError is a check that failed; other exceptions are
    bugs and keep their traceback, but for those of the threads: a race ends in any of them.
    """
    given: dict[Tower, dict[str, Any]] = {
        "text": dict(hostile_texts() if texts is None else texts),
        "image": _fitting(hostile_images() if images is None else images, bundle.spec),
    }
    found: list[Check] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturatedImageWarning)  # one of the pictures is there to saturate
        for done, tower in enumerate(encoder.towers):
            progress(f"hostile inputs: {tower}", done, len(encoder.towers))
            subject = Subject(
                encoder=encoder,
                tower=tower,
                output=_output(bundle, tower, precision),
                inputs=given[tower] | (_lengths(encoder) if tower == "text" else {}),
                agreement=AGREEMENT[precision],
                batches=batch_sizes(encoder, bundle, tower, precision),
            )
            found += _ask(subject, reference, required)
    progress("hostile inputs", len(encoder.towers), len(encoder.towers))
    return tuple(found)


def _ask(subject: Subject, reference: Encoder | None, required: float | None) -> Iterator[Check]:
    tower = subject.tower
    sound, first = _ask_alone(subject)
    yield first
    if sound is not None:
        yield _attempt(f"{tower}: order", partial(ask_order, sound))
        yield _attempt(f"{tower}: batch composition", partial(ask_composition, sound))
        yield _attempt(f"{tower}: threads", partial(ask_threads, sound))
        if reference is not None:
            yield _attempt(f"{tower}: against fp32", partial(_ask_fp32, sound, reference, required))
    if tower == "text":
        yield _attempt("text: too long", partial(_ask_too_long, subject.encoder))
        yield _attempt("text: not Unicode", partial(_ask_not_unicode, subject.encoder))
    else:
        yield from _ask_ignored(subject)


def _attempt(name: str, ask: Callable[[], Check]) -> Check:
    try:
        return ask()
    except ClipExportError as error:
        return Check(name=name, passed=False, detail=f"raised {type(error).__name__}: {error.message}")


def _ask_alone(subject: Subject) -> tuple[Subject | None, Check]:
    """Every input by itself. What is asked next is asked of those that gave what an embedding should be."""
    alone: dict[str, Floats] = {}
    wrong = []
    for row, name in enumerate(subject.names):
        try:
            vector = subject.run([row])[0]
        except ClipExportError as error:
            wrong.append(f"{name!r} raised {type(error).__name__}: {error.message}")
            continue
        fault = _fault(vector, unit=subject.output == "embedding")
        if fault is None:
            alone[name] = vector
        else:
            wrong.append(f"{name!r} gives {fault}")
    answer = Check(
        name=f"{subject.tower}: hostile inputs",
        passed=not wrong,
        detail=few(wrong) or f"each gives a finite {subject.output}",
        measured={"inputs": len(subject.names), "failed": len(wrong)},
    )
    if not alone:
        return None, answer
    inputs = {name: subject.inputs[name] for name in alone}
    return dataclasses.replace(subject, inputs=inputs, alone=np.stack(list(alone.values()))), answer


def _fault(vector: Floats, *, unit: bool) -> str | None:
    """What is wrong with one output: float32 [features]; an embedding is a `unit` vector."""
    if not np.isfinite(vector).all():
        return f"{int((~np.isfinite(vector)).sum())} values that are not finite"
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if unit and abs(length - 1) > _UNIT:
        return f"a vector of length {length:.6f}, expected 1"
    return None if length > 0 else "zeros"


def _ask_fp32(subject: Subject, reference: Encoder, required: float | None) -> Check:
    """How far hostile inputs are from the fp32 graphs, each alone."""
    expected = np.concatenate([subject.run([row], reference) for row in range(len(subject.names))])
    near = same_cosines(subject.alone, expected)
    place = int(near.argmin())
    worst = float(near[place])
    measured = {"min_cosine": worst, "p1_cosine": float(np.quantile(near, 0.01)), "mean_cosine": float(near.mean())}
    detail = f"furthest from the fp32 graph is {subject.names[place]!r}, cosine {worst:.7f}"
    if required is not None:
        measured["required"] = required
        detail += f", expected at least {required}"
    passed = required is None or worst >= required
    return Check(name=f"{subject.tower}: against fp32", passed=passed, detail=detail, measured=measured)


def _ask_too_long(encoder: Encoder) -> Check:
    """What does not fit raises TextError or is cut, as asked, and by default as the dialect's original does."""
    fits, longer = _lengths(encoder).values()
    assert encoder.spec.tokenizer is not None
    cuts = encoder.spec.tokenizer.truncate
    wrong = []
    if _refuses(encoder, fits, truncate=False):
        wrong.append("a text that fills the context is refused")
    if not _refuses(encoder, longer, truncate=False):
        wrong.append("truncate=False takes a text that does not fit, expected TextError")
    if _refuses(encoder, longer, truncate=None) is cuts:
        wrong.append(f"by default a text that does not fit is {'refused' if cuts else 'cut'}, the spec says otherwise")
    if not np.array_equal(encoder.tokenize([longer], truncate=True), encoder.tokenize([fits], truncate=True)):
        wrong.append("truncate=True does not keep the beginning and the end token")
    return Check(
        name="text: too long",
        passed=not wrong,
        detail="; ".join(wrong) or f"{'cut' if cuts else 'refused'} by default, the other way where asked",
        measured={"context_length": encoder.spec.tokenizer.context_length},
    )


def _ask_not_unicode(encoder: Encoder) -> Check:
    """A lone surrogate is repaired by the dialects that use ftfy, and a TextError in the other."""
    assert encoder.spec.tokenizer is not None
    dialect = encoder.spec.tokenizer.dialect
    refused = _refuses(encoder, LONE_SURROGATE, truncate=True)
    passed = refused is (dialect == "huggingface")
    detail = f"a lone surrogate is {'refused' if refused else 'repaired'}"
    if not passed:
        detail += f", the {dialect} dialect does otherwise"
    return Check(name="text: not Unicode", passed=passed, detail=detail)


def _ask_ignored(subject: Subject) -> Iterator[Check]:
    """No original applies EXIF rotation, and all take the first frame: pixels equal those of the file without it."""
    pairs = (("EXIF rotation", UNROTATED, "not applied"), ("animation", FIRST_FRAME, "the first frame is taken"))
    for title, pair, detail in pairs:
        if not set(pair) <= subject.inputs.keys():
            continue
        one, other = subject.encoder.preprocess([subject.inputs[name] for name in pair])
        differing = int((one != other).sum())
        yield Check(
            name=f"image: {title}",
            passed=differing == 0,
            detail=f"{differing} values differ from those of {pair[1]!r}" if differing else detail,
            measured={"differing": differing},
        )


def _lengths(encoder: Encoder) -> dict[str, str]:
    """The longest text that fits the context, and one that is one word longer."""
    assert encoder.spec.tokenizer is not None
    words = encoder.spec.tokenizer.context_length
    while words and _refuses(encoder, " ".join([ONE_WORD] * words), truncate=False):
        words -= 1
    fits, longer = (" ".join([ONE_WORD] * count) for count in (words, words + 1))
    return {"longest that fits": fits, "one word too long": longer}


def _refuses(encoder: Encoder, text: str, *, truncate: bool | None) -> bool:
    try:
        encoder.tokenize([text], truncate=truncate)
    except TextError:
        return True
    return False


def _fitting(images: Mapping[str, ImageInput], spec: ModelSpec) -> dict[str, ImageInput]:
    """Without those that open_clip's `longest` would shrink to nothing, and refuses as the original does."""
    if spec.preprocess is None or spec.preprocess.resize_mode != "longest":
        return dict(images)
    target = spec.preprocess.resize_size
    sizes = {name: open_image(image).size for name, image in images.items()}
    return {name: image for name, image in images.items() if max(sizes[name]) < target * min(sizes[name])}


def _output(bundle: Bundle, tower: Tower, precision: str) -> str:
    """What stands for an embedding; a bundle may be built without embeddings."""
    given = bundle.graph(tower, precision).outputs
    return next(name for name in ("embedding", "pooled", "hidden_states") if name in given)
