"""How `verify` prints what was found: golden samples first, then what else was asked for, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from clip_export.commands._output import print_columns, print_line

if TYPE_CHECKING:
    from clip_export.against import Comparison
    from clip_export.verifying import EngineRun, Verification
    from clip_export.verifying.ranks import Retrieval

_RECALL_AT = (1, 5, 10)


def print_verification(found: Verification) -> None:
    """All of it, on stdout."""
    engines = list(dict.fromkeys(run.title for run in found.runs))
    typer.echo(f"{found.name} on {'; '.join(engines) or 'nothing'}")
    typer.echo()
    if found.rows:
        print_columns(_golden(found, with_engine=len(engines) > 1))
        typer.echo()
        # Loading the bundle has compared them; one that differs is an error.
        fronts = {"text": "token ids", "image": "pixels"}
        print_line(f"{' and '.join(fronts[tower] for tower in fronts if tower in _towers(found))}: equal")
    for run in found.runs:
        _print_run(run)
    for line in (*found.notes, *_verdict(found)):
        print_line(line)


def _towers(found: Verification) -> set[str]:
    return {row.tower for row in found.rows}


def _print_run(run: EngineRun) -> None:
    for line in _checks(run):
        print_line(line)
    if run.comparison is not None:
        _print_comparison(run, run.comparison)
    if run.retrieval is not None:
        _print_retrieval(run, run.retrieval)
    if run.index is not None:
        print_line("\n".join([f"\n{run.precision} on {run.title}, index: {run.index.verdict}", *run.index.notes]))


def _golden(found: Verification, *, with_engine: bool) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("tower", "output", "precision", "samples", "min cosine", "required", "p1 cosine", "mean cosine", "max abs", "")
    ]
    for run in found.runs:
        for row in run.rows:
            required, mean = f"{row.required_cosine:.7g}", f"{row.mean_cosine:.7f}"
            cosines = (f"{row.min_cosine:.7f}", required, f"{row.p1_cosine:.7f}", mean)
            verdict = "ok" if row.passed else "FAILED"
            cells = (row.tower, row.output, run.precision, str(row.samples), *cosines, f"{row.max_abs:.1e}", verdict)
            table.append((*cells, run.title) if with_engine else cells)
    return [(*row, *[""] * (max(map(len, table)) - len(row))) for row in table]


def _checks(run: EngineRun) -> Iterator[str]:
    """One line where all went well; what did not, in full."""
    failed = [check for check in run.checks if not check.passed]
    if run.checks:
        passed = f"{len(run.checks) - len(failed)} of {len(run.checks)} checks passed"
        yield f"hostile inputs, batches, threads, {run.precision}: {passed}"
    for check in failed:
        yield f"  FAILED {check.name}: {check.detail}"


def _print_comparison(run: EngineRun, found: Comparison) -> None:
    typer.echo(f"\n{run.precision} on {run.title}, against {found.reference} {found.version}")
    typer.echo()
    for stage in found.stages:
        verdict = "equal" if stage.passed else f"DIFFER: {stage.failure}"
        print_line(f"  {stage.name} of {stage.inputs} inputs: {verdict}")
    table: list[tuple[str, ...]] = [
        ("tower", "inputs", "min cosine", "required", "p1 cosine", "mean cosine", "max abs", "furthest", "")
    ]
    for row in found.rows:
        cosines = (f"{row.min_cosine:.7f}", f"{row.required_cosine:.7g}", f"{row.p1_cosine:.7f}")
        last = (f"{row.mean_cosine:.7f}", f"{row.max_abs:.1e}", row.furthest, "ok" if row.passed else "FAILED")
        table.append((row.tower, str(row.samples), *cosines, *last))
    if found.rows:
        print_columns(table)


def _print_retrieval(run: EngineRun, found: Retrieval) -> None:
    itself = ", the reference itself" if found.same else ""
    print_line(f"\n{run.precision} on {run.title}, {found.ranks.pairs:,} {found.source}{itself}")
    typer.echo()
    table: list[tuple[str, ...]] = [("", "reference", "engine", "difference", "")]
    verdicts = ["-" if found.same else "ok" if passed else "FAILED" for passed in _directions(found)]
    for k in _RECALL_AT:
        before, after = found.ranks.reference.recall[k], found.ranks.engine.recall[k]
        by_images, by_texts = verdicts if k == 1 else ("", "")
        table.append((f"R@{k} image to text", *_shares(before.image_to_text, after.image_to_text), by_images))
        table.append((f"R@{k} text to image", *_shares(before.text_to_image, after.text_to_image), by_texts))
    if found.zero_shot is not None:
        shot = found.zero_shot
        table.append((f"zero-shot, {shot.labels} labels", *_shares(shot.reference, shot.engine), ""))
    losses = found.ranks.reference.loss, found.ranks.engine.loss
    table.append(("contrastive loss", *(f"{loss:.4f}" for loss in losses), f"{found.ranks.loss_difference:+.4f}", ""))
    agreement = found.ranks.agreement
    table.append(("agreement image to text", "", f"{agreement.image_to_text:.2%}", "", ""))
    table.append(("agreement text to image", "", f"{agreement.text_to_image:.2%}", "", ""))
    print_columns(table, numbers=True)
    for flip in found.ranks.flips[:3]:
        ranks = f"rank {flip.reference_rank} to {flip.engine_rank}"
        asked = found.names[flip.query] if flip.direction == "image to text" else repr(found.captions[flip.query])
        print_line(f"  {flip.direction}: {asked}: {ranks}")


def _directions(found: Retrieval) -> tuple[bool, bool]:
    return found.found_by_images, found.found_by_texts


def _shares(reference: float, engine: float) -> tuple[str, str, str]:
    return f"{reference:.2%}", f"{engine:.2%}", f"{100 * (engine - reference):+.2f} points"


def _verdict(found: Verification) -> Iterator[str]:
    if found.verdict == "passed":
        yield "passed"
        return
    for words in found.unmeasured:
        yield f"NOT MEASURED: {words}"
    if found.verdict == "not measured":
        yield "NOT MEASURED: what was measured is as it has to be" if found.runs else "NOT MEASURED"
        return
    for name, missed in found.missed.items():
        yield f"{name} was published below its contract: {'; '.join(missed)}"
    yield "FAILED: below the contract"
