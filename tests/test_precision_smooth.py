"""Smoothing changes what linear layers read and nothing of what a graph computes; what cannot be folded is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hardened import harden
from precision_made import TOWERS, Sample, chain, golden_sample
from specs_made import random_weights, tiny_spec

import clip_export
from clip_export.bundle import Bundle
from clip_export.errors import InputError
from clip_export.graph.export import GraphShape, example_feeds, export
from clip_export.graph.files import save
from clip_export.precision.linears import find_linears
from clip_export.precision.smooth import foldable, smooth
from clip_export.spec import Tower
from clip_export.towers import make_tower

BLOCK = ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")


def names(model: ir.Model) -> list[str]:
    return [linear.name for linear in find_linears(model.graph)]


def random_divisors(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Divisors from 1/8 to 8 for every linear layer that takes them."""
    model, rng = ir.load(path), np.random.default_rng(seed)
    sizes = {linear.name: linear.inputs for linear in find_linears(model.graph)}
    return {name: np.exp2(rng.uniform(-3, 3, sizes[name])).astype(np.float32) for name in foldable(model, sizes)}


def values(path: Path, tensors: list[str], feeds: Mapping[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    """What `tensors` of the graph hold, by name."""
    model = ir.load(path)
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    wanted = [name for name in dict.fromkeys(tensors) if not made[name].is_graph_output()]
    model.graph.outputs.extend(made[name] for name in wanted)
    ir.save(model, directory / "probed.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(directory / "probed.onnx"), options)
    return dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))


def run(path: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(str(path)).run(None, dict(feeds))[0])


def require_same(path: Path, smoothed: Path, sample: Sample) -> None:
    """Rows of the output, over their length, differ by fp32 rounding."""
    for feeds in sample.feeds:
        expected, found = (run(graph, feeds) for graph in (path, smoothed))
        length = np.linalg.norm(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(found / length, expected / length, rtol=0, atol=3e-6)


def require_divided(path: Path, smoothed: Path, sample: Sample, divisors: Mapping[str, np.ndarray], tmp: Path) -> None:
    """Every input is what it was over its divisor, channel by channel."""
    sources = {linear.name: linear.source for linear in find_linears(ir.load(path).graph) if linear.name in divisors}
    before, after = (values(graph, list(sources.values()), sample.feeds[0], tmp) for graph in (path, smoothed))
    for name, source in sources.items():
        size = np.abs(before[source]).max()
        np.testing.assert_allclose(after[source] * divisors[name], before[source], rtol=1e-4, atol=1e-5 * size)


@pytest.fixture(scope="module")
def gelu(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """An image tower with the exact GELU."""
    spec = tiny_spec(activation="gelu")
    shape = GraphShape(tower="image", input=(3, 32, 32), layers=2, outputs=("embedding",), sequence_dynamic=False)
    path = tmp_path_factory.mktemp("gelu") / "image.onnx"
    export(make_tower(spec, "image", random_weights(spec), ("embedding",)), shape, path)
    return Sample(path, (example_feeds(shape, batch=3),))


@pytest.mark.parametrize("tower", TOWERS)
def test_every_layer_of_every_block_is_foldable(demo_bundle: Path, tower: Tower) -> None:
    """The text tower has one head, so that nothing but the pattern tells attention from a reshape."""
    model = ir.load(Bundle.open(demo_bundle).graph_path(tower))
    folds = foldable(model, names(model))
    expected = [f"blocks.{block}.{layer}/MatMul" for block in range(4) for layer in BLOCK]
    assert list(folds) == [*expected, "projection/MatMul"]
    kinds = [folds[name].kind for name in expected]
    assert kinds == ["normalization", "values", "normalization", "activation"] * 4


@pytest.mark.parametrize("tower", TOWERS)
def test_the_function_stays_and_the_inputs_are_divided(demo_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    sample = golden_sample(demo_bundle, tower)
    divisors = random_divisors(sample.graph)
    smooth(sample.graph, tmp_path / "s.onnx", divisors)
    require_same(sample.graph, tmp_path / "s.onnx", sample)
    require_divided(sample.graph, tmp_path / "s.onnx", sample, divisors, tmp_path)
    before, after = (ir.load(path).graph for path in (sample.graph, tmp_path / "s.onnx"))
    assert [(node.name, node.op_type) for node in after] == [(node.name, node.op_type) for node in before]


def test_an_exact_gelu_keeps_fc2_as_it_is(gelu: Sample, tmp_path: Path) -> None:
    model = ir.load(gelu.graph)
    fixed = set(names(model)) - set(foldable(model, names(model)))
    assert fixed == {"blocks.0.mlp.fc2/MatMul", "blocks.1.mlp.fc2/MatMul"}
    divisors = random_divisors(gelu.graph)
    smooth(gelu.graph, tmp_path / "s.onnx", divisors)
    require_same(gelu.graph, tmp_path / "s.onnx", gelu)
    require_divided(gelu.graph, tmp_path / "s.onnx", gelu, divisors, tmp_path)
    with pytest.raises(InputError, match=r"can be divided, found those of blocks\.0\.mlp\.fc2/MatMul"):
        smooth(gelu.graph, tmp_path / "no.onnx", {"blocks.0.mlp.fc2/MatMul": np.ones(256)})
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize("tower", TOWERS)
def test_one_layer_alone_changes_nothing_that_is_shared(demo_bundle: Path, tmp_path: Path, tower: Tower) -> None:
    """The 1.702 of QuickGELU is stored once for all blocks: block 1 gets a copy, the others read what they did."""
    sample, name = golden_sample(demo_bundle, tower), "blocks.1.mlp.fc2/MatMul"
    divisors = {name: random_divisors(sample.graph)[name]}
    smooth(sample.graph, tmp_path / "s.onnx", divisors)
    require_same(sample.graph, tmp_path / "s.onnx", sample)
    before, after = (ir.load(path).graph for path in (sample.graph, tmp_path / "s.onnx"))
    changed = {f"blocks.1.mlp.{constant}" for constant in ("fc1.weight", "fc1.bias", "fc2.weight")}
    made = set(after.initializers) - set(before.initializers)
    assert made == {"blocks.1.mlp.activation/Mul/1/smoothed"}
    for key, value in before.initializers.items():
        assert value.const_value is not None
        same = np.array_equal(after.initializers[key].const_value.numpy(), value.const_value.numpy())
        assert same == (key not in changed), key


def test_no_divisors_no_change_and_the_same_bytes(demo_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(demo_bundle, "text")
    divisors = random_divisors(sample.graph)
    smooth(sample.graph, tmp_path / "a.onnx", divisors)
    smooth(sample.graph, tmp_path / "b.onnx", dict(reversed(divisors.items())))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    smooth(sample.graph, tmp_path / "c.onnx", {})
    np.testing.assert_array_equal(run(tmp_path / "c.onnx", sample.feeds[0]), run(sample.graph, sample.feeds[0]))


# ---------------------------------------------------------------- graphs of one idea


def relu_graph(path: Path) -> Path:
    """x -> MatMul -> Add -> Relu -> MatMul, with weights and bias that matter."""
    rng = np.random.default_rng(0)
    chain(
        path,
        ("MatMul", rng.standard_normal((8, 16))),
        ("Add", rng.standard_normal(16)),
        ("MatMul", rng.standard_normal((16, 4))),
    )
    model = ir.load(path)
    added = next(node for node in model.graph if node.op_type == "Add")
    relu = ir.node("Relu", [added.outputs[0]], name="Relu")
    relu.outputs[0].name, relu.outputs[0].type = "Relu", added.outputs[0].type
    relu.outputs[0].shape = added.outputs[0].shape
    last = next(node for node in model.graph if node.name == "2/MatMul")
    last.replace_input_with(0, relu.outputs[0])
    model.graph.insert_after(added, relu)
    save(model, path)
    return path


def normalized_graph(path: Path, *, then: str | None = None) -> Path:
    """x -> LayerNormalization -> MatMul, and, where `then` names an operator, a second reader of the norm."""
    rng = np.random.default_rng(0)
    chain(path, ("LayerNormalization", rng.standard_normal(8)), ("MatMul", rng.standard_normal((8, 8))))
    if then is None:
        return path
    model = ir.load(path)
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    inputs = [norm.outputs[0], model.graph.initializers["1/constant"]] if then == "MatMul" else [norm.outputs[0]]
    second = ir.node(then, inputs, name="second")
    second.outputs[0].name, second.outputs[0].type = "second", norm.outputs[0].type
    second.outputs[0].shape = norm.outputs[0].shape
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    save(model, path)
    return path


def test_relu_takes_a_divisor(tmp_path: Path) -> None:
    path = relu_graph(tmp_path / "g.onnx")
    x = np.random.default_rng(1).integers(-9, 9, (5, 8)).astype(np.int32)
    sample, divisors = Sample(path, ({"x": x},)), random_divisors(path)
    assert list(divisors) == ["2/MatMul"]
    smooth(path, tmp_path / "s.onnx", divisors)
    require_same(path, tmp_path / "s.onnx", sample)
    require_divided(path, tmp_path / "s.onnx", sample, divisors, tmp_path)
    assert run(path, {"x": x}).any()


def test_a_norm_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    assert list(random_divisors(normalized_graph(tmp_path / "alone.onnx"))) == ["1/MatMul"]
    for operator in ("Sigmoid", "MatMul"):
        path = normalized_graph(tmp_path / f"{operator}.onnx", then=operator)
        assert not foldable(ir.load(path), names(ir.load(path)))


def test_a_norm_that_is_an_output_is_left_alone(tmp_path: Path) -> None:
    model = ir.load(normalized_graph(tmp_path / "g.onnx"))
    model.graph.outputs.append(next(n for n in model.graph if n.op_type == "LayerNormalization").outputs[0])
    assert not foldable(model, names(model))


def test_a_norm_behind_moves_is_found_where_channels_stay(tmp_path: Path) -> None:
    """A transpose of positions keeps channels; one of the channels does not."""
    for perm, expected in (((1, 0, 2), ["1/MatMul"]), ((0, 2, 1), [])):
        model = ir.load(normalized_graph(tmp_path / "g.onnx"))
        norm, product = (next(n for n in model.graph if n.op_type == o) for o in ("LayerNormalization", "MatMul"))
        norm.outputs[0].shape = ir.Shape([8, 8, 8])
        move = ir.node("Transpose", [norm.outputs[0]], attributes={"perm": perm}, name="move")
        move.outputs[0].name, move.outputs[0].type, move.outputs[0].shape = (
            "move",
            norm.outputs[0].type,
            ir.Shape([8] * 3),
        )
        product.replace_input_with(0, move.outputs[0])
        model.graph.insert_after(norm, move)
        assert list(foldable(model, ["1/MatMul"])) == expected


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        ({"3/MatMul": np.ones(8)}, r"expected linear layers of the graph, found 3/MatMul"),
        ({"1/MatMul": np.ones(7)}, r"1/MatMul: expected 8 divisors, finite and above zero, found shape \[7\]"),
        ({"1/MatMul": np.zeros(8)}, r"above zero, found shape \[8\], 0 to 0"),
        ({"1/MatMul": np.full(8, np.inf)}, r"above zero, found shape \[8\], inf to inf"),
        ({"1/MatMul": np.full(8, np.nan)}, r"above zero, found shape \[8\], nan to nan"),
    ],
)
def test_divisors_that_do_not_fit_are_refused(tmp_path: Path, divisors: dict[str, np.ndarray], message: str) -> None:
    path = normalized_graph(tmp_path / "g.onnx")
    with pytest.raises(InputError, match=message):
        smooth(path, tmp_path / "s.onnx", divisors)
    assert not (tmp_path / "s.onnx").exists()


def test_the_outliers_hardening_changes_inputs_and_no_embedding(demo_bundle: Path, tmp_path: Path) -> None:
    """What the 8-bit tests stand on: the same fp32 tower, with channels of inputs ten times and more above the rest."""
    source = Path(clip_export.__file__).parent / "demo"
    clip_export.build(harden(source, tmp_path / "checkpoint", "outliers"), tmp_path / "hard")
    shutil.rmtree(tmp_path / "checkpoint")
    for tower in TOWERS:
        plain, hard = (golden_sample(path, tower) for path in (demo_bundle, tmp_path / "hard"))
        require_same(plain.graph, hard.graph, plain)
        for layer in BLOCK[:3]:
            linear = next(lin for lin in find_linears(ir.load(hard.graph).graph) if layer in lin.name)
            channels = [
                np.abs(values(sample.graph, [linear.source], plain.feeds[0], tmp_path)[linear.source]).max(axis=(0, 1))
                for sample in (plain, hard)
            ]
            if tower == "text" and "attention.out" not in layer:  # in the basis that was reflected, its gains folded
                grown = channels[1] / np.median(channels[1])
                assert (grown < 5).mean() >= 0.9
            else:
                grown = channels[1] / channels[0]
                assert np.isclose(grown, 1, rtol=1e-3).mean() >= 0.9
            assert (grown > 9.9).sum() >= 2 and grown.max() > 99
