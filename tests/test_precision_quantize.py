"""Q/DQ graphs: where the pairs are and are not, what numbers they hold, and that TensorRT-RTX multiplies in 8 bits."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from precision_made import TOWERS, Sample, chain, golden_sample, naive, rtx_builds

from clip_export.errors import InputError
from clip_export.graph import files
from clip_export.precision._held import dequantized, hold_scale, hold_weights, weight_scales
from clip_export.precision.fits import HALF_TYPES
from clip_export.precision.formats import FORMATS, FormatName, find_format
from clip_export.precision.half import convert
from clip_export.precision.linears import find_linears
from clip_export.precision.quantize import (
    Quantized,
    QuantizedAttention,
    needs_wide,
    quantizable,
    quantize,
    refusals,
)
from clip_export.precision.ranges import Ranges, measure
from clip_export.precision.refine import agreement, min_cosine
from clip_export.precision.simulate import simulate
from clip_export.precision.switchable import Switched, switchable
from clip_export.spec import Tower

PAIR = ("QuantizeLinear", "DequantizeLinear")
EIGHT: tuple[FormatName, ...] = ("int8", "fp8")


def half_graph(sample: Sample, path: Path, **options: Any) -> Ranges:
    """The fp16 graph of `sample` at `path`; returns the ranges, those of what was cast to half among them."""
    ranges = measure(sample.graph, sample.feeds)
    convert(sample.graph, path, precision="fp16", ranges=ranges, **options)
    return ranges


def mix_of(path: Path, ranges: Ranges, format_: FormatName) -> dict[str, Quantized]:
    """All linears of the blocks, each with the scale that its largest input takes."""
    linears = [linear for linear in quantizable(ir.load(path).graph) if linear.name.startswith("blocks")]
    largest = FORMATS[format_].largest
    sources = {linear.name: linear.source.removesuffix("/to_float16") for linear in linears}
    return {name: Quantized(format=format_, scale=ranges.largest(of) / largest) for name, of in sources.items()}


def attention_of(path: Path, ranges: Ranges, format_: FormatName) -> dict[str, QuantizedAttention]:
    scales = {
        str(node.name): [ranges.largest(str(value.name)) / FORMATS[format_].largest for value in node.inputs[:3]]
        for node in ir.load(path).graph
        if node.op_type == "Attention"
    }
    return {
        name: QuantizedAttention(format=format_, query=query, key=key, value=value)
        for name, (query, key, value) in scales.items()
    }


def half_chain(directory: Path, *weights: np.ndarray) -> Path:
    """`x` int32 through MatMuls of `weights`, all in half: `0/MatMul`, `1/MatMul`, …"""
    source = chain(directory / "g.onnx", *(("MatMul", matrix) for matrix in weights), width=len(weights[0]))
    naive(source, directory / "h.onnx")
    return directory / "h.onnx"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).normal(0, 0.05, shape).astype(np.float32)


@pytest.mark.parametrize("format_", EIGHT)
@pytest.mark.parametrize("tower", TOWERS)
def test_pairs_stand_before_the_linears_of_the_mix_and_nowhere_else(
    tiny_bundle: Path, tmp_path: Path, tower: Tower, format_: FormatName
) -> None:
    ranges = half_graph(golden_sample(tiny_bundle, tower), tmp_path / "h.onnx", everything=True)
    mix = mix_of(tmp_path / "h.onnx", ranges, format_)
    left = list(mix)[2]
    del mix[left]
    assert quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", mix) == tuple(mix)
    half, graph = ir.load(tmp_path / "h.onnx").graph, ir.load(tmp_path / "q.onnx").graph
    readers: dict[tuple[str, int], ir.Node] = {}
    for node in graph:
        if node.op_type == "DequantizeLinear":
            for reader, index in node.outputs[0].uses():
                readers[str(reader.name), index] = node
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader, _ in node.outputs[0].uses()] == ["DequantizeLinear"]
    assert set(readers) == {(name, index) for name in mix for index in (0, 1)}
    kind = ir.DataType.INT8 if format_ == "int8" else ir.DataType.FLOAT8E4M3FN
    assert {node.inputs[0].dtype for node in readers.values() if node.inputs[0]} == {kind}
    assert all(bool(node.inputs[0].is_initializer()) == bool(index) for (_, index), node in readers.items())
    # What does not move numbers is there as before, reads the types that it read, and gives them.
    moves = {*PAIR, "Split", "Reshape", "Transpose", "Gather"}
    before, after = (
        {str(node.name): [value.dtype for value in (*node.inputs, *node.outputs) if value] for node in nodes}
        for nodes in ([n for n in of if n.op_type not in moves] for of in (half, graph))
    )
    assert after == before


@pytest.mark.parametrize("format_", EIGHT)
def test_weights_are_held_symmetrically_at_scales_as_half_holds_them(tmp_path: Path, format_: FormatName) -> None:
    weights = normal(96, 64)
    weights[:, 3] = 0  # a dead output
    weights[5, 4] = -1.0
    path = half_chain(tmp_path, weights)
    quantize(path, tmp_path / "q.onnx", {"0/MatMul": Quantized(format=format_, scale=0.5)})
    constants = ir.load(tmp_path / "q.onnx").graph.initializers
    held = constants[f"0/constant/{format_}"].const_value.numpy().astype(np.float32)
    scales = constants[f"0/constant/{format_}/scale"].const_value.numpy()
    assert scales.dtype == np.float16 and scales.shape == (64,) and (scales > 0).all()
    assert held.min() == -FORMATS[format_].largest and held.max() <= FORMATS[format_].largest
    half = weights.astype(np.float16).astype(np.float32)
    step = 1.0 if format_ == "int8" else np.maximum(np.abs(half / scales) / 8, 2**-9)  # 3 bits after the first one
    over = np.abs(half / scales.astype(np.float32))
    assert (np.abs(held * scales - half) <= scales * step / 2 * 1.01 + (over > FORMATS[format_].largest) * scales).all()
    assert "0/constant" not in constants


def test_equal_pairs_are_shared_and_others_are_not(tmp_path: Path) -> None:
    path = half_chain(tmp_path, normal(16, 16), normal(16, 16), normal(16, 16))
    model = ir.load(path)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    for node in products[1:]:
        node.replace_input_with(0, products[0].inputs[0])
    files.save(model, path)
    scales = {"0/MatMul": 0.5, "1/MatMul": 0.5, "2/MatMul": 0.25}
    mix = {name: Quantized(format="int8", scale=scale) for name, scale in scales.items()}
    quantize(path, tmp_path / "q.onnx", mix)
    pairs = [node for node in ir.load(tmp_path / "q.onnx").graph if node.op_type == "QuantizeLinear"]
    assert sorted(float(node.inputs[1].const_value.numpy()) for node in pairs) == [0.25, 0.5]


def test_linears_that_cannot_be_quantized_are_refused_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    golden_sample(tiny_bundle, "text").convert(tmp_path / "h.onnx")
    one = Quantized(format="int8", scale=0.1)
    graph = ir.load(tmp_path / "h.onnx").graph
    names = {linear.name for linear in find_linears(graph)} - {linear.name for linear in quantizable(graph)}
    assert names == {"projection/MatMul"}
    mix = dict.fromkeys(("projection/MatMul", "no/MatMul", "blocks.0.mlp.fc1/MatMul"), one)
    message = r"found: projection/MatMul is more than half precision can hold; no/MatMul is no linear of this graph\n"
    with pytest.raises(InputError, match=message):
        quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", mix)
    attention = {"no/Attention": QuantizedAttention(format="int8", query=1.0, key=1.0, value=1.0)}
    with pytest.raises(InputError, match="no/Attention is no Attention node in half here"):
        quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", {}, attention=attention)
    with pytest.raises(InputError, match="no 8-bit format 'int4'"):
        quantize(
            tmp_path / "h.onnx", tmp_path / "q.onnx", {"blocks.0.mlp.fc1/MatMul": Quantized(format="int4", scale=1.0)}
        )  # type: ignore[arg-type]
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1e-6, "scale 1e-06 is not between 6.1e-05, float16's smallest normal number"),
        (float("nan"), "scale nan is not between"),
        (520.0, "scale 520 dequantizes to more than 65504"),
    ],
)
def test_scales_of_activations_that_half_cannot_hold_are_refused(tmp_path: Path, scale: float, words: str) -> None:
    path = half_chain(tmp_path, normal(16, 16))
    with pytest.raises(InputError, match=re.escape(f"0/MatMul has an input whose {words}")):
        quantize(path, tmp_path / "q.onnx", {"0/MatMul": Quantized(format="int8", scale=scale)})


def test_scales_of_weights_that_half_cannot_hold_are_refused(tmp_path: Path) -> None:
    tiny, dead, huge = normal(64, 64) * 0.002, normal(64, 64), normal(64, 64)
    dead[:, :3] *= 1e-5
    huge[0] = 65504
    graph = ir.load(half_chain(tmp_path, tiny, dead, huge)).graph
    found = {
        format_: refusals(graph, {f"{index}/MatMul": Quantized(format=format_, scale=1.0) for index in range(3)})
        for format_ in EIGHT
    }
    # fp8 has exponents of its own, so it takes weights that are small beside the scale.
    assert {format_: list(reasons) for format_, reasons in found.items()} == {
        "int8": ["0/MatMul", "2/MatMul"],
        "fp8": ["2/MatMul"],
    }
    assert "has 64 of 64 outputs whose weights take int8 scales below 6.1e-05" in found["int8"]["0/MatMul"]
    assert "has weights that dequantize to more than 65504" in found["fp8"]["2/MatMul"]


def test_fp32_scales_hold_what_half_cannot(tmp_path: Path) -> None:
    """Scales below half's smallest normal number, of activations and of weights; types stay half around the product."""
    path = half_chain(tmp_path, normal(64, 64) * 0.002)
    quantize(path, tmp_path / "q.onnx", {"0/MatMul": Quantized(format="int8", scale=1e-6, wide=True)})
    graph = ir.load(tmp_path / "q.onnx").graph
    (product,) = (node for node in graph if node.name == "0/MatMul")
    for value in product.inputs:
        node = value.producer()
        assert node.op_type == "DequantizeLinear"
        assert (node.inputs[1].dtype, value.dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    with pytest.raises(InputError, match="float32's smallest normal number"):
        quantize(path, tmp_path / "q.onnx", {"0/MatMul": Quantized(format="int8", scale=1e-39, wide=True)})


def test_products_whose_sums_leave_half_before_their_scales_are_applied() -> None:
    """Outputs of up to 100 from weights of up to 0.1: 100 / (0.1 / 127) is 127,000, and half ends at 65,504."""
    weights = np.full((8, 4), 0.1, np.float32)
    half, format_ = HALF_TYPES["fp16"], find_format("int8")
    assert needs_wide(weights, 1e-6, np.full(4, 10.0), format_, half)  # the scale itself
    assert needs_wide(weights * 1e-4, 1.0, np.full(4, 10.0), format_, half)  # the scales of the weights
    assert not needs_wide(weights, 1.0, np.full(4, 10.0), format_, half)
    assert needs_wide(weights, 1.0, np.array([10.0, 10.0, 100.0, 10.0]), format_, half)
    assert needs_wide(weights, 1.0, np.array([10.0, np.nan, 10.0, 10.0]), format_, half)


def test_a_scale_is_rounded_once(tmp_path: Path) -> None:
    """By way of fp32 this one would end at 1: it lies just above the middle of two halves."""
    scale = 1 + 2.0**-11 + 2.0**-40
    half = HALF_TYPES["fp16"]
    assert float(hold_scale(scale, half)) == 1 + 2.0**-10
    path = half_chain(tmp_path, normal(64, 64))
    mix = {"0/MatMul": Quantized(format="int8", scale=scale)}
    quantize(path, tmp_path / "q.onnx", mix)
    switchable(path, tmp_path / "switches.onnx", mix)
    for name in ("q", "switches"):
        held = {float(value.const_value.numpy()) for value in scalars(ir.load(tmp_path / f"{name}.onnx").graph)}
        assert 1 + 2.0**-10 in held
        assert 1.0 not in held


def scalars(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.initializers.values() if value.const_value.size == 1 and "scale" in value.name]


def test_a_simulation_takes_no_zero_points(tmp_path: Path) -> None:
    path = half_chain(tmp_path, normal(64, 64))
    quantize(path, tmp_path / "q.onnx", {"0/MatMul": Quantized(format="int8", scale=0.1)})
    model = ir.load(tmp_path / "q.onnx")
    zero = next(value for name, value in model.graph.initializers.items() if name.endswith("zero_point"))
    zero.const_value = ir.Tensor(np.array(3, np.int8), name=zero.name)
    ir.save(model, tmp_path / "q.onnx")
    with pytest.raises(InputError, match=r"expected a zero point of 0 in .*, found another"):
        simulate(tmp_path / "q.onnx", tmp_path / "s.onnx")


def test_the_simulation_rounds_operands_where_a_gpu_does_not_and_that_is_all() -> None:
    """Whole numbers multiplied exactly and scaled once, as a GPU does, against operands rounded to half beforehand.

    Each rounding moves an operand by at most 2^-11 of itself, so a product moves by (1 + 2^-11)^2 - 1 of |a| |w|, and
    the result is rounded once more in both.
    """
    half, format_ = HALF_TYPES["fp16"], find_format("int8")
    rng = np.random.default_rng(0)
    inputs, weights = (
        rng.normal(size=(32, 256)).astype(np.float32),
        (rng.normal(size=(256, 64)) * 0.02).astype(np.float32),
    )
    scale = float(hold_scale(float(np.abs(inputs).max()) / 127, half))
    scales = weight_scales(weights, format_, half)
    whole, held = np.clip(np.rint(inputs / scale), -128, 127), hold_weights(weights, scales, format_)
    exact = (whole.astype(np.int64) @ held.astype(np.int64)) * (scale * scales.astype(np.float64))
    operands = half.round(whole * scale).astype(np.float64), dequantized(held, scales, half).astype(np.float64)
    simulated = operands[0] @ operands[1]
    bound = ((1 + 2.0**-11) ** 2 - 1) * (np.abs(whole * scale) @ np.abs(held * scales.astype(np.float64)))
    assert (np.abs(simulated - exact) <= bound).all()
    assert (
        1e-4 < np.linalg.norm(simulated - exact) / np.linalg.norm(exact) < 1e-3
    )  # what docs/quantization.md says of it


def test_the_same_input_gives_the_same_bytes_and_weights_go_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = half_chain(tmp_path, normal(64, 96), normal(96, 64))
    mix = {f"{index}/MatMul": Quantized(format="int8", scale=0.1) for index in range(2)}
    for name in ("a", "b"):
        quantize(path, tmp_path / f"{name}.onnx", mix)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 1000)
    quantize(path, tmp_path / "c.onnx", mix)
    assert (tmp_path / "c.onnx.data").stat().st_size >= 2 * 64 * 96
    for name in ("a", "c"):
        simulate(tmp_path / f"{name}.onnx", tmp_path / f"{name}s.onnx")
    found = [ir.load(tmp_path / f"{name}s.onnx").graph.initializers for name in ("a", "c")]
    for name, value in found[0].items():
        np.testing.assert_array_equal(value.const_value.numpy(), found[1][name].const_value.numpy())


