"""The int8 graph for CPUs: fused to integer kernels, and exact on CPUs that add products in 16 bits.

What it computes is known twice: from numpy, and from the same graph with optimizations off, where QuantizeLinear and
DequantizeLinear run as written and the MatMul in fp32.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays
from precision_made import KEEP, TOWERS, Sample, chain, golden_sample

from clip_export import backends
from clip_export.errors import InputError
from clip_export.precision.cpu import pair_safe_scales, quantize_for_cpu
from clip_export.precision.formats import FORMATS
from clip_export.precision.linears import find_linears, find_weights, in_scopes
from clip_export.precision.ranges import Feeds, measure
from clip_export.spec import Tower

INT8 = FORMATS["int8"]


@pytest.fixture(scope="module", params=TOWERS)
def sample(demo_bundle: Path, request: pytest.FixtureRequest) -> Sample:
    tower: Tower = request.param
    return golden_sample(demo_bundle, tower)


@pytest.fixture(scope="module")
def scales(sample: Sample) -> dict[str, float]:
    """The scale of every linear layer of the blocks: the largest value it reads is 127 steps."""
    ranges = measure(sample.graph, sample.feeds)
    linears = find_linears(ir.load(sample.graph).graph, keep=KEEP)
    return {linear.name: ranges.largest(linear.source) / INT8.largest for linear in linears}


def as_written(path: Path, feeds: Feeds) -> np.ndarray:
    """The first output with no kernel fused: fake quantization, in fp32."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return first(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), feeds)


def on_engine(path: Path, feeds: Feeds) -> np.ndarray:
    """The first output of the engine that bundles run on."""
    return next(iter(backends.open_engine("onnxruntime", path)(feeds).values()))


def first(session: Any, feeds: Feeds) -> np.ndarray:
    output: np.ndarray = session.run(None, dict(feeds))[0]
    return output


def optimized(path: Path, target: Path) -> Counter[str]:
    """How many nodes of each operator ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that such a file is for this machine
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(target).graph)


def distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Between the rows of both, each divided by its length."""
    unit = [array.astype(np.float64) / np.linalg.norm(array, axis=-1, keepdims=True) for array in (found, expected)]
    return np.asarray(np.linalg.norm(unit[0] - unit[1], axis=-1))


def test_every_linear_becomes_an_integer_kernel(sample: Sample, scales: dict[str, float], tmp_path: Path) -> None:
    quantize_for_cpu(sample.graph, tmp_path / "int8.onnx", scales)
    plain = optimized(sample.graph, tmp_path / "plain.onnx")
    found = optimized(tmp_path / "int8.onnx", tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] == len(scales) > 0
    assert found["DequantizeLinear"] == 0
    assert sum(found[name] for name in ("MatMul", "Gemm", "FusedMatMul")) == sum(
        plain[name] for name in ("MatMul", "Gemm", "FusedMatMul")
    ) - len(scales)


def test_each_linear_alone_is_what_fake_quantization_gives(
    sample: Sample, scales: dict[str, float], tmp_path: Path
) -> None:
    # One at a time: a rounding that falls to the other side in one layer makes others fall in the next.
    feeds = sample.feeds[0]
    plain = on_engine(sample.graph, feeds)
    for name, scale in scales.items():
        quantize_for_cpu(sample.graph, tmp_path / "int8.onnx", {name: scale})
        found, expected = on_engine(tmp_path / "int8.onnx", feeds), as_written(tmp_path / "int8.onnx", feeds)
        assert np.median(distances(found, expected)) < 0.2 * np.median(distances(expected, plain)), name


def test_all_together_are_no_further_from_fake_quantization_than_it_is_from_fp32(
    sample: Sample, scales: dict[str, float], tmp_path: Path
) -> None:
    quantize_for_cpu(sample.graph, tmp_path / "int8.onnx", scales)
    for feeds in sample.feeds:
        found, expected = on_engine(tmp_path / "int8.onnx", feeds), as_written(tmp_path / "int8.onnx", feeds)
        error = distances(expected, on_engine(sample.graph, feeds))
        assert distances(found, expected).mean() < error.mean()


def saturating(inputs: int, outputs: int) -> np.ndarray:
    """Weights [inputs, outputs], nearly all of one sign and as large as the largest."""
    generator = np.random.default_rng(0)
    signs = generator.choice([-1, 1, 1, 1], size=(inputs, outputs)) * generator.choice([-1, 1], size=outputs)
    return (signs * generator.uniform(0.8, 1, outputs)).astype(np.float32)


