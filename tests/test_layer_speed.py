"""What a search goes by where a GPU is at hand: the seconds that a layer saves, and not its FLOPs.

The clock of a GPU is not here; what it would say is given, so that what follows from it can be seen.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import draw_held_out

import clip_export
from clip_export import backends, extension
from clip_export.backends import tensorrt_rtx
from clip_export.backends.building import BuildReport, BuildRequest, Target
from clip_export.errors import ContractError
from clip_export.layer_speed import (
    PAIRS,
    LayerShape,
    LayerTime,
    LayerTimes,
    build_chain,
    layer_time,
    layer_times,
    time_layer,
    write_chains,
)
from clip_export.progress import Progress
from clip_export.quantization import Quantization
from clip_export.speed import summarize

SHAPE = LayerShape(rows=96, inputs=64, outputs=256, format="int8")
FAST = Quantization(method="minmax")
HERE = Target(backend="tensorrt-rtx", version="1.7", compute_capability="sm_89", gpu="a GPU of this test")


def faster(shape: LayerShape) -> LayerTime:
    return LayerTime(half=2e-6, quantized=1e-6, pays=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw_held_out(folder, 24, seed="tests/test_layer_speed.py")
    return folder


Build = Callable[[Callable[[LayerShape], LayerTime]], dict[str, Any]]


@pytest.fixture
def build(image_bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """The report of an `auto` image tower, where a GPU says of each layer what it is told to."""
    bundle = Path(shutil.copytree(image_bundle, tmp_path / "bundle"))

    def made(measure: Callable[[LayerShape], LayerTime]) -> dict[str, Any]:
        def times(target: Target, *, batch: int, cache: Path, work: Path) -> LayerTimes:
            return LayerTimes(cache / "layers.json", measure, batch=batch, where=str(target.gpu))

        monkeypatch.setattr(extension, "layer_times", times)
        monkeypatch.setattr(extension, "find_targets", lambda *_, **__: [HERE])
        monkeypatch.setattr(extension._Staged, "add_plans", lambda *_, **__: None)  # the GPU that would try them
        extended = clip_export.extend(
            bundle, precision="auto", engine="tensorrt-rtx", calibration=[pictures], quantization=FAST, force=True
        )
        found: dict[str, Any] = extended.report()["precisions"]["auto"]["towers"]["image"]
        return found

    return made


def test_layers_that_save_no_time_stay_high_with_what_was_measured(build: Build) -> None:
    def measure(shape: LayerShape) -> LayerTime:
        slow = shape.outputs == 3 * shape.inputs  # qkv
        return LayerTime(half=11.8e-6, quantized=12.1e-6 if slow else 6e-6, pays=not slow)

    found = build(measure)
    assert found["cost"] == {"unit": "seconds", "on": HERE.gpu, "batch": 64}
    for name, layer in found["layers"].items():
        slow = name.endswith("qkv/MatMul")
        assert layer["format"] == ("fp16" if slow else "int8")
        if slow:
            assert layer["why"] == "8 bits are no faster than half here: 12.1 us against 11.8 us"
    flops = sum(layer["flops"] for name, layer in found["layers"].items() if layer["format"] == "int8")
    assert found["share"] == pytest.approx(flops / sum(layer["flops"] for layer in found["layers"].values()), abs=0.03)


def test_shapes_are_those_of_the_largest_batch_and_each_is_timed_once_ever(build: Build) -> None:
    asked: list[LayerShape] = []

    def measure(shape: LayerShape) -> LayerTime:
        asked.append(shape)
        return faster(shape)

    first = build(measure)
    tokens, pooled = 64 * ((64 // 8) ** 2 + 1), 64  # the last block gives one position of each picture
    blocks = {(tokens, 128, 384), (tokens, 128, 128), (tokens, 128, 512), (tokens, 512, 128)}
    last = {(pooled, 128, 128), (pooled, 128, 512), (pooled, 512, 128)}
    assert {(shape.rows, shape.inputs, shape.outputs) for shape in asked} == blocks | last
    assert len(asked) == 7
    assert build(measure) == first
    assert len(asked) == 7  # the second build took them from beside the bundle


def test_what_saves_most_time_is_quantized_first(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs that the search is given are the seconds saved, whatever the FLOPs."""
    given: dict[str, float] = {}

    def measure(shape: LayerShape) -> LayerTime:
        return LayerTime(half=1e-6 * (2 + shape.inputs), quantized=2e-6, pays=True)

    from clip_export import quantized

    real = quantized.search

    def searched(costs: dict[str, float], *args: Any, **options: Any) -> Any:
        given.update(costs)
        return real(costs, *args, **options)

    monkeypatch.setattr(quantized, "search", searched)
    build(measure)
    assert given
    for name, cost in given.items():
        assert cost == pytest.approx(1e-6 * (512 if name.endswith("fc2/MatMul") else 128))


