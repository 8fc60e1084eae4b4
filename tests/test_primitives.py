"""Attention taken apart, and the normalized output: the numbers stay, and a compiler takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from precision_made import TOWERS, rtx_builds

from clip_export.bundle import Bundle
from clip_export.errors import PlanBuildError
from clip_export.graph.files import save
from clip_export.graph.primitives import add_normalized, decompose, decompose_attention
from clip_export.spec import Tower


def feeds(tower: Tower, batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    if tower == "image":
        return {"pixels": rng.integers(0, 256, (batch, 3, 32, 32), dtype=np.uint8)}
    ids = rng.integers(0, 500, (batch, length), dtype=np.int32)
    return {"input_ids": ids, "eot_index": rng.integers(0, length, batch).astype(np.int32)}


def run(path: Path, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    return list(session.run(None, arrays))


def attention(
    path: Path,
    *,
    heads: int = 0,
    dtype: ir.DataType = ir.DataType.FLOAT,
    mask: bool = False,
    visible: bool = False,
    **more: object,
) -> Path:
    """One Attention node on inputs q, k, v: [batch, heads, sequence, 16], or [batch, sequence, heads * 16]."""
    shape = ["batch", "sequence", heads * 16] if heads else ["batch", 2, "sequence", 16]
    names = ["q", "k", "v", *(["mask"] if mask else [])]
    inputs = [ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name in names]
    if visible:
        over = ir.Shape(["batch", 1, "sequence", "sequence"])
        inputs.append(ir.Value(name="visible", shape=over, type=ir.TensorType(ir.DataType.BOOL)))
    attributes = more | ({"q_num_heads": heads, "kv_num_heads": heads} if heads else {})
    node = ir.node("Attention", inputs, attributes=attributes, name="block/Attention")
    output = node.outputs[0]
    output.name, output.shape, output.dtype = "y", ir.Shape(shape), dtype
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": 23}, name="attention")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


@pytest.mark.parametrize("tower", TOWERS)
def test_decomposed_towers_give_what_they_gave(tiny_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    path = Bundle.open(tiny_bundle).graph_path(tower)
    model = ir.load(path)
    assert decompose_attention(model) == 2
    save(model, tmp_path / "g.onnx")
    assert not [node for node in ir.load(tmp_path / "g.onnx").graph if node.op_type == "Attention"]
    for batch, length in [(1, 1), (2, 7), (5, 77)]:
        arrays = feeds(tower, batch, length)
        np.testing.assert_allclose(run(tmp_path / "g.onnx", arrays)[0], run(path, arrays)[0], atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"is_causal": 1}, {"scale": 0.5}, {"is_causal": 1, "scale": 0.1}], ids=str)
@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("split", [False, True])
def test_all_forms_of_the_operator(tmp_path: Path, heads: int, options: dict[str, object], split: bool) -> None:
    path = attention(tmp_path / "a.onnx", heads=heads, **options)
    model = ir.load(path)
    scores = decompose(model, split_scale=split)
    assert {name: value.name for name, value in scores.items()} == {"block/Attention": "block/scores"}
    assert all(str(node.name).startswith("block/") for node in model.graph)
    save(model, tmp_path / "d.onnx")
    rng = np.random.default_rng(0)
    for batch, length in [(1, 1), (3, 5)]:
        shape = (batch, length, heads * 16) if heads else (batch, 2, length, 16)
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name in "qkv"}
        np.testing.assert_allclose(run(tmp_path / "d.onnx", arrays)[0], run(path, arrays)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_half_attention_stays_half_and_its_mask_is_finite(tmp_path: Path, dtype: ir.DataType) -> None:
    model = ir.load(attention(tmp_path / "a.onnx", dtype=dtype, is_causal=1))
    decompose_attention(model)
    save(model, tmp_path / "d.onnx")
    floats = [value for node in model.graph for value in node.outputs if value.dtype.is_floating_point()]
    assert floats and {value.dtype for value in floats} == {dtype}
    lowest = model.graph.initializers["block/lowest"].const_value.numpy().astype(np.float32)
    assert np.isfinite(lowest) and lowest < -60000


def test_half_attention_gives_what_the_operator_gives(tmp_path: Path) -> None:
    path = attention(tmp_path / "a.onnx", dtype=ir.DataType.FLOAT16, is_causal=1)
    model = ir.load(path)
    decompose_attention(model)
    save(model, tmp_path / "d.onnx")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((2, 2, 6, 16)).astype(np.float16) for name in "qkv"}
    np.testing.assert_allclose(run(tmp_path / "d.onnx", arrays)[0], run(path, arrays)[0], atol=4e-3)


def test_only_those_asked_for(tiny_bundle: Path) -> None:
    model = ir.load(Bundle.open(tiny_bundle).graph_path("text"))
    assert decompose_attention(model, only={"blocks.1.attention/Attention"}) == 1
    assert [node.name for node in model.graph if node.op_type == "Attention"] == ["blocks.0.attention/Attention"]


def test_a_mask_of_its_own_hides_what_the_operator_hides(tmp_path: Path) -> None:
    path = attention(tmp_path / "a.onnx", visible=True)
    model = ir.load(path)
    assert decompose_attention(model) == 1
    save(model, tmp_path / "d.onnx")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((3, 2, 5, 16)).astype(np.float32) for name in "qkv"}
    visible = np.tril(np.ones((5, 5), bool))[None, None] & (rng.random((3, 1, 1, 5)) > 0.4)
    visible[..., 0] = True
    found = run(tmp_path / "d.onnx", arrays | {"visible": visible})[0]
    np.testing.assert_allclose(found, run(path, arrays | {"visible": visible})[0], atol=1e-5)
    assert np.abs(found - run(path, arrays | {"visible": np.ones_like(visible)})[0]).max() > 0.1


def test_attention_that_is_more_than_that_is_refused(tmp_path: Path) -> None:
    masked = ir.load(attention(tmp_path / "a.onnx", mask=True))
    with pytest.raises(PlanBuildError, match=r"block/Attention: expected .*, found a mask that is not bool"):
        decompose_attention(masked)
    capped = ir.load(attention(tmp_path / "a.onnx", softcap=30.0))
    with pytest.raises(PlanBuildError, match="found a soft cap"):
        decompose_attention(capped)


@pytest.mark.parametrize("tower", TOWERS)
def test_normalized_is_the_embedding_over_its_norm(tiny_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    model = ir.load(Bundle.open(tiny_bundle).graph_path(tower))
    assert add_normalized(model)
    assert not add_normalized(model)
    assert [value.name for value in model.graph.outputs] == ["embedding", "normalized"]
    save(model, tmp_path / "g.onnx")
    embedding, normalized = run(tmp_path / "g.onnx", feeds(tower, 3, 9))
    expected = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(normalized, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_normalized_of_zero_is_zero_and_of_a_half_is_fp32(tmp_path: Path, dtype: ir.DataType) -> None:
    value = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(dtype))
    node = ir.node("Identity", [value], name="Identity")
    output = node.outputs[0]
    output.name, output.shape, output.dtype = "embedding", value.shape, dtype
    graph = ir.Graph([value], [output], nodes=[node], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    assert add_normalized(model)
    save(model, tmp_path / "g.onnx")
    rows = np.array([[0, 0, 0, 0], [300, 400, 0, 0]], dtype=dtype.numpy())
    normalized = run(tmp_path / "g.onnx", {"x": rows})[1]
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, [[0, 0, 0, 0], [0.6, 0.8, 0, 0]], atol=1e-7)


def test_without_an_embedding_nothing_is_added(tmp_path: Path) -> None:
    model = ir.load(attention(tmp_path / "a.onnx"))
    assert not add_normalized(model)
    assert len(model.graph.outputs) == 1


def test_tensorrt_rtx_compiles_fp32_attention_in_this_form_only(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Bundle.open(tiny_bundle).graph_path("text")
    assert not rtx_builds(path, "SM86")
    model = ir.load(path)
    decompose_attention(model)
    add_normalized(model)
    save(model, tmp_path / "g.onnx")
    assert rtx_builds(tmp_path / "g.onnx", "SM86")
