"""The simulation rounds where half rounds: against torch in half, and where half overflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from precision_made import TOWERS, chain, golden_sample, naive
from torch import nn

from clip_export.bundle import Bundle
from clip_export.checkpoints import Options, read
from clip_export.graph.files import save
from clip_export.precision._nodes import make_node
from clip_export.precision.fits import HALF_TYPES, Precision
from clip_export.precision.formats import FORMATS, FormatName
from clip_export.precision.quantize import Quantized, QuantizedAttention, quantize
from clip_export.precision.refine import min_cosine
from clip_export.precision.simulate import rounded_to, simulate
from clip_export.spec import Tower
from clip_export.towers import make_tower


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(str(path)).run(None, feeds)[0])


def torch_half(checkpoint: Path, tower: Tower) -> nn.Module:
    """The tower in torch's half on the CPU, with what follows the blocks in fp32."""
    source = read(checkpoint, Options())
    module = make_tower(source.spec, tower, source.weights, ("embedding",)).half()
    last = module.final_norm if tower == "text" else module.post_norm
    assert isinstance(last, nn.Module) and isinstance(module.projection, nn.Module)
    last.float()
    module.projection.float()
    last.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    if tower == "image":
        assert isinstance(module.patch_embedding, nn.Module)
        module.patch_embedding.register_forward_pre_hook(lambda _, inputs: (inputs[0].half(),))
    return module


@pytest.mark.parametrize("tower", TOWERS)
def test_simulation_and_torch_half_differ_from_fp32_alike(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, tower: Tower
) -> None:
    sample = golden_sample(tiny_bundle, tower)
    sample.convert(tmp_path / "h.onnx")
    simulate(tmp_path / "h.onnx", tmp_path / "s.onnx")
    module = torch_half(tiny_checkpoint, tower)
    feeds = dict(sample.feeds[0])
    with torch.inference_mode():
        theirs = module(*(torch.from_numpy(array) for array in feeds.values()))[0].numpy()
    mine, exact = run(tmp_path / "s.onnx", feeds), run(sample.graph, feeds)
    assert min_cosine(mine, theirs) >= 0.9999
    ratio = np.linalg.norm(mine - exact) / np.linalg.norm(theirs - exact)
    assert 0.5 < ratio < 2.5, ratio
    assert np.abs(mine - exact).max() > 1e-5  # it does round


def test_overflow_shows(tmp_path: Path) -> None:
    """100 x 1000 x 0.001 is 100 in fp32 and, on ONNX Runtime's CPU, in a float16 graph; a half cannot hold 100,000."""
    source = chain(tmp_path / "g.onnx", ("Mul", 1000.0), ("Mul", 0.001), width=1)
    naive(source, tmp_path / "h.onnx")
    simulate(tmp_path / "h.onnx", tmp_path / "s.onnx")
    feeds = {"x": np.array([[100], [3]], dtype=np.int32)}
    x = torch.tensor([[100.0], [3.0]]).half()
    expected = (x * torch.tensor(1000.0).half() * torch.tensor(0.001).half()).float().numpy()
    assert np.isinf(expected[0, 0])
    np.testing.assert_array_equal(run(tmp_path / "s.onnx", feeds), expected)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_no_optimization_drops_a_rounding(tmp_path: Path, level: str) -> None:
    source = chain(tmp_path / "g.onnx", ("Mul", 0.1), ("Add", 2048.0), ("Sub", 2048.0), width=4)
    naive(source, tmp_path / "h.onnx")
    simulate(tmp_path / "h.onnx", tmp_path / "s.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    x = np.array([[1, 7, 12, 25]], dtype=np.int32)
    found = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"), options).run(None, {"x": x})[0]
    half = torch.from_numpy(x).half() * torch.tensor(0.1).half()
    np.testing.assert_array_equal(found, (half + 2048 - 2048).float().numpy())


@contextmanager
def _casting(path: Path, precision: Precision) -> Iterator[onnxruntime.InferenceSession]:
    """x float32 -> half -> float32, as the simulation writes it."""
    value = ir.Value(name="x", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.FLOAT))
    half = ir.DataType[HALF_TYPES[precision].name.upper()]
    down = ir.node("Cast", [value], attributes={"to": int(half)})
    up = ir.node("Cast", [down.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
    up.outputs[0].name, up.outputs[0].dtype, up.outputs[0].shape = "y", ir.DataType.FLOAT, value.shape
    graph = ir.Graph([value], [up.outputs[0]], nodes=[down, up], opset_imports={"": 23}, name="casts")
    ir.save(ir.Model(graph, ir_version=10), path)
    yield onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_engines_casts_round_to_nearest_even(
    tmp_path_factory: pytest.TempPathFactory, precision: Precision
) -> None:
    with _casting(tmp_path_factory.mktemp("casts") / "c.onnx", precision) as session:

        @given(arrays.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False)))
        def check(values: np.ndarray) -> None:
            expected = HALF_TYPES[precision].round(values).astype(np.float32)
            np.testing.assert_array_equal(session.run(None, {"x": values})[0], expected)

        check()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_half_tensor_is_rounded_and_every_weight(
    tiny_bundle: Path, tmp_path: Path, tower: Tower, precision: Precision
) -> None:
    golden_sample(tiny_bundle, tower).convert(tmp_path / "h.onnx", precision)
    simulate(tmp_path / "h.onnx", tmp_path / "s.onnx")
    half, graph = ir.load(tmp_path / "h.onnx").graph, ir.load(tmp_path / "s.onnx").graph
    kind = ir.DataType[HALF_TYPES[precision].name.upper()]
    rounded = {node.inputs[0].name for node in graph if node.op_type == "Cast" and node.outputs[0].dtype == kind}
    computed = ("MatMul", "Conv", "Add", "Mul", "Sigmoid", "Sub", "Div", "Attention")
    wanted = {node.outputs[0].name for node in half if node.outputs[0].dtype == kind and node.op_type in computed}
    assert wanted <= rounded
    attention = [node for node in graph if node.op_type == "Softmax"]
    assert len(attention) == 2 and {node.outputs[0].name for node in attention} <= rounded
    for name, value in half.initializers.items():
        mine = graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(mine, value.const_value.numpy().astype(mine.dtype))
    assert not [v for v in graph.initializers.values() if v.dtype == kind]