def test_where_nothing_pays_nothing_is_published(build: Build) -> None:
    with pytest.raises(ContractError, match="no layer is left to quantize"):
        build(lambda shape: LayerTime(half=1e-6, quantized=1e-6, pays=False))


def test_without_a_gpu_it_goes_by_flops(image_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(image_bundle, tmp_path / "bundle")
    made = clip_export.extend(bundle, precision="auto", calibration=[pictures], quantization=FAST)
    assert made.report()["precisions"]["auto"]["towers"]["image"]["cost"] == {"unit": "flops"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": {"half": 1}}', b"\xff"])
def test_times_that_cannot_be_read_are_measured_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layers.json"
    path.write_bytes(content)
    times = LayerTimes(path, faster, batch=8, where="here")
    assert times(SHAPE) == faster(SHAPE)
    assert len(json.loads(path.read_bytes())) == 1


def test_times_are_of_one_gpu_and_one_shape(tmp_path: Path) -> None:
    asked: list[LayerShape] = []

    def measure(shape: LayerShape) -> LayerTime:
        asked.append(shape)
        return faster(shape)

    for where in ("here", "there", "here"):
        times = LayerTimes(tmp_path / "layers.json", measure, batch=8, where=where)
        for shape in (SHAPE, dataclasses.replace(SHAPE, rows=95)):
            times(shape)
    assert len(asked) == 4


def test_a_layer_takes_its_part_of_the_chain() -> None:
    rounds = np.full((6, 4), 32e-6)
    rounds[:, 1:3] = 16e-6
    found = layer_time(summarize(rounds))
    assert (found.half, found.quantized, found.pays) == (pytest.approx(32e-6 / 2 / PAIRS), pytest.approx(1e-6), True)
    assert str(found) == "1.0 us against 2.0 us"
    assert not layer_time(summarize(np.full((6, 4), 1e-5))).pays


@pytest.mark.parametrize(("format_", "capability"), [("int8", "sm_86"), ("int8", "sm_89"), ("fp8", "sm_89")])
def test_chains_compile_and_every_product_runs_in_8_bits(tmp_path: Path, format_: Any, capability: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    shape = dataclasses.replace(SHAPE, format=format_)
    half, quantized = write_chains(shape, tmp_path)
    target = tensorrt_rtx.target(capability)
    reports: list[BuildReport] = []
    compiler = backends.compiler("tensorrt-rtx")
    real = compiler.build_plan

    def build_plan(request: BuildRequest, *, progress: Progress) -> BuildReport:
        reports.append(real(request, progress=progress))
        return reports[-1]

    for graph in (half, quantized):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "build_plan", build_plan)
            assert build_chain(shape, graph, target).stat().st_size > 0
    assert reports[0].low_precision == ()
    assert len(reports[1].low_precision or ()) == 2 * PAIRS
    assert reports[1].dequantized == ()


@pytest.mark.gpu
def test_layers_are_timed_on_this_gpu(tmp_path: Path) -> None:
    target = tensorrt_rtx.target(None)
    times = layer_times(target, batch=64, cache=tmp_path / "cache", work=tmp_path)
    found = times(LayerShape(rows=64 * 50, inputs=768, outputs=3072, format="int8"))
    assert 0 < found.quantized < 1e-2
    assert 0 < found.half < 1e-2
    assert not list(tmp_path.glob(".layers-*"))
    assert re.fullmatch(r"[0-9.]+ us against [0-9.]+ us", str(found))
    assert time_layer(SHAPE, target, tmp_path).half > 0
