"""Bundles against their checkpoints and against the original libraries, stage by stage, and what a difference says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints_made
import numpy as np
import oracles
import planted
import pytest
from safetensors.torch import load_file, save_file

import clip_export
from clip_export.against import Comparison, compare, open_reference, run_reference
from clip_export.bundle import Bundle
from clip_export.encoder import Encoder
from clip_export.errors import CheckpointError, InputError, MissingDependencyError, UnknownCheckpointError
from clip_export.hostile_inputs import hostile_images, hostile_texts
from clip_export.tokenizer import Tokenizer, clip_tokenizer_json
from clip_export.verification import CONTRACTS

TEXTS = {"plain": "a photo of a cat", "special": "a cat <|endoftext|> a dog", "empty": ""}
IMAGES = {name: hostile_images()[name] for name in ("RGB", "RGBA", "7 x 5")}


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    """The originals, which here stand beside a torchvision that is of another torch."""
    oracles.transformers()
    oracles.open_clip()


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def sound(bundle: Bundle) -> Iterator[Encoder]:
    with clip_export.load(bundle) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def open_clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open_clip") / "made"
    checkpoints_made.make_open_clip(path)
    return path


@pytest.fixture(scope="module")
def open_clip_bundle(open_clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clip_export.build(open_clip_checkpoint, tmp_path_factory.mktemp("bundles") / "open_clip")


@pytest.fixture(scope="module")
def architecture(open_clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name under which open_clip knows the architecture of `open_clip_checkpoint`."""
    config = json.loads((open_clip_checkpoint / "open_clip_config.json").read_bytes())["model_cfg"]
    path = tmp_path_factory.mktemp("configs") / "ViT-tiny-made.json"
    path.write_text(json.dumps(config))
    oracles.open_clip().add_model_config(path)
    return path.stem


def compared(encoder: Encoder, bundle: Bundle, against: str, **options: Any) -> Comparison:
    inputs = {"texts": TEXTS, "images": IMAGES} | options
    expected = run_reference(open_reference(against, bundle), bundle, **inputs)
    return compare(encoder, expected, precision="fp32", required=CONTRACTS["fp32"])


def default_counts(bundle: Bundle) -> tuple[int, int]:
    """How many texts and images a bundle of both towers is compared on."""
    golden = bundle.golden()
    assert golden.text is not None
    assert golden.image is not None
    return len(golden.text.texts) + len(hostile_texts()), len(golden.image.files) + len(hostile_images())


def require_equal(found: Comparison, texts: int, images: int) -> None:
    assert [(stage.name, stage.inputs, stage.differing, stage.first) for stage in found.stages] == [
        ("ids", texts, 0, None),
        ("pixels", images, 0, None),
    ]
    assert [row.tower for row in found.rows] == ["text", "image"]
    for row in found.rows:
        assert row.samples == (texts if row.tower == "text" else images)
        assert CONTRACTS["fp32"] <= row.min_cosine <= row.p1_cosine <= row.mean_cosine < 1 + 1e-6
        assert row.max_abs < 1e-5
    assert found.passed
    assert not found.notes


@pytest.mark.parametrize("against", ["{}", "transformers:{}"])
def test_equals_its_checkpoint_and_transformers(
    against: str, sound: Encoder, bundle: Bundle, tiny_checkpoint: Path
) -> None:
    found = compared(sound, bundle, against.format(tiny_checkpoint), texts=None, images=None)
    require_equal(found, *default_counts(bundle))
    assert found.reference == ("transformers" if ":" in against else "tiny")
    assert re.match(r"5\.\d+" if ":" in against else r"torch 2\.\d+", found.version)


@pytest.mark.parametrize("against", ["{directory}", "open_clip:{directory}", "open_clip:{architecture}@{weights}"])
def test_equals_its_checkpoint_and_open_clip(
    against: str, open_clip_checkpoint: Path, open_clip_bundle: Bundle, architecture: str
) -> None:
    weights = open_clip_checkpoint / "open_clip_model.safetensors"
    name = against.format(directory=open_clip_checkpoint, architecture=architecture, weights=weights)
    with clip_export.load(open_clip_bundle) as encoder:
        found = compared(encoder, open_clip_bundle, name, texts=None, images=None)
    require_equal(found, *default_counts(open_clip_bundle))


