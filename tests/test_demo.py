"""The demo checkpoint keeps what it promises, through the engines of its bundle, on scenes that it never saw."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from demo_pictures import calibration_scenes, write_calibration
from scenes import COLOURS, SHAPES, Scene, all_scenes, caption, class_prompts, is_held_out, render

import clip_export
from clip_export.bundle import Bundle
from clip_export.encoder import Encoder
from clip_export.pairs import find_pairs
from clip_export.retrieval import recall_at

DEMO = Path(clip_export.__file__).parent / "demo"
GROUP, GROUPS = 64, 6
CLASSES = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def clip(demo_bundle: Path) -> Iterator[Encoder]:
    with clip_export.load(demo_bundle) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def held_out() -> tuple[list[Scene], list[str]]:
    """Scenes that training never saw, each group of 64 without repeats, and a caption of each."""
    rng = random.Random("tests/test_demo.py")
    pool = [scene for scene in all_scenes() if is_held_out(scene)]
    scenes = [scene for _ in range(GROUPS) for scene in rng.sample(pool, GROUP)]
    return scenes, [caption(scene, rng) for scene in scenes]


@pytest.fixture(scope="module")
def images(clip: Encoder, held_out: tuple[list[Scene], list[str]]) -> np.ndarray:
    return clip.encode_image([render(scene, seed=5_000_000 + i) for i, scene in enumerate(held_out[0])])


def test_it_is_clip_in_small(demo_bundle: Path) -> None:
    files = [path for path in DEMO.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    spec = Bundle.open(demo_bundle).spec
    assert spec.text is not None
    assert spec.image is not None
    assert (spec.text.vocab_size, spec.text.context_length, spec.text.causal) == (49408, 77, True)
    for transformer in (spec.text.transformer, spec.image.transformer):
        assert transformer.width // transformer.heads == 64
        assert transformer.layers >= 4
        assert transformer.activation == "quick_gelu"


def test_its_training_is_on_record() -> None:
    record = json.loads((DEMO / "training.json").read_text())
    assert record["command"].startswith("python examples/train_demo.py --seed")
    assert len(record["curve"]) >= 10
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"] / 3
    for name, least in (("image_to_text_r1", 80), ("text_to_image_r1", 80), ("zero_shot", 90)):
        assert record["held_out"][name] >= least


def test_recall_at_1_among_64(clip: Encoder, held_out: tuple[list[Scene], list[str]], images: np.ndarray) -> None:
    texts = clip.encode_text(held_out[1])
    cosine = np.stack(
        [images[start : start + GROUP] @ texts[start : start + GROUP].T for start in range(0, len(images), GROUP)]
    )
    pairs = np.arange(GROUP)
    assert (cosine.argmax(axis=2) == pairs).mean() >= 0.8
    assert (cosine.argmax(axis=1) == pairs).mean() >= 0.8


def test_zero_shot_shape_and_colour(clip: Encoder, held_out: tuple[list[Scene], list[str]], images: np.ndarray) -> None:
    prompts = [class_prompts(colour, shape) for colour, shape in CLASSES]
    flat = clip.encode_text([prompt for prompts_of_one in prompts for prompt in prompts_of_one])
    classes = flat.reshape(len(prompts), -1, flat.shape[1]).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    guesses = (images @ classes.T).argmax(axis=1)
    right = [CLASSES[guess] == (scene.colour, scene.shape) for guess, scene in zip(guesses, held_out[0], strict=True)]
    assert np.mean(right) >= 0.9


def test_a_wrong_text_would_be_noticed(
    clip: Encoder, held_out: tuple[list[Scene], list[str]], images: np.ndarray
) -> None:
    """The recall above hangs on the captions: those of other scenes find nothing."""
    texts = clip.encode_text(held_out[1][GROUP : 2 * GROUP])
    assert ((images[:GROUP] @ texts.T).argmax(axis=1) == np.arange(GROUP)).mean() < 0.2


def test_training_and_held_out_scenes_share_no_description() -> None:
    scenes = all_scenes()
    assert len(set(scenes)) == len(scenes)
    held_out = sum(map(is_held_out, scenes))
    assert 0.08 < held_out / len(scenes) < 0.12


def test_a_calibration_set_is_held_out_pairs_that_the_checkpoint_matches(clip: Encoder, tmp_path: Path) -> None:
    write_calibration(tmp_path, 64, seed=0)
    scenes = calibration_scenes(64, seed=0)
    assert all(map(is_held_out, scenes))
    assert len(set(scenes)) == 64
    pairs = find_pairs(tmp_path)
    assert pairs is not None and len(pairs.files) == 64
    assert {file.name for file in pairs.files} | {"captions.jsonl"} == {path.name for path in tmp_path.iterdir()}
    for text, scene in zip(pairs.captions, scenes, strict=True):
        assert scene.colour in text and scene.shape in text and scene.background in text
    found = recall_at(clip.encode_image(pairs.files), clip.encode_text(pairs.captions))
    assert min(found.image_to_text, found.text_to_image) >= 0.8


def test_a_calibration_set_hangs_on_its_seed_alone(tmp_path: Path) -> None:
    def digest(directory: Path) -> str:
        files = sorted(directory.iterdir())
        return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()

    script = Path(__file__).parents[1] / "examples" / "demo_pictures.py"
    command = [sys.executable, str(script), "--calibration", "5", "--out", str(tmp_path / "command")]
    subprocess.run(command, check=True)
    for name, seed in (("same", 0), ("other", 1)):
        write_calibration(tmp_path / name, 5, seed)
    assert digest(tmp_path / "command") == digest(tmp_path / "same") != digest(tmp_path / "other")
    without = subprocess.run(command[:4], check=False, capture_output=True, text=True)
    assert without.returncode == 2 and "--calibration needs --out" in without.stderr


def test_a_calibration_set_larger_than_what_is_held_out() -> None:
    with pytest.raises(ValueError, match="100000 scenes, expected 1 to"):
        calibration_scenes(100_000, seed=0)
