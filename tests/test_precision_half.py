"""The half graph: what is in half, what is not and why, on plain checkpoints and on those made to break half."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hardened import HARDENINGS, Hardening, harden
from precision_made import KEEP, TOWERS, Sample, chain, full_size, golden_sample, naive, rtx_builds

import clip_export
from clip_export.errors import ExportError, InputError, PlanBuildError
from clip_export.graph import files
from clip_export.precision.half import convert
from clip_export.precision.ranges import measure
from clip_export.precision.refine import agreement, refine
from clip_export.spec import Tower

CONTRACT = 0.9999
HALF = ir.DataType.FLOAT16


@pytest.fixture(scope="module")
def hardened(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Hardening], Path]:
    """Bundles of the hardened tiny checkpoint, each built once."""

    @cache
    def build(hardening: Hardening) -> Path:
        directory = tmp_path_factory.mktemp(hardening)
        clip_export.build(harden(tiny_checkpoint, directory / "checkpoint", hardening), directory / "bundle")
        return directory / "bundle"

    return build


def types(path: Path) -> dict[str, ir.DataType | None]:
    return {str(value.name): value.dtype for node in ir.load(path).graph for value in node.outputs}


@pytest.mark.parametrize("tower", TOWERS)
def test_everything_is_half_but_norms_and_what_was_asked(tiny_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    sample = golden_sample(tiny_bundle, tower)
    report = sample.convert(tmp_path / "h.onnx")
    assert report.kept == () and set(report.fp32) <= {"asked", "operator", "moves"}
    graph = ir.load(tmp_path / "h.onnx").graph
    source = ir.load(sample.graph).graph
    assert [(v.name, v.dtype, v.shape) for v in graph.inputs] == [(v.name, v.dtype, v.shape) for v in source.inputs]
    assert [(v.name, v.dtype, v.shape) for v in graph.outputs] == [(v.name, v.dtype, v.shape) for v in source.outputs]
    for node in graph:
        first = node.inputs[0]
        assert first is not None
        if node.op_type == "LayerNormalization" or str(node.name).startswith("projection"):
            assert {value.dtype for value in [*node.inputs, *node.outputs] if value} == {ir.DataType.FLOAT}
        elif node.op_type in ("MatMul", "Attention", "Conv", "Add", "Mul", "Sigmoid"):
            assert {value.dtype for value in [*node.inputs, *node.outputs] if value} == {HALF}, node.name
    assert set(graph.initializers) <= set(source.initializers)
    weights = {name: value.dtype for name, value in graph.initializers.items() if "blocks.1." in name}
    assert {dtype for name, dtype in weights.items() if ".norm" not in name} == {HALF}
    assert {dtype for name, dtype in weights.items() if ".norm" in name} == {ir.DataType.FLOAT}


def test_pixels_become_half_without_an_fp32_step(tiny_bundle: Path, tmp_path: Path) -> None:
    golden_sample(tiny_bundle, "image").convert(tmp_path / "h.onnx")
    consumers = [node for node, _ in ir.load(tmp_path / "h.onnx").graph.inputs[0].uses() if node.op_type == "Cast"]
    assert [node.outputs[0].dtype for node in consumers] == [HALF]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_same_graph_gives_the_same_bytes(tiny_bundle: Path, tmp_path: Path, precision: str) -> None:
    sample = golden_sample(tiny_bundle, "text")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sample.convert(tmp_path / name / "h.onnx", precision)
    data = (tmp_path / "a/h.onnx").read_bytes()
    assert data == (tmp_path / "b/h.onnx").read_bytes()
    assert str(tmp_path).encode() not in data


def test_large_weights_lie_beside_the_graph(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = golden_sample(tiny_bundle, "image")
    sample.convert(tmp_path / "whole.onnx")
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 1000)
    sample.convert(tmp_path / "h.onnx")
    assert (tmp_path / "h.onnx.data").stat().st_size > 10_000
    found, expected = ir.load(tmp_path / "h.onnx").graph, ir.load(tmp_path / "whole.onnx").graph
    for name, value in expected.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(found.initializers[name].const_value.numpy(), value.const_value.numpy())


@pytest.mark.parametrize("tower", TOWERS)
def test_tiny_towers_keep_the_contract(tiny_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    sample = golden_sample(tiny_bundle, tower)
    sample.convert(tmp_path / "h.onnx")
    assert agreement(tmp_path / "h.onnx", sample.graph, sample.feeds) >= CONTRACT
    sample.convert(tmp_path / "b.onnx", "bf16")
    assert agreement(tmp_path / "b.onnx", sample.graph, sample.feeds) >= 0.999


@pytest.mark.parametrize("tower", TOWERS)
def test_demo_towers_keep_the_contract_refined(demo_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    sample = golden_sample(demo_bundle, tower)
    report = refine(
        sample.graph,
        tmp_path / "h.onnx",
        precision="fp16",
        ranges=measure(sample.graph, sample.feeds),
        feeds=sample.feeds,
        required=CONTRACT,
        keep=KEEP,
    )
    assert report.agreement is not None and report.agreement >= CONTRACT
    assert report.agreement == agreement(tmp_path / "h.onnx", sample.graph, sample.feeds)
    assert {part for part in report.refined if "/" not in part and part != "Add"} <= {"blocks.0", "blocks.1"}
    found = types(tmp_path / "h.onnx")
    for number in range(4):
        kept = f"blocks.{number}" in report.refined
        assert found[f"blocks.{number}.mlp.fc1/MatMul"] == (ir.DataType.FLOAT if kept else HALF)


def test_refining_ends_where_no_block_is_left(tiny_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(tiny_bundle, "image")
    steps: list[tuple[str, int, int]] = []
    report = refine(
        sample.graph,
        tmp_path / "h.onnx",
        precision="bf16",
        ranges=measure(sample.graph, sample.feeds),
        feeds=sample.feeds,
        required=1.1,
        progress=lambda *step: steps.append(step),
    )
    stream = ("blocks.0/Add", "blocks.0/Add_2", "blocks.1/Add", "blocks.1/Add_2")
    assert report.refined == (*stream, "blocks.0", "blocks.1")
    assert report.agreement is not None and report.agreement > 0.999
    asked = [step.rsplit(", ", 1)[-1] for step, _, _ in steps]
    assert asked == ["convert image to bf16", "4 parts in fp32", "5 parts in fp32", "6 parts in fp32"]


def test_refining_what_is_all_half_keeps_every_product(tiny_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(tiny_bundle, "image")
    report = refine(
        sample.graph,
        tmp_path / "h.onnx",
        precision="fp16",
        ranges=measure(sample.graph, sample.feeds),
        feeds=sample.feeds,
        required=1.1,
        everything=True,
    )
    assert all("/Add" in part for part in report.refined)
    found = types(tmp_path / "h.onnx")
    assert {kind for name, kind in found.items() if name.endswith("/MatMul")} == {HALF}


@pytest.mark.parametrize("hardening", HARDENINGS)
@pytest.mark.parametrize("tower", TOWERS)
def test_ranges_save_what_the_naive_cast_breaks(
    hardened: Callable[[Hardening], Path], tmp_path: Path, tower: Tower, hardening: Hardening
) -> None:
    sample = golden_sample(hardened(hardening), tower)
    naive(sample.graph, tmp_path / "naive.onnx")
    assert agreement(tmp_path / "naive.onnx", sample.graph, sample.feeds) < 0.99
    report = sample.convert(tmp_path / "h.onnx")
    assert agreement(tmp_path / "h.onnx", sample.graph, sample.feeds) >= CONTRACT
    assert report.fp32["range"] == len(report.kept) > 0
    nodes = {item.node for item in report.kept}
    expected = {
        "overflow": {"blocks.0.attention.qkv/MatMul", "blocks.1.mlp.fc1/MatMul"},
        "underflow": {"blocks.0.attention.qkv/MatMul", "blocks.1.attention.qkv/MatMul"},
        "residual": {"blocks.0/Add", "blocks.0.mlp.fc2/MatMul"},
    }
    assert expected[hardening] <= nodes
    assert {item.reason for item in report.kept} == {"underflow" if hardening == "underflow" else "overflow"}
    attention = [node for node in ir.load(tmp_path / "h.onnx").graph if node.op_type == "Attention"]
    assert {node.outputs[0].dtype for node in attention} == {HALF}  # what does fit still runs in half


@pytest.mark.parametrize("hardening", HARDENINGS)
def test_an_all_half_graph_that_would_break_is_refused(
    hardened: Callable[[Hardening], Path], tmp_path: Path, hardening: Hardening
) -> None:
    sample = golden_sample(hardened(hardening), "text")
    with pytest.raises(
        PlanBuildError, match=r"matrix products do not fit float16, and this graph may have no others: blocks.0"
    ):
        sample.convert(tmp_path / "h.onnx", keep=(), everything=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tower", TOWERS)
def test_bfloat16_has_the_range_of_fp32(hardened: Callable[[Hardening], Path], tmp_path: Path, tower: Tower) -> None:
    sample = golden_sample(hardened("residual"), tower)
    report = sample.convert(tmp_path / "h.onnx", "bf16")
    assert report.kept == ()
    assert agreement(tmp_path / "h.onnx", sample.graph, sample.feeds) >= 0.999


def test_attention_whose_scores_overflow_is_taken_apart_in_fp32(tiny_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(tiny_bundle, "text")
    measured = measure(sample.graph, sample.feeds)
    node = "blocks.1.attention/Attention"
    ranges = dataclasses.replace(measured, scores=dict(measured.scores) | {node: 1e6})
    report = convert(sample.graph, tmp_path / "h.onnx", precision="fp16", ranges=ranges, keep=KEEP)
    assert [(item.node, item.reason, item.tensor, item.value) for item in report.kept] == [
        (node, "overflow", f"{node}:scores", 1e6)
    ]
    graph = ir.load(tmp_path / "h.onnx").graph
    assert [item.name for item in graph if item.op_type == "Attention"] == ["blocks.0.attention/Attention"]
    softmax = next(item for item in graph if item.op_type == "Softmax")
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT
    assert agreement(tmp_path / "h.onnx", sample.graph, sample.feeds) >= CONTRACT
    assert rtx_builds(tmp_path / "h.onnx", "SM86")


def test_a_report_is_json(hardened: Callable[[Hardening], Path], tmp_path: Path) -> None:
    report = golden_sample(hardened("overflow"), "text").convert(tmp_path / "h.onnx")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["precision"] == "fp16" and data["half"] == report.half
    assert data["fp32"]["range"] == len(data["kept"])
    assert set(data["kept"][0]) == {"node", "reason", "tensor", "value", "limit"}


def test_what_rounds_a_tensor_that_has_to_be_exact_stays_fp32(tmp_path: Path) -> None:
    """Half of the channels at 1e-6 before weights of 1e6: the product needs them exact, from an addition."""
    small = np.where(np.arange(8) % 2, 1e-6, 1.0)
    first = np.diag(np.full(8, 0.5))
    path = chain(
        tmp_path / "g.onnx",
        ("MatMul", first * small),
        ("Add", np.zeros(8)),
        ("MatMul", np.eye(8) / small[:, None]),
        ("Mul", 0.5),
    )
    sample = Sample(path, ({"x": np.arange(1, 25, dtype=np.int32).reshape(3, 8)},))
    report = sample.convert(tmp_path / "h.onnx")
    assert {item.node for item in report.kept} >= {"0/MatMul", "1/Add", "2/MatMul"}
    assert "3/Mul" not in {item.node for item in report.kept}
    assert {item.tensor for item in report.kept if item.node == "1/Add"} == {"1/Add"}


def test_a_norm_needs_its_typical_channel(tmp_path: Path) -> None:
    """One channel of order 1, the others near 1e-6: a norm makes something of them all."""
    small = np.where(np.arange(8) == 0, 1.0, 1e-6)
    path = chain(tmp_path / "g.onnx", ("Mul", small), ("LayerNormalization", np.ones(8)))
    sample = Sample(path, ({"x": np.arange(1, 25, dtype=np.int32).reshape(3, 8)},))
    assert {item.node for item in sample.convert(tmp_path / "h.onnx").kept} >= {"0/Mul"}
    plain = chain(tmp_path / "p.onnx", ("Mul", np.ones(8)), ("LayerNormalization", np.ones(8)))
    assert Sample(plain, sample.feeds).convert(tmp_path / "h.onnx").kept == ()


def test_only_fp32_graphs_of_a_known_precision(tiny_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(tiny_bundle, "text")
    sample.convert(tmp_path / "h.onnx")
    with pytest.raises(ExportError, match=r"expected float32 tensors, found .* of float16"):
        convert(
            tmp_path / "h.onnx", tmp_path / "again.onnx", precision="fp16", ranges=measure(sample.graph, sample.feeds)
        )
    with pytest.raises(InputError, match="no half precision 'fp8'"):
        sample.convert(tmp_path / "h.onnx", "fp8")


@pytest.mark.parametrize("bundle", ["tiny_bundle", "demo_bundle"])
@pytest.mark.parametrize("tower", TOWERS)
def test_tensorrt_rtx_compiles_them(request: pytest.FixtureRequest, tmp_path: Path, bundle: str, tower: Tower) -> None:
    sample = golden_sample(request.getfixturevalue(bundle), tower)
    sample.convert(tmp_path / "h.onnx")
    sample.convert(tmp_path / "all.onnx", keep=(), everything=True)
    assert rtx_builds(tmp_path / "h.onnx", "SM86")
    assert rtx_builds(tmp_path / "h.onnx", "SM120")
    assert not rtx_builds(tmp_path / "h.onnx", "SM75")  # the projection is fp32
    assert rtx_builds(tmp_path / "all.onnx", "SM75")


@pytest.mark.parametrize("name", ["vit-b-32", pytest.param("vit-l-14", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_full_size_keep_the_contract(tmp_path: Path, name: str, tower: Tower) -> None:
    sample = full_size(name, tower, tmp_path)
    report = sample.convert(tmp_path / "h.onnx")
    assert report.kept == ()
    assert agreement(tmp_path / "h.onnx", sample.graph, sample.feeds) >= CONTRACT