def test_the_demo_equals_its_checkpoint(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    with clip_export.load(bundle) as encoder:
        assert compared(encoder, bundle, "demo").passed


def test_another_tokenizer_is_found_at_the_first_id_that_differs(
    open_clip_bundle: Bundle, open_clip_checkpoint: Path
) -> None:
    assert open_clip_bundle.spec.tokenizer is not None
    spec = dataclasses.replace(open_clip_bundle.spec.tokenizer, dialect="openai")
    with clip_export.load(open_clip_bundle) as encoder:
        wrong = planted.planted(encoder, tokenizer=Tokenizer(spec, clip_tokenizer_json("openai")))
        found = compared(wrong, open_clip_bundle, f"open_clip:{open_clip_checkpoint}")
        expected = encoder.tokenize([TEXTS["special"]])[0]
    assert not found.passed
    ids, pixels = found.stages
    assert pixels.passed
    assert (ids.inputs, ids.differing) == (3, 1)
    assert ids.first is not None
    # start, a, cat, and then the end token where open_clip reads punctuation
    assert (ids.first.input, ids.first.position, ids.first.found) == ("special", (3,), 49407)
    assert ids.first.expected == expected[3] != 49407
    text, image = found.rows
    assert not text.passed
    assert text.furthest == "special"
    assert image.passed


@pytest.mark.parametrize("against", ["{}", "transformers:{}"])
def test_swapped_channels_are_found_in_the_pixels(
    against: str, sound: Encoder, bundle: Bundle, tiny_checkpoint: Path
) -> None:
    wrong = planted.planted(sound, preprocessor=planted.swapped(sound._preprocessor))
    found = compared(wrong, bundle, against.format(tiny_checkpoint))
    ids, pixels = found.stages
    assert ids.passed
    assert (pixels.inputs, pixels.differing) == (3, 3)
    assert pixels.first is not None
    right = sound.preprocess([IMAGES["RGB"]])[0]
    channel, row, column = pixels.first.position
    assert (pixels.first.input, channel) == ("RGB", 0)
    assert (pixels.first.found, pixels.first.expected) == (right[2, row, column], right[0, row, column])
    assert [row.passed for row in found.rows] == [True, False]


def test_an_engine_that_is_off_fails_with_equal_ids_and_pixels(
    sound: Encoder, bundle: Bundle, tiny_checkpoint: Path
) -> None:
    found = compared(planted.planted(sound, run=planted.inexact), bundle, str(tiny_checkpoint))
    assert all(stage.passed for stage in found.stages)
    assert not any(row.passed for row in found.rows)
    for row in found.rows:
        assert row.min_cosine <= row.p1_cosine <= row.mean_cosine < CONTRACTS["fp32"]
        assert row.furthest in (TEXTS if row.tower == "text" else IMAGES)
    nan = compared(planted.planted(sound, run=planted.nan_in_the_dark), bundle, str(tiny_checkpoint))
    assert [row.passed for row in nan.rows] == [False, True]
    assert nan.rows[0].furthest == "empty"


def test_the_same_architecture_with_other_weights_is_another_checkpoint(
    sound: Encoder, bundle: Bundle, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    checkpoints_made.make_huggingface(other, seed=10)  # has the same logit scale
    with pytest.raises(CheckpointError, match=r"is not the checkpoint that tiny was built from: model\.safetensors"):
        open_reference(str(other), bundle)
    found = compared(sound, bundle, f"transformers:{other}")
    assert all(stage.passed for stage in found.stages)
    assert not any(row.passed for row in found.rows)


def test_the_same_weights_in_another_file_are_compared_and_that_is_said(
    sound: Encoder, bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", metadata={"format": "pt", "a": "b"})
    found = compared(sound, bundle, str(copy))
    assert found.passed
    assert found.notes == ("not the files that the bundle was built from: model.safetensors",)


def test_one_corrupted_weight_fails(sound: Encoder, bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    found = compared(sound, bundle, f"transformers:{copy}")
    assert [row.passed for row in found.rows] == [True, False]


def test_another_model_is_refused_with_the_fields_that_differ(
    bundle: Bundle, open_clip_bundle: Bundle, tmp_path: Path, architecture: str
) -> None:
    deeper = tmp_path / "deeper"
    checkpoints_made.make_huggingface(deeper, layers=3, activation="gelu", image_size=48)
    for name in (str(deeper), f"transformers:{deeper}"):
        with pytest.raises(CheckpointError) as raised:
            open_reference(name, bundle)
        message = raised.value.message
        assert "is not the model of bundle tiny" in message
        assert "text.transformer.layers 3 instead of 2" in message
        assert "image.image_size 48 instead of 32" in message
        assert "text.transformer.activation 'gelu' instead of 'quick_gelu'" in message
        assert raised.value.hint == "the bundle was built from tiny (huggingface)"
    with pytest.raises(CheckpointError, match=r"text\.vocab_size 49408 instead of 600"):
        checkpoints_made.make_open_clip(tmp_path / "open_clip")
        open_reference(f"open_clip:{tmp_path / 'open_clip'}", bundle)
    checkpoints_made.make_open_clip(tmp_path / "scaled", seed=3)  # only what it is scaled by differs in the spec
    with pytest.raises(CheckpointError, match=r"logit_scale 2\.[78]\d* instead of 2\.5"):
        open_reference(f"open_clip:{tmp_path / 'scaled'}", open_clip_bundle)


def test_a_bundle_of_one_tower_is_compared_with_that_tower(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = clip_export.build(tiny_checkpoint, tmp_path / "text", towers=["text"])
    with clip_export.load(bundle) as encoder:
        for name in (str(tiny_checkpoint), f"transformers:{tiny_checkpoint}"):
            found = compared(encoder, bundle, name)
            assert found.passed
            assert [stage.name for stage in found.stages] == ["ids"]
            assert [row.tower for row in found.rows] == ["text"]


def test_a_bundle_without_embeddings_says_what_was_compared(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = clip_export.build(tiny_checkpoint, tmp_path / "pooled", towers=["text"], outputs=["pooled"])
    with clip_export.load(bundle) as encoder:
        found = compared(encoder, bundle, str(tiny_checkpoint))
    assert found.passed
    assert found.rows == ()
    expected = run_reference(open_reference(str(tiny_checkpoint), bundle), bundle)
    assert expected.lacking == (
        f"the text graph gives no embeddings, so only its ids were compared with {expected.reference}",
    )


def test_what_was_stated_at_the_build_is_stated_again(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    checkpoints_made.make_open_clip(path)
    bundle = clip_export.build(path, tmp_path / "bundle", tokenizer_dialect="openai", activation="quick_gelu")
    with clip_export.load(bundle) as encoder:
        assert compared(encoder, bundle, str(path)).passed
    with pytest.raises(CheckpointError, match=r"text\.transformer\.activation 'gelu' instead of 'quick_gelu'"):
        open_reference(f"open_clip:{path}", bundle)


def test_json(sound: Encoder, bundle: Bundle, tiny_checkpoint: Path) -> None:
    wrong = planted.planted(sound, preprocessor=planted.swapped(sound._preprocessor))
    found = json.loads(json.dumps(compared(wrong, bundle, str(tiny_checkpoint)).to_dict()))
    assert found.keys() == {"reference", "version", "notes", "stages", "rows", "passed"}
    assert found["passed"] is False
    assert found["stages"][1]["first"].keys() == {"input", "position", "found", "expected"}
    assert found["rows"][0].keys() >= {"tower", "min_cosine", "p1_cosine", "mean_cosine", "max_abs", "required_cosine"}


def test_references_that_cannot_be_opened(bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownCheckpointError, match="nowhere"):
        open_reference("./nowhere", bundle)
    with pytest.raises(CheckpointError, match=r"transformers:nowhere is no directory"):
        open_reference("transformers:nowhere", bundle)
    with pytest.raises(InputError, match="'transformers:' names no model"):
        open_reference("transformers:", bundle)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"transformers:{tmp_path} cannot be opened"):
        open_reference(f"transformers:{tmp_path}", bundle)
    with pytest.raises(CheckpointError, match=r"open_clip:no-such-model cannot be opened: .*no-such-model"):
        open_reference("open_clip:no-such-model", bundle)
    checkpoints_made.make_huggingface(tmp_path / "text", kind="CLIPTextModel")
    with pytest.raises(CheckpointError, match="is a clip_text_model, expected a clip with both towers"):
        open_reference(f"transformers:{tmp_path / 'text'}", bundle)
    half = Path(shutil.copytree(tiny_checkpoint, tmp_path / "half"))
    weights = load_file(half / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if "vision" not in name},
        half / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="has no weights for vision_model"):
        open_reference(f"transformers:{half}", bundle)


def test_open_clip_without_weights_is_not_compared_with(architecture: str, open_clip_bundle: Bundle) -> None:
    """By itself open_clip goes on with random weights."""
    with pytest.raises(CheckpointError, match=f"open_clip:{architecture} cannot be opened: .*could not be loaded"):
        open_reference(f"open_clip:{architecture}", open_clip_bundle)


@pytest.mark.parametrize(
    ("module", "install"), [("transformers", "pip install transformers"), ("open_clip", "pip install open-clip-torch")]
)
def test_a_library_that_is_not_installed_is_named(
    module: str, install: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    with pytest.raises(MissingDependencyError, match=f"comparing with {module} needs") as raised:
        open_reference(f"{module}:anything", bundle)
    assert raised.value.hint == install


def test_a_library_that_cannot_be_imported_says_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("clip_export.originals.importlib.import_module", fail)
    with pytest.raises(MissingDependencyError, match="open_clip is installed but cannot be imported: operator"):
        open_reference("open_clip:anything", bundle)


def test_ids_and_pixels_of_another_shape_are_refused(sound: Encoder, bundle: Bundle, tiny_checkpoint: Path) -> None:
    reference = open_reference(str(tiny_checkpoint), bundle)
    ids = reference.ids
    reference.ids = lambda texts: ids(texts)[:, :-1]  # type: ignore[method-assign]
    with pytest.raises(
        CheckpointError, match=r"expected ids \[3, 77\] as the bundle gives, the reference gives \[3, 76\]"
    ):
        compare(sound, run_reference(reference, bundle, texts=TEXTS, images=IMAGES), precision="fp32", required=0.9)


def test_nothing_of_the_originals_is_imported_with_the_package() -> None:
    import subprocess
    import sys

    program = "import sys, clip_export.against; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "open_clip", "torchvision", "onnx"} & set(loaded)
    assert np.__name__ in loaded
