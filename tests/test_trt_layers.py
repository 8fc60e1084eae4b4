"""What multiplies in 8 bits: read from layer lists, captured and made, and proven by builds of the demo's image tower.

tests/layers/ holds lines of lists that TensorRT-RTX 1.7 logged for the demo bundle on a machine without a GPU:
`int8.txt` an image tower with packed q, k and v, the others towers whose attention is quantized as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from precision_made import golden_sample

from clip_export.backends._trt_inspect import Layer
from clip_export.backends._trt_layers import (
    EngineLayer,
    find_low_precision,
    quantized_products,
    read_inspector,
    read_log,
)
from clip_export.backends.building import BuildReport, BuildRequest, ShapeRange
from clip_export.errors import PlanBuildError
from clip_export.precision._nodes import constant, drop_unread, make_node
from clip_export.precision.quantize import Quantized, quantizable, quantize

LISTS = Path(__file__).parent / "layers"
PACKED, OUT = "blocks.0.attention.qkv/MatMul", "blocks.0.attention.out/MatMul"
SCORES, MIXED = "blocks.0.attention/scores", "blocks.0.attention/mixed"
BLOCKS = [f"blocks.{n}" for n in range(4)]


def captured(name: str = "int8") -> str:
    return (LISTS / f"{name}.txt").read_text(encoding="utf-8")


def known(layers: tuple[EngineLayer, ...] | None) -> tuple[EngineLayer, ...]:
    assert layers is not None
    return layers


# Lists


def test_a_list_of_the_compiler_is_read() -> None:
    layers = known(read_log(captured()))
    gemm = next(layer for layer in layers if layer.type == "gemm" and OUT in layer.nodes)
    assert (gemm.inputs, gemm.constants[:1], gemm.multiplies, gemm.in_eight_bits) == (("Int8",), ("Int8",), True, True)
    assert gemm.nodes == {OUT, "blocks.0.attention.out/input/dq", "blocks.0.attention.out/weight_dq"}
    (fusion,) = (layer for layer in layers if layer.type == "runtime_fusion")
    assert (fusion.inputs, fusion.constants, fusion.multiplies) == (("Int8", "Half"), (), False)
    assert PACKED in fusion.nodes


def test_a_product_on_dequantized_numbers_is_told_from_one_in_8_bits() -> None:
    found = find_low_precision((PACKED, OUT), read_log(captured()), graph="image.onnx")
    assert (found.low_precision, found.dequantized) == ((OUT,), (PACKED,))
    assert found.warning is not None
    assert found.warning.startswith("1 of 2 quantized products do not run in 8 bits") and PACKED in found.warning


@pytest.mark.parametrize("name", ["int8_attention_fused", "fp8_attention_causal"])
def test_products_of_attention_in_8_bits_are_seen(name: str) -> None:
    found = find_low_precision((SCORES, MIXED), read_log(captured(name)), graph="g")
    assert (found.low_precision, found.dequantized, found.warning) == ((SCORES, MIXED), (), None)


def second_in_half(text: str, kernel: str) -> str:
    """The list with the second input of the layer called `kernel`... in half."""
    lines = text.split("\n")
    (number,) = (n for n, line in enumerate(lines) if line.startswith(f"Name: {kernel}"))
    before, first, after = re.split(r"(?<=Datatype: )\w+(?=,)", lines[number], maxsplit=2)
    kind = lines[number][len(before) :].partition(",")[0]
    lines[number] = f"{before}{kind}{first}Half{after}"
    return "\n".join(lines)


def test_attention_with_one_factor_in_half_does_not_run_in_8_bits() -> None:
    causal = second_in_half(captured("fp8_attention_causal"), SCORES)
    found = find_low_precision((SCORES, MIXED), read_log(causal), graph="g")
    assert (found.low_precision, found.dequantized) == ((MIXED,), (SCORES,))
    fused = second_in_half(captured("int8_attention_fused"), "_gemm_mha")  # one kernel for both products
    with pytest.raises(PlanBuildError, match="none of 2"):
        find_low_precision((SCORES, MIXED), read_log(fused), graph="g")


@pytest.mark.parametrize(("values", "low"), [("Int8", True), ("Half", False), ("FP8", False)])
def test_attention_needs_its_values_in_8_bits_too(values: str, low: bool) -> None:
    inputs = ("Int8", "Int8", values)
    kernel = EngineLayer(name="_gemm_mha_v2_1", type="kgen", inputs=inputs, constants=(), nodes=frozenset({SCORES}))
    assert (kernel.multiplies, kernel.in_eight_bits) == (True, low)


def test_where_nothing_runs_in_8_bits_the_build_has_failed() -> None:
    with pytest.raises(PlanBuildError, match=r"none of 1 quantized products of image\.onnx") as caught:
        find_low_precision((PACKED,), read_log(captured()), graph="image.onnx")
    assert PACKED in caught.value.message and "fp16" in str(caught.value.hint)


def test_a_graph_without_quantized_products_needs_no_list() -> None:
    found = find_low_precision((), None, graph="g")
    assert (found.low_precision, found.dequantized, found.warning) == ((), (), None)


@pytest.mark.parametrize("layers", [None, (), "captured"])
def test_what_no_list_speaks_of_is_not_known(layers: Any) -> None:
    layers = read_log(captured()) if layers == "captured" else layers
    found = find_low_precision(("elsewhere/MatMul",), layers, graph="g")
    assert (found.low_precision, found.dequantized) == (None, ())
    assert found.warning is not None and "not known" in found.warning and "elsewhere/MatMul" in found.warning


def test_every_profile_needs_its_kernel() -> None:
    layers = known(read_log(captured()))
    with pytest.raises(PlanBuildError, match="none of 1"):
        find_low_precision((OUT,), layers, graph="g", profiles=2)
    assert find_low_precision((OUT,), layers * 2, graph="g", profiles=2).low_precision == (OUT,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LayerType: gemm", "LayerType: brandnew"),  # a kind of layer that nobody has seen yet
        ("Constants: [", "Weights: ["),
        ("Datatype: ", "Type: "),
        ("Datatype: ", "Format/Datatype: "),
        ("Name: ", "name="),
        ("LayerType", "Kind"),
        ("[ONNX Layer: ", "[Node: "),
        ("StreamId: 0", "StreamId: none"),
        ("Name: projection/MatMul", "Called: projection/MatMul"),  # one line of another layer
    ],
)
def test_another_format_proves_nothing(old: str, new: str) -> None:
    text = captured()
    assert old in text
    layers = read_log(text.replace(old, new))
    assert find_low_precision((OUT,), layers, graph="g").low_precision is None


def test_a_list_that_is_cut_off_proves_no_more() -> None:
    text, products = captured(), (PACKED, OUT)
    for end in range(0, len(text), 7):
        layers = read_log(text[:end])
        try:
            found = find_low_precision(products, layers, graph="g")
        except PlanBuildError:
            assert OUT in str(layers), "what no layer names is not known, and no failure"
        else:
            assert set(found.low_precision or ()) <= {OUT}


@pytest.mark.parametrize(
    "text", ["", "Layers:", "Layers:\n", "Layers:\n\n", "Layers: none", "\x00\xff", "Name: a", "{}"]
)
def test_garbage_is_no_list(text: str) -> None:
    assert read_log(text) is None
    assert read_inspector(text) is None


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"Layers": {}}', '{"Layers": []}', '{"Layers": ["a", "b"]}'])
def test_json_without_details_is_no_list(text: str) -> None:
    assert read_inspector(text) is None


def inspected(**changed: Any) -> str:
    """An entry as TensorRT 10 has it for a product: weights among the inputs, format and type in one field."""
    tensors = [{"Name": "x", "Format/Datatype": "Int8"}, {"Name": "w", "Format/Datatype": "Int8"}]
    entry = {"Name": "a_myl0_1", "LayerType": "gemm", "Inputs": tensors, "Metadata": f"[ONNX Layer: {OUT}]"}
    return json.dumps({"Layers": [entry | changed], "Bindings": []})


def test_the_inspectors_json_is_read() -> None:
    assert find_low_precision((OUT,), read_inspector(inspected()), graph="g").low_precision == (OUT,)
    half = [{"Format/Datatype": "Half"}, {"Format/Datatype": "Half"}]
    with pytest.raises(PlanBuildError, match="none of 1"):
        find_low_precision((OUT,), read_inspector(inspected(Inputs=half)), graph="g")


@pytest.mark.parametrize(
    "changed",
    [
        {"Inputs": [{"Format/Datatype": "Int8"}]},  # weights that are not shown
        {"Inputs": [{"Format/Datatype": "Row major Int8 format"}] * 2},
        {"Inputs": [{"Name": "x"}, {"Name": "w"}]},
        {"Inputs": "Int8"},
        {"LayerType": "CaskGemmMatrixMultiply"},
        {"LayerType": None},
        {"Metadata": None},
        {"Metadata": ""},
    ],
)
def test_an_entry_that_says_too_little_proves_nothing(changed: dict[str, Any]) -> None:
    assert find_low_precision((OUT,), read_inspector(inspected(**changed)), graph="g").low_precision is None


# Networks


def network(*layers: tuple[str, str, tuple[str, ...], str]) -> list[Layer]:
    return [Layer(node=node, type=kind, inputs=inputs, outputs=(output,)) for node, kind, inputs, output in layers]


def test_products_of_dequantized_operands_are_found() -> None:
    layers = network(
        ("x/dq", "DEQUANTIZE", ("x/q", "s"), "x"),
        ("w/dq", "DEQUANTIZE", ("w/q", "s"), "w"),
        ("", "SHUFFLE", ("w",), "wide"),
        ("both", "MATRIX_MULTIPLY", ("x", "wide"), "a"),
        ("weights", "MATRIX_MULTIPLY", ("a", "wide"), "b"),
        ("neither", "MATRIX_MULTIPLY", ("a", "b"), "c"),
        ("bias", "ELEMENTWISE", ("x", "w"), "d"),
        ("sum", "MATRIX_MULTIPLY", ("d", "wide"), "e"),
    )
    assert quantized_products(layers) == ("both",)


# Builds


def quantize_by_hand(model: ir.Model, scopes: Collection[str], *, activations: bool = True) -> None:
    """int8 on the linears in `scopes`, in the textbook form and nothing else: what an ordinary quantizer writes."""
    graph, half, int8 = model.graph, ir.DataType.FLOAT16, ir.DataType.INT8
    chosen = {linear.name for linear in quantizable(graph) if linear.name.startswith(tuple(scopes))}
    zero, step = constant(graph, "zero", np.int8(0), int8), constant(graph, "step", np.float16(0.05), half)
    for node in [node for node in graph if node.name in chosen]:
        source, weights = node.inputs[0], node.inputs[1]
        assert source is not None and weights is not None and weights.const_value is not None
        scales = np.maximum(np.abs(weights.const_value.numpy()).max(axis=0), 1e-3).astype(np.float32) / 127
        held = np.rint(weights.const_value.numpy() / scales).clip(-127, 127).astype(np.int8)
        operands = [
            constant(graph, f"{node.name}/w", held, int8),
            constant(graph, f"{node.name}/s", np.float16(scales)),
        ]
        weight = make_node("DequantizeLinear", operands, f"{node.name}/w/dq", dtype=half, axis=1)
        down = make_node("QuantizeLinear", [source, step, zero], f"{node.name}/q", dtype=int8)
        up = make_node("DequantizeLinear", [down.outputs[0], step, zero], f"{node.name}/dq", dtype=half)
        graph.insert_before(node, [weight, down, up] if activations else [weight])
        node.replace_input_with(1, weight.outputs[0])
        if activations:
            node.replace_input_with(0, up.outputs[0])
        drop_unread(graph, [weights])


@pytest.fixture(scope="module")
def half_graph(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "image.onnx"
    golden_sample(demo_bundle, "image").convert(path)
    return path


@pytest.fixture
def build(half_graph: Path, tmp_path: Path) -> Callable[..., BuildReport]:
    """Builds the half graph, changed, for sm_89 and batches up to those given."""
    backend = pytest.importorskip("clip_export.backends.tensorrt_rtx", reason="needs tensorrt-rtx")
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

    def run(change: Callable[[ir.Model], object], *batches: int, source: Path = half_graph) -> BuildReport:
        model = ir.load(source)
        change(model)
        ir.save(model, tmp_path / "image.onnx")
        profiles = tuple(
            {"pixels": ShapeRange(min=(1, 3, 64, 64), opt=(most, 3, 64, 64), max=(most, 3, 64, 64))}
            for most in batches or (8,)
        )
        plan = tmp_path / "image.plan"
        request = BuildRequest(graph=tmp_path / "image.onnx", plan=plan, profiles=profiles, compute_capability="sm_89")
        report: BuildReport = backend.build_plan(request)
        assert report.plan_bytes == plan.stat().st_size
        return report

    return run


def test_a_packed_projection_is_not_compiled_to_8_bits_and_that_is_told(build: Callable[..., BuildReport]) -> None:
    report = build(lambda model: quantize_by_hand(model, BLOCKS))
    packed = tuple(f"{block}.attention.qkv/MatMul" for block in BLOCKS)
    assert report.dequantized == packed, "a compiler that takes this form needs no other"
    assert report.low_precision is not None and len(report.low_precision) == 12
    (warning,) = report.warnings
    assert warning.startswith("4 of 16 quantized products") and all(name in warning for name in packed)


@pytest.mark.parametrize("wide", [False, True])
def test_what_quantize_writes_runs_in_8_bits(
    build: Callable[..., BuildReport], half_graph: Path, tmp_path: Path, wide: bool
) -> None:
    """All of it, the packed projections too, with scales in half and in fp32."""
    target = tmp_path / "int8.onnx"
    linears = [linear.name for linear in quantizable(ir.load(half_graph).graph)]
    quantize(half_graph, target, {name: Quantized(format="int8", scale=0.05, wide=wide) for name in linears})
    for batches in ((8,), (2, 8)):
        report = build(lambda model: None, *batches, source=target)
        assert report.low_precision == tuple(linears) and len(linears) == 16
        assert (report.dequantized, report.warnings) == ((), ())


def test_a_plan_in_which_nothing_runs_in_8_bits_is_refused(build: Callable[..., BuildReport], tmp_path: Path) -> None:
    with pytest.raises(PlanBuildError, match=r"none of 4 quantized products of image\.onnx") as caught:
        build(lambda model: quantize_by_hand(model, [f"{block}.attention.qkv" for block in BLOCKS]))
    assert "build fp16" in str(caught.value.hint)
    assert list(tmp_path.glob("*.plan*")) == list(tmp_path.glob(".*.part")) == []


@pytest.mark.parametrize("weights_alone", [False, True])
def test_a_graph_without_products_in_8_bits_says_nothing(
    build: Callable[..., BuildReport], weights_alone: bool
) -> None:
    report = build(lambda model: quantize_by_hand(model, BLOCKS, activations=False) if weights_alone else None)
    assert (report.low_precision, report.dequantized, report.warnings) == ((), (), ())
