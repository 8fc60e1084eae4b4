"""Precisions that have to pay: int8cpu from end to end, and what is refused for being no faster.

How fast is measured by the real clock in `compare_speed`, which has tests of its own; here its verdict is given, so
that no test depends on what else this machine does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pictures import draw_held_out

import clip_export
from clip_export import extension, paying
from clip_export.bundle import Bundle
from clip_export.choice import Choice
from clip_export.compilation import PlanOptions
from clip_export.errors import BackendError, ContractError, SpeedError
from clip_export.extension import find_targets
from clip_export.precision_map import HIGH, read_map
from clip_export.quantization import Quantization
from clip_export.speed import Ratio
from clip_export.verification import replay

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


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[SpeedError | None], list[tuple[Any, ...]]]:
    """Say that the GPU here is an sm_89 that runs every plan as its graph says; what is timed there is in the list.

    Plans are compiled for real; whether they pay is given: an error, or that they do.
    """

    def give(verdict: SpeedError | None) -> list[tuple[Any, ...]]:
        timed: list[tuple[Any, ...]] = []
        (known,) = find_targets("tensorrt-rtx", ["sm_89"], "int8", PlanOptions())
        monkeypatch.setattr(
            extension, "find_targets", lambda *_, **__: [dataclasses.replace(known, gpu="a GPU of this test")]
        )
        monkeypatch.setattr(extension, "replay_choice", lambda bundle, choice, **_: replay(bundle, precision="fp32"))

        def paid(bundle: Bundle, candidate: Choice, baseline: Choice, batches: Sequence[int]) -> dict[str, Any]:
            plans = candidate.plans["image"], baseline.plans["image"]
            assert all((bundle.path / plan.file).stat().st_size > 10_000 for plan in plans)
            assert plans[0].profiles == plans[1].profiles
            timed.append((*(plan.precision for plan in plans), list(batches)))
            if verdict is not None:
                raise verdict
            return {"image": {str(batch): {"ratio": 1.5} for batch in batches}}

        monkeypatch.setattr(extension, "require_paid", paid)
        return timed

    return give


def _with_plans(bundle: Path, pictures: Path, **asked: Any) -> Bundle:
    return clip_export.extend(
        bundle,
        precision="int8",
        engine="tensorrt-rtx",
        options=PlanOptions(batches=(1, 4)),
        calibration=[pictures],
        quantization=dataclasses.replace(FAST, **asked),
    )


def test_plans_are_timed_beside_fp16_at_the_batches_of_their_profiles(
    bundle: Path, pictures: Path, gpu_here: Callable[[SpeedError | None], list[tuple[Any, ...]]]
) -> None:
    timed = gpu_here(None)
    made = _with_plans(bundle, pictures)
    assert timed == [("int8", "fp16", [1, 4])]
    assert {plan.precision for plan in made.manifest.plans} == {"int8", "fp16"}  # those of fp16 stay
    assert list(made.report()["precisions"]["int8"]["speed"]["sm_89"]["image"]) == ["1", "4"]


def test_plans_that_are_no_faster_than_fp16_are_not_published(
    bundle: Path, pictures: Path, gpu_here: Callable[[SpeedError | None], list[tuple[Any, ...]]]
) -> None:
    timed, before = gpu_here(SpeedError("0.9 times as fast", hint="none")), contents(bundle)
    with pytest.raises(SpeedError, match="times as fast"):
        _with_plans(bundle, pictures)
    assert len(timed) == 1
    assert contents(bundle) == before
    made = _with_plans(bundle, pictures, allow_slower=True)
    assert len(timed) == 1
    assert {plan.precision for plan in made.manifest.plans} == {"int8"}


def test_int8cpu_that_misses_its_contract_names_the_layers_that_are_furthest_off(bundle: Path, pictures: Path) -> None:
    options = Quantization(method="minmax", min_cosine=0.999999)
    with pytest.raises(ContractError, match="int8cpu misses its contract") as caught:
        clip_export.extend(bundle, precision="int8cpu", calibration=[pictures], quantization=options)
    errors = [float(error) for error in re.findall(r"image blocks\.\S+ \(error (\S+)\)", str(caught.value))]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert "--precision auto" not in str(caught.value.hint)