def test_simulation_of_a_bundle_keeps_inputs_and_outputs(tiny_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(tiny_bundle, "text")
    sample.convert(tmp_path / "h.onnx")
    simulate(tmp_path / "h.onnx", tmp_path / "s.onnx")
    source = ir.load(Bundle.open(tiny_bundle).graph_path("text")).graph
    graph = ir.load(tmp_path / "s.onnx").graph
    for mine, theirs in ((graph.inputs, source.inputs), (graph.outputs, source.outputs)):
        assert [(v.name, v.dtype, v.shape) for v in mine] == [(v.name, v.dtype, v.shape) for v in theirs]


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")
EIGHT: tuple[FormatName, ...] = ("int8", "fp8")


def run_at(level: str, path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return np.asarray(onnxruntime.InferenceSession(str(path), options).run(None, feeds)[0])


def held(array: np.ndarray, scale: np.ndarray, format_: FormatName) -> np.ndarray:
    """`array` in half through QuantizeLinear and DequantizeLinear: divided in fp32, given back in half. By hand."""
    over = array.astype(np.float32) / scale.astype(np.float32)
    if format_ == "int8":
        numbers = np.clip(np.rint(over), -128, 127)
    else:
        numbers = np.clip(over, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (numbers * scale.astype(np.float32)).astype(np.float16)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format_", EIGHT)
def test_one_quantized_linear_is_what_its_definition_says(tmp_path: Path, format_: FormatName, level: str) -> None:
    random = np.random.default_rng(7)
    weights = random.normal(0, 0.05, (192, 64)).astype(np.float32)
    x = random.integers(-300, 300, (32, 192)).astype(np.int32)  # some beyond the limit
    limit, largest = 200.0, FORMATS[format_].largest
    naive(chain(tmp_path / "g.onnx", ("MatMul", weights), width=192), tmp_path / "h.onnx")
    quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", {"0/MatMul": Quantized(format=format_, scale=limit / largest)})
    simulate(tmp_path / "q.onnx", tmp_path / "s.onnx")
    found = run_at(level, tmp_path / "s.onnx", {"x": x})

    half = weights.astype(np.float16)
    scales = (np.abs(half).max(axis=0).astype(np.float32) / np.float32(largest)).astype(np.float16)
    rows = held(x.astype(np.float16), np.array(limit / largest).astype(np.float16), format_).astype(np.float64)
    columns = held(half, scales, format_).astype(np.float64)
    exact = rows @ columns
    assert np.abs(rows).max() < 1.2 * limit < np.abs(x).max()
    # One rounding to half, and sums of 192 products in fp32.
    allowed = 2.0**-11 * np.abs(exact) + 192 * 2.0**-24 * (np.abs(rows) @ np.abs(columns))
    assert (np.abs(found - exact) <= allowed).all()
    assert (np.abs(found - x @ weights) > allowed).any()  # it does quantize


@pytest.mark.parametrize("format_", EIGHT)
def test_the_reference_evaluator_gives_the_same(tmp_path: Path, format_: FormatName) -> None:
    random = np.random.default_rng(11)
    first, second = (random.normal(0, 0.1, shape).astype(np.float32) for shape in ((48, 96), (96, 32)))
    steps = (("MatMul", first), ("Add", 0.25), ("Mul", 0.5), ("MatMul", second))
    naive(chain(tmp_path / "g.onnx", *steps, width=48), tmp_path / "h.onnx")
    mix = {"0/MatMul": Quantized(format=format_, scale=0.07), "3/MatMul": Quantized(format=format_, scale=0.02)}
    quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", mix)
    simulate(tmp_path / "q.onnx", tmp_path / "s.onnx")
    feeds = {"x": random.integers(-9, 9, (16, 48)).astype(np.int32)}
    (expected,) = ReferenceEvaluator(onnx.load(tmp_path / "q.onnx")).run(None, feeds)
    found = run(tmp_path / "s.onnx", feeds)
    assert np.linalg.norm(found - expected) < 2.0**-10 * np.linalg.norm(expected)


def attention_graph(path: Path, *, causal: bool) -> None:
    """q, k and v, int32 [batch, 2, sequence, 16] -> Cast to half -> Attention -> `y` float32."""
    half, shape = ir.DataType.FLOAT16, ir.Shape(["batch", 2, "sequence", 16])
    inputs = [ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT32)) for name in "qkv"]
    casts = [make_node("Cast", [value], f"{value.name}/half", dtype=half, to=int(half)) for value in inputs]
    operands = [node.outputs[0] for node in casts]
    attention = make_node("Attention", operands, "a/Attention", is_causal=int(causal), scale=0.05)
    last = make_node("Cast", [attention.outputs[0]], "y", dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    nodes = [*casts, attention, last]
    graph = ir.Graph(inputs, [last.outputs[0]], nodes=nodes, opset_imports={"": 23}, name="attention")
    save(ir.Model(graph, ir_version=10), path)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format_", EIGHT)
def test_quantized_attention_is_what_the_reference_evaluator_gives(
    tmp_path: Path, format_: FormatName, causal: bool
) -> None:
    attention_graph(tmp_path / "h.onnx", causal=causal)
    scale = 12.3 / FORMATS[format_].largest
    scales = QuantizedAttention(format=format_, query=scale, key=scale, value=scale)
    quantize(tmp_path / "h.onnx", tmp_path / "q.onnx", {}, attention={"a/Attention": scales})
    simulate(tmp_path / "q.onnx", tmp_path / "s.onnx")
    simulate(tmp_path / "h.onnx", tmp_path / "plain.onnx")
    random = np.random.default_rng(3)
    feeds = {name: random.integers(-12, 13, (2, 2, 19, 16)).astype(np.int32) for name in "qkv"}
    with np.errstate(over="ignore"):  # its softmax takes the largest score from the mask's -65504, in half
        (expected,) = ReferenceEvaluator(onnx.load(tmp_path / "q.onnx")).run(None, feeds)
    mine, plain = run(tmp_path / "s.onnx", feeds), run(tmp_path / "plain.onnx", feeds)
    size = np.linalg.norm(plain)
    # A probability that half rounds otherwise may go to the next number of 8 bits.
    assert np.linalg.norm(mine - expected) < 0.002 * size < np.linalg.norm(mine - plain) < 0.1 * size


@pytest.fixture(scope="module", params=EIGHT)
def holding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x float32 -> what `rounded_to` makes of it at a scale of 1."""
    value, scale = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in (("x", [None]), ("scale", []))
    )
    graph = ir.Graph([value, scale], [], nodes=[], opset_imports={"": 23}, name="held")
    for node in rounded_to(graph, value, scale, FORMATS[request.param], "y"):
        graph.append(node)
    graph.outputs.append(node.outputs[0])
    path = tmp_path_factory.mktemp("held") / f"{request.param}.onnx"
    save(ir.Model(graph, ir_version=10), path)
    return path


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_are_held_as_the_format_holds_them(holding: Path, level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(holding), options)
    format_ = next(format_ for name, format_ in FORMATS.items() if name == holding.stem)
    ties = np.arange(-260, 260, dtype=np.float32) / 2
    small = np.arange(-64, 64, dtype=np.float32) * np.float32(2**-12)  # around fp8's smallest numbers

    @given(arrays.arrays(np.float32, 16, elements=st.floats(-1000, 1000, width=32)))
    def check(values: np.ndarray) -> None:
        array = np.concatenate([values, ties, small])
        found = session.run(None, {"x": array, "scale": np.array(1, np.float32)})[0]
        np.testing.assert_array_equal(found, format_.round(array))

    check()
