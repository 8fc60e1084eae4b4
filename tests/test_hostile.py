"""Hostile inputs and the checks over them: sound encoders pass, and each check sees the fault that it is there for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles_made
import checkpoints_made
import numpy as np
import planted
import pytest

import clip_export
from clip_export.asking import Check
from clip_export.bundle import Bundle
from clip_export.company import AGREEMENT, batch_sizes
from clip_export.encoder import Encoder
from clip_export.hostile import check
from clip_export.hostile_inputs import FIRST_FRAME, UNROTATED, hostile_images, hostile_texts
from clip_export.images import open_image
from clip_export.verification import CONTRACTS

TEXT = ("hostile inputs", "order", "batch composition", "threads", "against fp32", "too long", "not Unicode")
IMAGE = ("hostile inputs", "order", "batch composition", "threads", "against fp32", "EXIF rotation", "animation")
EVERY = {f"text: {name}" for name in TEXT} | {f"image: {name}" for name in IMAGE}
BOTH = ("text", "image")
TEXTS = dict(list(hostile_texts().items())[:24])  # enough for a fault to show, without those of 10,000 characters
IMAGES = {name: hostile_images()[name] for name in ("LA", "RGB", "I;16", "black", "7 x 5", *UNROTATED, *FIRST_FRAME)}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def sound(bundle: Bundle) -> Iterator[Encoder]:
    with clip_export.load(bundle) as encoder:
        yield encoder


def ask(encoder: Encoder, bundle: Bundle, reference: Encoder | None, **options: Any) -> dict[str, Check]:
    options = {"precision": "fp32", "required": CONTRACTS["fp32"], "texts": TEXTS, "images": IMAGES} | options
    return {found.name: found for found in check(encoder, bundle, reference=reference, **options)}


def failures(checks: dict[str, Check]) -> set[str]:
    return {name for name, found in checks.items() if not found.passed}


@pytest.mark.parametrize("name", ["tiny_bundle", "demo_bundle"])
def test_a_sound_encoder_passes_every_check(name: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(name))
    with clip_export.load(bundle) as encoder:
        checks = ask(encoder, bundle, encoder, texts=None, images=None)
    assert not {name: found.detail for name, found in checks.items() if not found.passed}
    assert checks.keys() == EVERY
    measured = checks["text: hostile inputs"].measured
    assert measured == {"inputs": len(hostile_texts()) + 2, "failed": 0}
    assert checks["image: hostile inputs"].measured["inputs"] == len(hostile_images())
    for tower in BOTH:
        against = checks[f"{tower}: against fp32"].measured
        assert 1 - 1e-6 <= against["min_cosine"] <= against["p1_cosine"] <= against["mean_cosine"] < 1 + 1e-6


FAULTS = {
    "shuffled": (planted.shuffled, ("order", "batch composition", "threads")),
    "leaking": (planted.leaking, ("batch composition", "threads")),
    "unsafe": (planted.unsafe, ("threads",)),
    "nan": (planted.nan_in_the_dark, ("hostile inputs",)),
    "nan in company": (planted.nan_in_company, ("order", "batch composition", "threads")),
    "wrong when full": (planted.wrong_when_full, ("batch composition",)),
    "inexact": (planted.inexact, ("against fp32",)),
    "small": (planted.small, ("order", "batch composition")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_fails_the_checks_that_it_concerns(fault: str, sound: Encoder, bundle: Bundle) -> None:
    run, names = FAULTS[fault]
    checks = ask(planted.planted(sound, run=run), bundle, sound)
    assert failures(checks) == {f"{tower}: {name}" for tower in BOTH for name in names}


def test_a_failed_check_names_the_input_and_says_what_was_expected(sound: Encoder, bundle: Bundle) -> None:
    def details(fault: planted.Fault) -> dict[str, str]:
        checks = ask(planted.planted(sound, run=fault), bundle, sound)
        return {name: found.detail for name, found in checks.items()}

    found = details(planted.shuffled)
    assert re.match(r"row 0 holds '.*' where 'empty' belongs; .*; and \d+ more$", found["text: order"])
    assert "has cosine" in found["image: batch composition"]
    assert "to itself alone, expected at least 0.999999" in found["image: batch composition"]
    assert "expected" in found["image: threads"] or "raised" in found["image: threads"]
    found = details(planted.nan_in_the_dark)
    assert "'empty' gives 64 values that are not finite" in found["text: hostile inputs"]
    assert found["image: hostile inputs"] == "'black' gives 64 values that are not finite"
    found = details(planted.small)
    assert found["image: order"] == f"raised BackendError: no kernel for {len(IMAGES)} rows"
    assert "expected at least 0.99999" in details(planted.inexact)["text: against fp32"]


def test_inputs_that_gave_nothing_are_left_out_of_what_is_asked_next(sound: Encoder, bundle: Bundle) -> None:
    checks = ask(planted.planted(sound, run=planted.nan_in_the_dark), bundle, sound)
    wrong = checks["text: hostile inputs"].measured
    assert checks["text: order"].measured["inputs"] == wrong["inputs"] - wrong["failed"] < wrong["inputs"]
    alone = ask(
        planted.planted(sound, run=planted.nan_in_the_dark), bundle, sound, images={"black": np.zeros((9, 9), np.uint8)}
    )
    assert {name for name in alone if name.startswith("image")} == {"image: hostile inputs"}


def test_padding_that_counts_shows_beside_a_longer_text(sound: Encoder, bundle: Bundle) -> None:
    checks = ask(planted.planted(sound, run=planted.padding_counts), bundle, sound, required=None)
    assert failures(checks) == {"text: batch composition", "text: threads"}


def test_an_order_that_happens_to_be_kept_one_way_fails_the_other_way(sound: Encoder, bundle: Bundle) -> None:
    rising = {f"{count} words": " ".join(["a", "cat", "and", "dogs"][:count]) for count in range(1, 5)}
    encoder = planted.planted(sound, kind=planted.Unsorted)
    checks = ask(encoder, bundle, None, texts=rising)
    assert "text: order" in failures(checks)
    assert checks["text: order"].measured["misplaced"] == len(rising) + 2  # none forwards; no row is its own mirror


def test_embeddings_of_another_length_than_1_fail(sound: Encoder, bundle: Bundle) -> None:
    checks = ask(planted.planted(sound, kind=planted.Unnormalized), bundle, None)
    assert failures(checks) == {f"{tower}: hostile inputs" for tower in BOTH}
    assert "expected 1" in checks["text: hostile inputs"].detail


def test_a_tokenizer_that_always_cuts_fails(sound: Encoder, bundle: Bundle) -> None:
    encoder = planted.planted(sound, tokenizer=planted.Forgiving(sound._tokenizer))
    checks = ask(encoder, bundle, sound)
    assert failures(checks) == {"text: too long", "text: not Unicode"}
    assert "truncate=False takes a text that does not fit, expected TextError" in checks["text: too long"].detail
    assert checks["text: not Unicode"].detail == "a lone surrogate is repaired, the huggingface dialect does otherwise"


def test_preprocessing_that_follows_exif_or_takes_another_frame_fails(sound: Encoder, bundle: Bundle) -> None:
    turned = ask(planted.planted(sound, preprocessor=planted.turning(sound._preprocessor)), bundle, None)
    assert failures(turned) == {"image: EXIF rotation"}
    assert UNROTATED[1] in turned["image: EXIF rotation"].detail
    last = ask(planted.planted(sound, preprocessor=planted.last_frame(sound._preprocessor)), bundle, None)
    assert failures(last) == {"image: animation"}
    assert last["image: animation"].measured["differing"] > 0


def test_cosines_to_fp32_are_reported_where_nothing_is_required(sound: Encoder, bundle: Bundle) -> None:
    checks = ask(planted.planted(sound, run=planted.inexact), bundle, sound, required=None)
    assert not failures(checks)
    measured = checks["image: against fp32"].measured
    assert measured["min_cosine"] < CONTRACTS["fp32"]
    assert "required" not in measured
    without = ask(sound, bundle, None, texts={"a": "a"}, images={})
    assert "text: against fp32" not in without


def test_a_bundle_without_embeddings_is_asked_for_what_it_gives(tmp_path: Path) -> None:
    checkpoints_made.make_huggingface(tmp_path / "text", kind="CLIPTextModel")
    bundle = clip_export.build(tmp_path / "text", tmp_path / "bundle")
    with clip_export.load(bundle) as encoder:
        checks = ask(encoder, bundle, encoder)
        assert not failures(checks)
        assert checks.keys() == {name for name in EVERY if name.startswith("text")}
        assert checks["text: hostile inputs"].detail == "each gives a finite pooled"
        assert "text: order" in failures(ask(planted.planted(encoder, run=planted.shuffled), bundle, encoder))


def test_pictures_that_open_clip_shrinks_to_nothing_are_left_out(tmp_path: Path) -> None:
    checkpoints_made.make_open_clip(tmp_path / "checkpoint", preprocess={"resize_mode": "longest"})
    bundle = clip_export.build(tmp_path / "checkpoint", tmp_path / "bundle")
    thin = [
        name
        for name, image in hostile_images().items()
        if max(open_image(image).size) >= 32 * min(open_image(image).size)
    ]
    with clip_export.load(bundle) as encoder:
        checks = ask(encoder, bundle, encoder, images=None)
    assert not failures(checks)
    assert checks["image: hostile inputs"].measured["inputs"] == len(hostile_images()) - len(thin)
    assert "400 x 4" in thin
    assert checks["text: too long"].detail.startswith("cut by default")
    assert checks["text: not Unicode"].detail == "a lone surrogate is repaired"


def test_batches_are_those_of_the_profiles_of_the_plan_that_runs(tmp_path: Path) -> None:
    bundles_made.fill(tmp_path)
    bundles_made.with_plans(tmp_path)
    bundle = Bundle.open(tmp_path)
    plans = Encoder(bundle.spec, engine="tensorrt-rtx 1.7.1.116, sm_89", batch_size=32)
    assert batch_sizes(plans, bundle, "text", "fp16") == (1, 4, 5, 8)
    assert batch_sizes(plans, bundle, "image", "fp16") == (1, 4, 8)
    assert batch_sizes(plans, bundle, "text", "fp32") == (2, 33)
    elsewhere = Encoder(bundle.spec, engine="simulation of fp16, cpu", batch_size=7)
    assert batch_sizes(elsewhere, bundle, "text", "fp16") == (2, 8)


def test_every_precision_has_a_tolerance_between_batches_of_a_tenth_of_its_contract() -> None:
    assert AGREEMENT.keys() == CONTRACTS.keys()
    for precision, least in AGREEMENT.items():
        assert 1 - least == pytest.approx((1 - CONTRACTS[precision]) / 10)


def test_hostile_inputs_are_the_same_each_time_and_hold_every_mode() -> None:
    assert hostile_texts() == hostile_texts()
    assert len(set(hostile_texts().values())) == len(hostile_texts())
    assert max(map(len, hostile_texts().values())) >= 10_000
    first, second = ({name: open_image(image) for name, image in hostile_images().items()} for _ in range(2))
    for name, image in first.items():
        assert image.tobytes() == second[name].tobytes(), name
    assert {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"} == {image.mode for image in first.values()}
    assert first[UNROTATED[0]].getexif()[0x0112] == 6
    assert first[FIRST_FRAME[0]].n_frames == 3  # type: ignore[attr-defined]
    assert {image.size for image in first.values()} >= {(1, 1), (1, 90), (90, 1), (400, 4)}
