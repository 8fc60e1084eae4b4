"""Precisions that have to pay: int8cpu from end to end, and what is refused for being no faster.

How fast is measured by the real clock in `compare_speed`, which has tests of its own; here its verdict is given, so
that no test depends on what else this machine does.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pictures import draw_held_out

import clip_export
from clip_export import paying
from clip_export.bundle import Bundle
from clip_export.errors import BackendError, ContractError, SpeedError
from clip_export.precision_map import HIGH, read_map
from clip_export.quantization import Quantization
from clip_export.speed import Ratio

FAST = Quantization(method="minmax")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw_held_out(folder, 24, seed="tests/test_paying.py")
    return folder


@pytest.fixture
def bundle(image_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's image tower that a test may extend."""
    return Path(shutil.copytree(image_bundle, tmp_path / "bundle"))


Call = Callable[[], object]


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], list[tuple[Any, Any]]]:
    """Say by batch size how many times as fast it is; what both gave for each batch is in the list."""

    def give(ratios: dict[int, float]) -> list[tuple[Any, Any]]:
        said, seen = iter(ratios.values()), []

        def compared(first: Call, second: Call) -> Ratio:
            seen.append((first(), second()))
            ratio = next(said)
            times = {"first": ratio, "second": 1.0, "first_spread": 0.0, "second_spread": 0.0}
            return Ratio(**times, ratio=ratio, low=ratio, high=ratio, rounds=6)

        monkeypatch.setattr(paying, "compare_speed", compared)
        return seen

    return give


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_int8cpu_is_published_where_it_is_faster(
    bundle: Path, pictures: Path, verdict: Callable[[dict[int, float]], list[Any]]
) -> None:
    seen = verdict({1: 1.5, 8: 2.0})
    clip_export.extend(bundle, precision="int8cpu", calibration=[pictures], quantization=FAST)
    assert [len(old["embedding"]) for old, _ in seen] == [1, 8]
    for old, new in seen:  # it is the two precisions that were timed, on the same inputs
        assert not np.array_equal(old["embedding"], new["embedding"])
        assert np.corrcoef(old["embedding"].ravel(), new["embedding"].ravel())[0, 1] > 0.99
    report = json.loads((bundle / "report.json").read_text())["precisions"]["int8cpu"]
    assert {batch: row["ratio"] for batch, row in report["speed"]["image"].items()} == {"1": 1.5, "8": 2.0}
    found = clip_export.verify(bundle, precision="int8cpu", hostile=False)
    assert found.passed
    assert [row.required_cosine for row in found.rows] == [0.99]


def test_its_graph_holds_8_bit_weights_and_multiplies_them_as_such(
    bundle: Path, pictures: Path, verdict: Callable[[dict[int, float]], list[Any]]
) -> None:
    verdict({1: 1.5, 8: 2.0})
    clip_export.extend(bundle, precision="int8cpu", calibration=[pictures], quantization=FAST)
    layers = read_map(bundle / "int8cpu.map.json").towers["image"]
    assert HIGH not in layers.values()
    model = onnx.load(bundle / "image.int8cpu.onnx")
    held = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(held) == len(layers)
    picture = sorted(pictures.iterdir())[0]
    with clip_export.load(bundle) as exact, clip_export.load(bundle, precision="int8cpu") as quick:
        cosine = float((exact.encode_image([picture]) * quick.encode_image([picture])).sum())
    assert 0.99 <= cosine < 1


def test_int8cpu_that_is_no_faster_is_refused_with_the_figures(
    bundle: Path, pictures: Path, verdict: Callable[[dict[int, float]], list[Any]]
) -> None:
    verdict({1: 1.5, 8: 0.98})
    before = contents(bundle)
    with pytest.raises(SpeedError, match=r"int8cpu image tower on .*batch 8: .* 0\.98 times as fast") as caught:
        clip_export.extend(bundle, precision="int8cpu", calibration=[pictures], quantization=FAST)
    assert "--allow-slower" in str(caught.value.hint)
    assert contents(bundle) == before


def test_it_can_be_had_all_the_same(
    bundle: Path, pictures: Path, verdict: Callable[[dict[int, float]], list[Any]]
) -> None:
    seen = verdict({})
    options = Quantization(method="minmax", allow_slower=True)
    clip_export.extend(bundle, precision="int8cpu", calibration=[pictures], quantization=options)
    assert seen == []
    assert "int8cpu" in Bundle.open(bundle).manifest.variants
    with pytest.raises(BackendError, match="graphs are for CPUs"):
        clip_export.load(bundle, precision="int8cpu", backend="onnxruntime", device="cuda:0")


@pytest.mark.gpu
def test_plans_of_8_bits_are_faster_than_fp16_or_refused(bundle: Path, pictures: Path) -> None:
    """On the GPU here, by the real clock: whichever it is, it is said with figures, and fp16 plans are there beside."""
    before = contents(bundle)
    options = {"precision": "int8", "engine": "tensorrt-rtx", "calibration": [pictures], "quantization": FAST}
    try:
        clip_export.extend(bundle, **options)  # type: ignore[arg-type]
    except SpeedError as error:
        assert "times as fast" in str(error)
        assert contents(bundle) == before
    else:
        precisions = {plan.precision for plan in Bundle.open(bundle).manifest.plans}
        assert precisions == {"int8", "fp16"}
        report = json.loads((bundle / "report.json").read_text())["precisions"]["int8"]
        assert all(row["low"] > 1 for gpu in report["speed"].values() for row in gpu["image"].values())


def test_int8cpu_that_misses_its_contract_names_the_layers_that_are_furthest_off(bundle: Path, pictures: Path) -> None:
    options = Quantization(method="minmax", min_cosine=0.999999)
    with pytest.raises(ContractError, match="int8cpu misses its contract") as caught:
        clip_export.extend(bundle, precision="int8cpu", calibration=[pictures], quantization=options)
    errors = [float(error) for error in re.findall(r"image blocks\.\S+ \(error (\S+)\)", str(caught.value))]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert "--precision auto" not in str(caught.value.hint)
