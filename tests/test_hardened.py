"""The contract on a checkpoint that 8 bits break: residual channels far from zero, norms and values times up to 100.

It computes what the demo computes. Calibrated and judged on scenes that the demo never saw, distinct in what it can
tell apart: among random ones captions differ by less than rounding, and R@1 measures ties.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import residual
import torch
from hardened import harden
from pictures import PHOTOGRAPHS
from scenes import all_scenes, caption, is_held_out, render

import clip_export
from clip_export import quantized_tower
from clip_export.cosine import cosines
from clip_export.errors import ContractError
from clip_export.quantization import Quantization

PAIRS = 256
DEMO = Path(clip_export.__file__).parent / "demo"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random("tests/test_hardened.py")
    scenes = [scene for scene in all_scenes() if is_held_out(scene)]
    rng.shuffle(scenes)
    distinct = {(scene.count, scene.colour, scene.shape, scene.background): scene for scene in scenes}
    lines = []
    for number, scene in enumerate(list(distinct.values())[:PAIRS]):
        render(scene, number, 64, oversample=2).save(folder / f"{number:03}.png")
        lines.append(json.dumps({"file": f"{number:03}.png", "caption": caption(scene, rng)}) + "\n")
    assert len(lines) == PAIRS
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hardened_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hardened")
    return clip_export.build(harden(DEMO, place / "checkpoint", "outliers"), place / "bundle").path


def test_hardening_leaves_the_function_alone(hardened_bundle: Path, demo_bundle: Path) -> None:
    texts, photographs = ["a red circle", "two blue squares"], list(PHOTOGRAPHS.values())
    with clip_export.load(hardened_bundle) as hard, clip_export.load(demo_bundle) as plain:
        for found, expected in (
            (hard.encode_text(texts), plain.encode_text(texts)),
            (hard.encode_image(photographs), plain.encode_image(photographs)),
        ):
            assert cosines(found, expected).min() > 0.9999999
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_residual_channel_is_far_from_zero_for_every_input(tmp_path: Path) -> None:
    """The text tower's, by transformers; before, what all inputs share is spread over all channels."""
    hard = harden(DEMO, tmp_path / "checkpoint", "outliers")
    for source, far in ((DEMO, False), (hard, True)):
        for rows in residual.streams(source, residual.TEXT)[1:]:
            centred = rows - rows.mean(dim=1, keepdim=True)
            sizes = centred.mean(dim=0).abs()
            largest = int(sizes.argmax())
            assert (float(sizes[largest] / sizes.median()) > 20) == far
            if far:
                assert float(sizes[largest] / centred[:, largest].std()) > 2


def test_a_constant_on_one_channel_is_no_such_hardening() -> None:
    """Why it is done by reflection: LayerNormalization lets the whole be shifted, and nothing less."""
    rows = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows *= torch.linspace(0.5, 2, 64)[:, None]
    exact = torch.nn.functional.layer_norm(rows, [32], eps=0)
    everywhere = torch.nn.functional.layer_norm(rows + 8, [32], eps=0)
    torch.testing.assert_close(everywhere, exact)
    one = torch.zeros(32, dtype=torch.float64)
    one[3] = 8
    found = torch.nn.functional.layer_norm(rows + one, [32], eps=0)
    # The best gain and bias for each channel, by least squares, still leave an error.
    slope = ((found - found.mean(0)) * (exact - exact.mean(0))).mean(0) / found.var(0, unbiased=False)
    undone = slope * (found - found.mean(0)) + exact.mean(0)
    assert float((undone - exact).std() / exact.std()) > 0.1


def test_a_search_keeps_the_contract_with_nine_tenths_in_int8(
    hardened_bundle: Path, pairs: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(hardened_bundle, tmp_path / "bundle"))
    options = Quantization(min_cosine=0.99, max_recall_drop=0.5)
    clip_export.extend(bundle, precision="auto", calibration=[pairs], quantization=options)
    report = json.loads((bundle / "report.json").read_text())["precisions"]["auto"]
    assert report["missed"] == []
    assert {tower: made["score"]["cosine"] >= 0.99 for tower, made in report["towers"].items()} == {
        "image": True,
        "text": True,
    }
    assert report["pairs"]["count"] == PAIRS // 4
    assert report["pairs"]["recall_at_1"]["fp32"]["image_to_text"] > 0.8  # or there would be nothing to lose
    assert report["pairs"]["recall_drop"] <= 0.5
    flops = {
        tower: sum(layer["flops"] for layer in made["layers"].values()) for tower, made in report["towers"].items()
    }
    quantized = {tower: flops[tower] * made["share"] for tower, made in report["towers"].items()}
    assert sum(quantized.values()) >= 0.9 * sum(flops.values())


def test_without_smoothing_it_is_refused(
    hardened_bundle: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_tower, "foldable", lambda *_: frozenset())
    bundle = Path(shutil.copytree(hardened_bundle, tmp_path / "bundle"))
    with pytest.raises(ContractError, match="int8 misses its contract"):
        clip_export.extend(bundle, precision="int8", calibration=[pairs], quantization=Quantization(method="minmax"))
