"""Graphs and feeds for the precision passes: towers of bundles, full-size towers, and graphs of one idea."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from specs_made import random_weights, tiny_spec

from clip_export.bundle import Bundle
from clip_export.graph.export import GraphShape, example_feeds, export
from clip_export.graph.files import save
from clip_export.precision._casts import write_types
from clip_export.precision._operators import is_float
from clip_export.precision.fits import HALF_TYPES
from clip_export.precision.half import HalfReport, convert
from clip_export.precision.ranges import Feeds, measure
from clip_export.spec import ImageSpec, ModelSpec, TextSpec, Tower, TransformerSpec
from clip_export.towers import make_tower

KEEP = ("final_norm", "post_norm", "projection")
TOWERS: tuple[Tower, ...] = ("text", "image")


@dataclass(frozen=True)
class Sample:
    """An fp32 graph and inputs for it, in batches."""

    graph: Path
    feeds: tuple[Feeds, ...]

    def convert(self, target: Path, precision: str = "fp16", **options: Any) -> HalfReport:
        """Measure and convert, with what follows the blocks in fp32."""
        options = {"keep": KEEP} | options
        return convert(self.graph, target, precision=precision, ranges=measure(self.graph, self.feeds), **options)


def golden_sample(bundle: Path, tower: Tower) -> Sample:
    """A tower of a bundle with its golden inputs, eight at a time."""
    opened = Bundle.open(bundle)
    golden = opened.golden()
    if tower == "text":
        assert golden.text is not None
        feeds: Feeds = {"input_ids": golden.text.input_ids, "eot_index": golden.text.eot_index}
    else:
        assert golden.image is not None
        feeds = {"pixels": golden.image.pixels}
    count = len(next(iter(feeds.values())))
    batches = ({name: array[i : i + 8] for name, array in feeds.items()} for i in range(0, count, 8))
    return Sample(opened.graph_path(tower), tuple(batches))


# text width, layers, heads; image the same; image size, patch size, embedding_dim
SIZES = {
    "vit-b-32": ((512, 12, 8), (768, 12, 12), (224, 32), 512),
    "vit-l-14": ((768, 12, 12), (1024, 24, 16), (224, 14), 768),
}


def full_size(name: str, tower: Tower, directory: Path) -> Sample:
    """A tower of a real architecture with random weights, and a few random inputs."""
    text, image, (size, patch), dim = SIZES[name]
    tiny = tiny_spec()
    assert tiny.tokenizer is not None and tiny.preprocess is not None
    spec = ModelSpec(
        text=TextSpec(transformer=_transformer(*text), vocab_size=49408, context_length=77, embedding_dim=dim),
        image=ImageSpec(transformer=_transformer(*image), image_size=size, patch_size=patch, embedding_dim=dim),
        tokenizer=dataclasses.replace(tiny.tokenizer, context_length=77),
        preprocess=dataclasses.replace(tiny.preprocess, resize_size=size, crop_size=size),
        logit_scale=tiny.logit_scale,
    ).select([tower])
    layers = text[1] if tower == "text" else image[1]
    shape = GraphShape(
        tower=tower,
        input=(77,) if tower == "text" else (3, size, size),
        layers=layers,
        outputs=("embedding",),
        sequence_dynamic=tower == "text",
    )
    path = directory / f"{tower}.onnx"
    export(make_tower(spec, tower, random_weights(spec), ("embedding",)), shape, path)
    feeds = example_feeds(shape, batch=4)
    if tower == "text":
        feeds["eot_index"] = np.array([3, 10, 40, 76], dtype=np.int32)
    return Sample(path, (feeds,))


def _transformer(width: int, layers: int, heads: int) -> TransformerSpec:
    return TransformerSpec(width=width, layers=layers, heads=heads, mlp_width=4 * width, activation="quick_gelu")


def naive(source: Path, target: Path) -> None:
    """Every node in half but LayerNormalization, whatever it holds: what a converter without ranges does."""
    model = ir.load(source)
    floats = [node for node in model.graph if any(is_float(value) for value in node.outputs)]
    write_types(model, HALF_TYPES["fp16"], {str(node.name) for node in floats if node.op_type != "LayerNormalization"})
    save(model, target)


def chain(path: Path, *steps: tuple[str, np.ndarray | float], width: int = 8) -> Path:
    """The graph `x` int32 [batch, width] -> Cast -> steps (operator, constant) -> `y`; nodes are `0/Mul`, `1/Add`, …"""
    value = ir.Value(name="x", shape=ir.Shape(["batch", width]), type=ir.TensorType(ir.DataType.INT32))
    inputs, nodes, constants = [value], [], []
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name="Cast")
    nodes.append(node)
    value = _typed(node.outputs[0], "Cast", ["batch", width])
    for index, (operator, constant) in enumerate(steps):
        array = np.asarray(constant, dtype=np.float32)
        tensor = ir.Tensor(array, name=f"{index}/constant")
        weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        constants.append(weight)
        operands = [value, weight]
        if operator == "LayerNormalization":
            node = ir.node(operator, operands, attributes={"axis": -1}, name=f"{index}/{operator}")
        else:
            node = ir.node(operator, operands, name=f"{index}/{operator}")
        nodes.append(node)
        width = array.shape[1] if operator == "MatMul" else width
        value = _typed(node.outputs[0], f"{index}/{operator}", ["batch", width])
    value.name = "y"
    graph = ir.Graph(inputs, [value], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="chain")
    save(ir.Model(graph, ir_version=10), path)
    return path


def _typed(value: ir.Value, name: str, shape: list[int | str]) -> ir.Value:
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
    return value


@cache
def _rtx() -> tuple[Any, Any]:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    return trt, trt.Logger(trt.Logger.ERROR)


def rtx_builds(path: Path, capability: str) -> bool:
    """Whether TensorRT-RTX compiles the graph for `capability` ("SM86"), strongly typed, without TF32."""
    trt, logger = _rtx()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = [(1, 4, 8) if axis == 0 else (2, 8, 16) for axis in range(len(tensor.shape))]
        shapes = [[s[which] if n < 0 else n for s, n in zip(sizes, tensor.shape, strict=True)] for which in range(3)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None