@pytest.mark.parametrize("inputs", [64, 511])
@pytest.mark.parametrize("batch", [1, 9])  # one row takes a kernel of its own
def test_sums_do_not_saturate(tmp_path: Path, inputs: int, batch: int) -> None:
    weights = saturating(inputs, 48)
    chain(tmp_path / "g.onnx", ("MatMul", weights), width=inputs)
    quantize_for_cpu(tmp_path / "g.onnx", tmp_path / "int8.onnx", {"0/MatMul": 2.0})
    assert optimized(tmp_path / "int8.onnx", tmp_path / "optimized.onnx")["MatMulIntegerToFloat"] == 1
    x = np.random.default_rng(1).integers(150, 300, (batch, inputs), dtype=np.int32)  # 254 is where 8 bits end
    steps = pair_safe_scales(weights)
    expected = INT8.quantize(x.astype(np.float32), 2.0).astype(np.float64) @ INT8.quantize(weights, steps)
    np.testing.assert_allclose(on_engine(tmp_path / "int8.onnx", {"x": x}), expected, rtol=1e-5)


def in_16_bits(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`activations` uint8 [inputs] times `weights` int8 [inputs, outputs] as a CPU without VNNI sums them up."""
    products = activations.astype(np.int64)[:, None] * weights
    products = np.concatenate([products, np.zeros((len(products) % 2, products.shape[1]), np.int64)])
    pairs = products.reshape(-1, 2, products.shape[1]).sum(axis=1)
    return np.asarray(np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=0))


def worst(weights: np.ndarray) -> list[np.ndarray]:
    """For one output of `weights` int8 [inputs]: the activations that sum up the most, and the least."""
    return [np.where(weights > 0, 255, 0), np.where(weights < 0, 255, 0)]


def saturates(weights: np.ndarray, scales: np.ndarray) -> bool:
    held = np.rint(weights / scales)
    assert np.abs(held).max(initial=0) <= 128
    return any(
        bool(in_16_bits(activations, column[:, None]) != (activations * column).sum())
        for column in held.astype(np.int64).T
        for activations in worst(column)
    )


def test_full_range_saturates_on_cpus_without_vnni() -> None:
    weights = saturating(64, 8)
    assert saturates(weights, INT8.weight_scales(weights))
    assert not saturates(weights, pair_safe_scales(weights))


WEIGHTS = arrays(
    np.float32,
    strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 4)),
    elements=strategies.floats(-4, 4, width=32, allow_subnormal=False),
)


@given(WEIGHTS)
def test_no_weights_saturate(weights: np.ndarray) -> None:
    scales = pair_safe_scales(weights)
    assert np.abs(np.rint(weights / scales)).max() <= 127
    assert not saturates(weights, scales)
    plain = INT8.weight_scales(weights)
    assert np.all(scales >= plain * (1 - 1e-6)) and np.all((scales <= 2 * plain * (1 + 1e-6)) | (plain == 1))


def test_what_reads_one_tensor_shares_its_quantization(sample: Sample, tmp_path: Path) -> None:
    model = ir.load(sample.graph)
    linear = find_linears(model.graph, keep=KEEP)[0]
    array = find_weights(model.graph, linear)
    quantize_for_cpu(sample.graph, tmp_path / "int8.onnx", {linear.name: 0.5})
    graph = ir.load(tmp_path / "int8.onnx").graph
    assert linear.weight not in graph.initializers
    held = graph.initializers[f"{linear.weight}/int8"].const_value
    assert held is not None and held.dtype == ir.DataType.INT8
    step = pair_safe_scales(array)
    np.testing.assert_allclose(held.numpy() * step, array, atol=0.501 * step.max())
    assert Counter(node.op_type for node in graph)["QuantizeLinear"] == 1


def test_the_same_graph_gives_the_same_bytes(sample: Sample, scales: dict[str, float], tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_for_cpu(sample.graph, tmp_path / name, scales)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(not in_scopes(name, KEEP) for name in scales)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-60])
def test_a_scale_has_to_be_a_positive_number(sample: Sample, tmp_path: Path, scale: float) -> None:
    name = find_linears(ir.load(sample.graph).graph)[0].name
    with pytest.raises(InputError, match="expected a positive scale for the input of"):
        quantize_for_cpu(sample.graph, tmp_path / "int8.onnx", {name: scale})
    assert not (tmp_path / "int8.onnx").exists()


def test_a_name_has_to_be_a_linear(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected names of linear layers, found nothing/MatMul"):
        quantize_for_cpu(sample.graph, tmp_path / "int8.onnx", {"nothing/MatMul": 1.0})