@pytest.mark.parametrize("format_", EIGHT)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_switched_mix_gives_the_bits_of_its_own_simulation(
    tiny_bundle: Path, tmp_path: Path, tower: Tower, format_: FormatName
) -> None:
    sample = golden_sample(tiny_bundle, tower)
    ranges = half_graph(sample, tmp_path / "h.onnx", keep=("projection",))
    plain = mix_of(tmp_path / "h.onnx", ranges, format_)
    mix = {name: dataclasses.replace(each, wide=bool(index % 2)) for index, (name, each) in enumerate(plain.items())}
    attention = dict(list(attention_of(tmp_path / "h.onnx", ranges, format_).items())[:1])
    switchable(tmp_path / "h.onnx", tmp_path / "switches.onnx", mix, attention=attention)
    switched = Switched(tmp_path / "switches.onnx")
    assert switched.linears == tuple(mix)
    seen = []
    for on in ([], list(mix)[:1], list(mix)[1::2], list(mix)):
        some = {name: mix[name] for name in on}
        quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", some, attention=attention)
        simulate(tmp_path / "q.onnx", tmp_path / "s.onnx")
        found = [outputs["embedding"] for outputs in switched.run(sample.feeds, on)]
        for mine, feeds in zip(found, sample.feeds, strict=True):
            np.testing.assert_array_equal(mine, run(tmp_path / "s.onnx", feeds))
        seen.append(np.concatenate(found))
    assert not any(np.array_equal(seen[0], other) for other in seen[1:])
    with pytest.raises(InputError, match="that have a switch, found projection/MatMul"):
        switched.run(sample.feeds, ["projection/MatMul"])
    switched.close()


