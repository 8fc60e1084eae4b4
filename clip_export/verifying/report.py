"""What `verify` found, as a page for people and as JSON for programs, in one directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from clip_export.against import Comparison
from clip_export.asking import Check as Answer
from clip_export.bundle import Bundle
from clip_export.cosine import unit_rows
from clip_export.golden import Golden
from clip_export.html_report import (
    Check,
    CheckGroup,
    Figure,
    IndexSafety,
    Item,
    MeasuredRow,
    RankFlip,
    ReportContents,
    Retrieval,
    Similarities,
    write_report,
)
from clip_export.images import ImageInput
from clip_export.output_file import check_place as check_file_place
from clip_export.output_file import writing
from clip_export.pair_sources import PairSource
from clip_export.ranking import RECALL_AT, Flip
from clip_export.verification import Row
from clip_export.verifying import ranks
from clip_export.verifying.results import EngineRun, Verification, write_json

__all__ = ["check_place", "contents", "write"]

JSON_FILE = "verification.json"
_GOLDEN_SHOWN = 13  # texts and pictures: as many as there are golden pictures


def write(
    found: Verification,
    bundle: Bundle,
    directory: str | os.PathLike[str],
    *,
    pairs: PairSource | None = None,
    command: str = "",
) -> Path:
    """Write index.html and verification.json to `directory`, which is made where it is missing; gives the page's path.

    `pairs` are those that were ranked: the pictures that are shown are read from there once more. Each file is whole or
    not there. Raises OutputError.
    """
    wanted = {name for run in found.runs if run.retrieval is not None for name in run.retrieval.names.values()}
    pictures = {} if pairs is None else ranks.read_pictures(pairs, wanted)
    shown = contents(found, bundle, pictures, command=command)
    with writing(directory):
        Path(directory).mkdir(parents=True, exist_ok=True)
    write_json(found, Path(directory) / JSON_FILE)
    return write_report(directory, shown)


def check_place(directory: str | os.PathLike[str]) -> None:
    """Raise OutputError where `write` could not: before minutes of work, not after. Makes the directory."""
    with writing(directory):
        Path(directory).mkdir(parents=True, exist_ok=True)
    check_file_place(Path(directory) / JSON_FILE)


def contents(
    found: Verification, bundle: Bundle, pictures: Mapping[str, ImageInput], *, command: str = ""
) -> ReportContents:
    """What the page says; `pictures` are those of pairs, by name."""
    golden = bundle.golden()
    return ReportContents(
        name=found.name,
        verdict=found.verdict,
        sentences=(*found.sentences, f"Compared with {found.reference}."),
        rows=[row for run in found.runs for row in _rows(run)],
        checks=[group for run in found.runs for group in _groups(run)],
        similarities=[shown for run in found.runs for shown in _similarities(run, golden, pictures)],
        retrievals=[_retrieval(run, pictures) for run in found.runs if run.retrieval is not None],
        indexes=[_index(run) for run in found.runs if run.index is not None],
        unmeasured=found.unmeasured,
        notes=found.notes,
        environment=found.environment,
        command=command,
    )


def _rows(run: EngineRun) -> Iterator[MeasuredRow]:
    """Golden samples, and then all inputs that were compared with an original."""
    yield from (_row(run, row, row.output) for row in run.rows)
    if run.comparison is not None:
        against = run.comparison.reference
        yield from (_row(run, row, f"{row.output} against {against}") for row in run.comparison.rows)


def _row(run: EngineRun, row: Row, output: str) -> MeasuredRow:
    return MeasuredRow(
        tower=row.tower,
        output=output,
        precision=run.precision,
        engine=run.title,
        samples=row.samples,
        min_cosine=row.min_cosine,
        p1_cosine=row.p1_cosine,
        mean_cosine=row.mean_cosine,
        max_abs=row.max_abs,
        required_cosine=row.required_cosine,
        passed=row.passed,
        cosines=row.cosines,
    )


def _groups(run: EngineRun) -> Iterator[CheckGroup]:
    name = f"{run.precision} on {run.title}"
    if run.comparison is not None:
        yield CheckGroup(title=f"Stage by stage: {name}", checks=list(_stages(run.comparison)))
    if run.checks:
        checks = [_check(answer) for answer in run.checks]
        yield CheckGroup(title=f"Hostile inputs, batches, threads: {name}", checks=checks)


def _stages(comparison: Comparison) -> Iterator[Check]:
    for stage in comparison.stages:
        detail = stage.failure or f"equal for all {stage.inputs} inputs"
        yield Check(name=stage.name, passed=stage.passed, detail=detail)
    for row in comparison.rows:
        detail = f"least cosine {row.min_cosine:.7f}, of {row.furthest!r}, over {row.samples} inputs"
        yield Check(name=f"{row.tower} {row.output}", passed=row.passed, detail=detail)


def _check(answer: Answer) -> Check:
    return Check(name=answer.name, passed=answer.passed, detail=answer.detail)


def _similarities(run: EngineRun, golden: Golden, pictures: Mapping[str, ImageInput]) -> Iterator[Similarities]:
    """Of the first pairs; of the golden samples where there are no pairs."""
    engine = f"{run.precision} on {run.title}"
    if run.retrieval is not None:
        pairs = run.retrieval
        images = [_picture(pairs, pair, pictures) for pair in pairs.shown]
        texts = [pairs.captions[pair] for pair in pairs.shown]
        reference, found = pairs.cosines
        yield Similarities(engine=engine, images=images, texts=texts, reference=reference, found=found)
    elif set(run.embeddings) == {"text", "image"}:
        assert golden.text is not None and golden.image is not None
        expected = {"text": golden.text.outputs["embedding"], "image": golden.image.outputs["embedding"]}
        text, image = ({tower: unit_rows(rows) for tower, rows in side.items()} for side in (expected, run.embeddings))
        yield Similarities(
            engine=engine,
            images=[Item(image=file) for file in golden.image.files],
            texts=golden.text.texts[:_GOLDEN_SHOWN],
            reference=text["image"] @ text["text"][:_GOLDEN_SHOWN].T,
            found=image["image"] @ image["text"][:_GOLDEN_SHOWN].T,
        )


def _retrieval(run: EngineRun, pictures: Mapping[str, ImageInput]) -> Retrieval:
    found = run.retrieval
    assert found is not None
    notes = [f"{found.ranks.pictures:,} pictures and {found.ranks.captions:,} captions, from {found.source}."]
    notes += ["This engine is the reference itself: nothing can differ."] * found.same
    return Retrieval(
        engine=f"{run.precision} on {run.title}",
        pairs=found.ranks.pairs,
        figures=list(_figures(found)),
        flips=[_flip(found, flip, pictures) for flip in found.ranks.flips],
        notes=notes,
    )


def _figures(found: ranks.Retrieval) -> Iterator[Figure]:
    for k in RECALL_AT:
        before, after = found.ranks.reference.recall[k], found.ranks.engine.recall[k]
        by_images, by_texts = (
            (found.found_by_images, found.found_by_texts) if k == 1 and not found.same else (None, None)
        )
        yield Figure(
            name=f"R@{k} image to text", reference=before.image_to_text, found=after.image_to_text, passed=by_images
        )
        yield Figure(
            name=f"R@{k} text to image", reference=before.text_to_image, found=after.text_to_image, passed=by_texts
        )
    if found.zero_shot is not None:
        shot = found.zero_shot
        title = f"zero-shot accuracy, {shot.labels} labels, {shot.pictures:,} pictures"
        yield Figure(name=title, reference=shot.reference, found=shot.engine)
        yield Figure(name="zero-shot agreement", reference=None, found=shot.agreement)
    agreement = found.ranks.agreement
    yield Figure(name="top-1 agreement image to text", reference=None, found=agreement.image_to_text)
    yield Figure(name="top-1 agreement text to image", reference=None, found=agreement.text_to_image)
    before_loss, after_loss = found.ranks.reference.loss, found.ranks.engine.loss
    yield Figure(name="contrastive loss", reference=before_loss, found=after_loss, share=False)


def _flip(found: ranks.Retrieval, flip: Flip, pictures: Mapping[str, ImageInput]) -> RankFlip:
    to_text = flip.direction == "image to text"

    def item(pair: int | None, *, picture: bool) -> Item:
        if pair is None:
            return Item(text="nothing")
        return _picture(found, pair, pictures) if picture else Item(text=found.captions[pair])

    return RankFlip(
        query=item(flip.query, picture=to_text),
        right=item(flip.right, picture=not to_text),
        reference_rank=flip.reference_rank,
        found_rank=flip.engine_rank,
        reference_first=item(flip.reference_first, picture=not to_text),
        found_first=item(flip.engine_first, picture=not to_text),
    )


def _picture(found: ranks.Retrieval, pair: int, pictures: Mapping[str, ImageInput]) -> Item:
    return Item(text=found.names[pair], image=pictures.get(found.names[pair]))


def _index(run: EngineRun) -> IndexSafety:
    found = run.index
    assert found is not None
    shares = (
        ("cosine of a new vector to its old one, least", found.own_cosine_min, False),
        ("cosine of a new vector to its old one, 1st percentile", found.own_cosine_p1, False),
        ("share of the 10 nearest that stay the same", found.neighbour_overlap, True),
        ("share of searches whose first result stays the same", found.first_agreement, True),
        ("mean change of a score", found.shift_mean, False),
        ("largest change of a score", found.shift_max, False),
    )
    return IndexSafety(
        engine=f"{run.precision} on {run.title}",
        verdict="passed" if found.safe else "failed",
        sentence=" ".join([found.verdict, *(f"{note[0].upper()}{note[1:]}." for note in found.notes)]),
        figures=[Figure(name=name, reference=None, found=value, share=share) for name, value, share in shares],
    )
