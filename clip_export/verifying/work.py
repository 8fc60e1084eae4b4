"""Everything that is asked of one engine, beside the answers of a reference, which is asked once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from clip_export.against import Expected, Reference, compare, open_reference, run_reference
from clip_export.backends import status
from clip_export.bundle import Bundle
from clip_export.choice import CPU_INT8, FP32, GRAPHS, choose
from clip_export.encoder import Encoder, Floats
from clip_export.errors import InputError
from clip_export.hostile import Check, check
from clip_export.index_safety import IndexSafety, check_index, compare_index, open_index
from clip_export.pair_sources import PairSource, open_pairs
from clip_export.progress import Progress
from clip_export.quantization import QUANTIZED
from clip_export.runtime import open_choice
from clip_export.spec import Tower
from clip_export.verification import allowed_recall_drop, golden_outputs, golden_rows, required_cosine
from clip_export.verifying.asked import Asked
from clip_export.verifying.ranks import EmbeddedPairs, Model, Retrieval, compare_pairs, embed_pairs, model_of
from clip_export.verifying.results import EngineRun
from clip_export.verifying.vectors import embed_inputs

__all__ = ["Work"]

T = TypeVar("T")

# Calibrated on what users have, and held to a contract over that: what strange inputs lose is told and not judged.
_CALIBRATED = (*QUANTIZED, CPU_INT8)
_BOTH = "build it again with both towers and --outputs embedding"


class Work:
    """What every engine is asked, with the reference's answers, which are found once.

    `fp32` are the fp32 graphs of the bundle on the CPU: the reference of what no original is asked about. None where
    ONNX Runtime is not here, which `unmeasured` then says.
    """

    def __init__(self, bundle: Bundle, asked: Asked, progress: Progress) -> None:
        self._bundle, self._asked, self._progress = bundle, asked, progress
        self._golden = bundle.golden()
        self._expected: Expected | None = None
        self._pairs: PairSource | None = None
        self._expected_pairs: EmbeddedPairs | None = None
        self._index: Floats | None = None
        self._inputs: list[str] | list[Path] = []
        self._fp32: Encoder | None = None
        self._fp32_title = ""
        self.reference_name = "the fp32 reference's outputs that the bundle carries"
        self.unmeasured: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, bundle: Bundle, asked: Asked, progress: Progress) -> Work:
        """Open all that is named first, so that a mistake costs no waiting; then ask the reference."""
        work = cls(bundle, asked, progress)
        if asked.pairs is not None:
            _require_both_towers(bundle)
            work._pairs = open_pairs(asked.pairs, skip_errors=asked.skip_errors)
        if asked.index is not None:
            work._open_index(asked.index)
        reference = None if asked.against is None else open_reference(asked.against, bundle)
        if reference is not None:
            work._ask_original(reference)
        elif asked.hostile or work._pairs is not None:
            work._open_fp32()
        if work._pairs is not None:
            work._ask_pairs(reference)
        return work

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fp32 is not None:
            self._fp32.close()

    def run(self, encoder: Encoder, title: str, precision: str) -> EngineRun:
        """Everything that was asked for, of one opened engine."""
        required = self._required(precision)
        self._progress(f"{precision}: golden samples", 0, 0)
        outputs = golden_outputs(encoder, self._golden)
        embeddings = {tower: found["embedding"] for tower, found in outputs.items() if "embedding" in found}
        comparison = None
        if self._expected is not None:
            comparison = compare(
                encoder,
                self._expected,
                precision=precision,
                required=required,
                all_judged=precision not in _CALIBRATED,
            )
        return EngineRun(
            title=title,
            precision=precision,
            rows=tuple(golden_rows(outputs, self._golden, precision=precision, engine=title, required=required)),
            checks=self._checks(encoder, title, precision, required) if self._asked.hostile else (),
            comparison=comparison,
            retrieval=self._attempt("pairs", lambda: self._retrieval(encoder, title, precision)),
            index=self._attempt("the index", lambda: self._index_safety(encoder)),
            embeddings=embeddings,
        )

    def _required(self, precision: str) -> float:
        asked = self._asked.min_cosine
        return required_cosine(self._bundle, precision) if asked is None else asked

    def _attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` gives; an input that cannot be used after all does not cost what was measured before it."""
        try:
            return work()
        except InputError as error:
            self.unmeasured = (*self.unmeasured, f"{what}: {error.message}")
            return None

    def _is_fp32(self, title: str, precision: str) -> bool:
        """Whether an engine is the fp32 graphs on the CPU, which are the reference."""
        return self._fp32 is not None and (title, precision) == (self._fp32_title, FP32)

    def _checks(self, encoder: Encoder, title: str, precision: str, required: float) -> tuple[Check, ...]:
        return check(
            encoder,
            self._bundle,
            precision=precision,
            reference=None if self._is_fp32(title, precision) else self._fp32,  # itself it cannot differ from
            required=None if precision in _CALIBRATED else required,
            progress=self._progress,
        )

    def _ask_original(self, reference: Reference) -> None:
        self.reference_name = f"{reference.name} {reference.version}"
        self._expected = run_reference(reference, self._bundle, hostile=self._asked.hostile, progress=self._progress)
        self.notes, self.unmeasured = self._expected.notes, self._expected.lacking

    def _open_index(self, path: str | os.PathLike[str]) -> None:
        """The index and its inputs, as far as they can be checked before anything is encoded."""
        assert self._asked.inputs is not None
        self._index, self._inputs = open_index(path), self._asked.inputs.read()
        tower: Tower = "text" if self._asked.inputs.texts is not None else "image"
        spec = self._bundle.spec.text if tower == "text" else self._bundle.spec.image
        if spec is None or "embedding" not in self._bundle.graph(tower).outputs:
            raise InputError(f"this bundle gives no {tower} embeddings to compare an index with", hint=_BOTH)
        assert spec.embedding_dim is not None
        check_index(self._index, len(self._inputs), spec.embedding_dim, name=Path(path).name)

    def _open_fp32(self) -> None:
        lacking = status(GRAPHS)
        if not lacking.works:
            self.unmeasured = (f"nothing was compared with the fp32 graphs: {lacking.reason}",)
            return
        choice = choose(self._bundle, backend=GRAPHS, device="cpu", precision=FP32)
        self._fp32, self._fp32_title = open_choice(self._bundle, choice), choice.title

    def _ask_pairs(self, reference: Reference | None) -> None:
        if reference is None and self._fp32 is None:
            return  # said already
        model = model_of(self._fp32) if self._fp32 is not None else _original(reference)
        self._expected_pairs = self._embed(model, "reference")
        self.notes += tuple(
            f"left out, with {failure.pairs} captions: {failure.name}: {failure.message}"
            for failure in self._expected_pairs.failures
        )

    def _embed(self, model: Model, title: str) -> EmbeddedPairs:
        assert self._pairs is not None
        return embed_pairs(
            self._pairs,
            model,
            self._bundle.spec,
            skip_errors=self._asked.skip_errors,
            title=title,
            progress=self._progress,
        )

    def _retrieval(self, encoder: Encoder, title: str, precision: str) -> Retrieval | None:
        expected, asked = self._expected_pairs, self._asked.max_recall_drop
        if expected is None or self._pairs is None:
            return None
        same = self._is_fp32(title, precision)
        return compare_pairs(
            expected if same else self._embed(model_of(encoder), precision),
            expected,
            self._bundle.spec,
            source=self._pairs.description,
            scale=encoder.logit_factor,
            allowed=allowed_recall_drop(self._bundle, precision) if asked is None else asked,
        )

    def _index_safety(self, encoder: Encoder) -> IndexSafety | None:
        if self._index is None:
            return None
        assert self._asked.index is not None
        vectors = embed_inputs(encoder, self._inputs, progress=self._progress)
        return compare_index(self._index, vectors, name=Path(self._asked.index).name)


def _original(reference: Reference | None) -> Model:
    assert reference is not None
    return Model(
        texts=reference.embed_text, pictures=lambda chunk: reference.embed_image([s.data for s in chunk.samples])
    )


def _require_both_towers(bundle: Bundle) -> None:
    lacking = [tower for tower in ("text", "image") if tower not in bundle.spec.towers]
    lacking += [
        f"embeddings of the {tower} tower"
        for tower in bundle.spec.towers
        if "embedding" not in bundle.graph(tower).outputs
    ]
    if lacking:
        raise InputError(
            f"pairs take both towers and their embeddings; this bundle lacks {' and '.join(lacking)}",
            hint=_BOTH,
        )