def run(path: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    from clip_export import backends

    return backends.open_engine("onnxruntime", path)(feeds)["embedding"]


@pytest.mark.parametrize("tower", TOWERS)
def test_int8_with_the_largest_input_as_limit_stays_near_the_fp32_tower(
    demo_bundle: Path, tmp_path: Path, tower: Tower
) -> None:
    sample = golden_sample(demo_bundle, tower)
    ranges = half_graph(sample, tmp_path / "h.onnx")
    quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", mix_of(tmp_path / "h.onnx", ranges, "int8"))
    assert 0.9 < agreement(tmp_path / "q.onnx", sample.graph, sample.feeds) < 0.99999


@pytest.mark.parametrize("format_", EIGHT)
@pytest.mark.parametrize("tower", TOWERS)
def test_attention_is_taken_apart_and_both_of_its_products_quantized(
    demo_bundle: Path, tmp_path: Path, tower: Tower, format_: FormatName
) -> None:
    sample = golden_sample(demo_bundle, tower)
    ranges = half_graph(sample, tmp_path / "h.onnx")
    attention = attention_of(tmp_path / "h.onnx", ranges, format_)
    first = next(iter(attention))
    quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", {}, attention={first: attention[first]})
    graph = ir.load(tmp_path / "q.onnx").graph
    assert {node.name for node in graph if node.op_type == "Attention"} == set(attention) - {first}
    pairs = [node for node in graph if node.op_type == "DequantizeLinear"]
    behind = Counter(reader.op_type for node in pairs for reader, _ in node.outputs[0].uses())
    assert behind == {"MatMul": 3, "Transpose": 1}  # the keys are transposed in 8 bits
    before = {str(node.inputs[0].name): node for node in graph if node.op_type == "QuantizeLinear"}
    softmax = next(node for node in graph if node.op_type == "Softmax")
    scale = before[str(softmax.outputs[0].name)].inputs[1].const_value.numpy()
    assert scale == np.float16(1 / FORMATS[format_].largest)
    found = agreement(tmp_path / "q.onnx", sample.graph, sample.feeds)
    simulate(tmp_path / "h.onnx", tmp_path / "s.onnx")
    half = [run(tmp_path / "s.onnx", feeds) for feeds in sample.feeds]
    exact = [run(sample.graph, feeds) for feeds in sample.feeds]
    assert 0.9 < found < min_cosine(np.concatenate(half), np.concatenate(exact))
    tiny = {first: dataclasses.replace(attention[first], query=1e-4)}  # times the scale of the scores
    with pytest.raises(InputError, match=f"found: {first} has an input whose scale .* is not between"):
        quantize(tmp_path / "h.onnx", tmp_path / "t.onnx", {}, attention=tiny)


def compile_layers(path: Path, capability: str) -> tuple[int, list[str]]:
    """Bytes of the plan that TensorRT-RTX makes, and what it says of each layer of it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: object, message: str) -> None:
            self.lines += message.splitlines()

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), parser.get_error(0)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *([8 if n < 0 else n for n in tensor.shape] for _ in range(3)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return plan.nbytes, [line for line in log.lines if "LayerType:" in line]


def products_in(layers: list[str], kind: str) -> int:
    """How many matrix products read tensors of `kind`."""
    products = [line for line in layers if "LayerType: gemm" in line]
    return sum(f"Datatype: {kind}" in line.split("Constants:")[0] for line in products)


BUILDS = [("int8", name) for name in ("SM75", "SM86", "SM89", "SM120")] + [("fp8", name) for name in ("SM89", "SM120")]


@pytest.mark.parametrize("tower", TOWERS)
def test_tensorrt_rtx_compiles_quantized_towers(demo_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    ranges = half_graph(golden_sample(demo_bundle, tower), tmp_path / "h.onnx", everything=True)
    for format_ in EIGHT:
        mix = mix_of(tmp_path / "h.onnx", ranges, format_)
        quantize(tmp_path / "h.onnx", tmp_path / f"{format_}.onnx", mix)
        attention = attention_of(tmp_path / "h.onnx", ranges, format_)
        quantize(tmp_path / "h.onnx", tmp_path / f"{format_}-attention.onnx", mix, attention=attention)
    for form, capability in BUILDS:
        for name in (form, f"{form}-attention"):
            assert rtx_builds(tmp_path / f"{name}.onnx", capability), (name, capability)
    assert not rtx_builds(tmp_path / "fp8.onnx", "SM86")  # it has no fp8


@pytest.mark.parametrize(("format_", "kind"), [("int8", "Int8"), ("fp8", "FP8")])
@pytest.mark.parametrize("tower", TOWERS)
def test_tensorrt_rtx_multiplies_every_linear_of_the_mix_in_8_bits(
    demo_bundle: Path, tmp_path: Path, tower: Tower, format_: FormatName, kind: str
) -> None:
    ranges = half_graph(golden_sample(demo_bundle, tower), tmp_path / "h.onnx", everything=True)
    mix = mix_of(tmp_path / "h.onnx", ranges, format_)
    quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", mix)
    _, layers = compile_layers(tmp_path / "q.onnx", "SM89")
    assert products_in(layers, kind) == len(mix)


def test_the_plan_shrinks_by_a_byte_for_every_weight(tmp_path: Path) -> None:
    path = half_chain(tmp_path, normal(1024, 4096), normal(4096, 1024))
    quantize(path, tmp_path / "q.onnx", {f"{i}/MatMul": Quantized(format="int8", scale=0.1) for i in range(2)})
    (half, layers), (quantized, quantized_layers) = (
        compile_layers(file, "SM86") for file in (path, tmp_path / "q.onnx")
    )
    assert products_in(layers, "Int8") == 0 and products_in(quantized_layers, "Int8") == 2
    saved = 2 * 1024 * 4096
    assert 0.9 * saved < half - quantized < 1.1 * saved
