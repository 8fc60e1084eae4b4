"""The simulation rounds where half rounds: against torch in half, and where half overflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision_made import TOWERS, chain, golden_sample, naive
from torch import nn

from clip_export.bundle import Bundle
from clip_export.checkpoints import Options, read
from clip_export.precision.fits import HALF_TYPES, Precision
from clip_export.precision.refine import min_cosine
from clip_export.precision.simulate import simulate
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
