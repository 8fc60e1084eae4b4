"""Export, passes and proof, on tiny towers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from specs_made import random_weights, replaced, tiny_spec

from clip_export import backends
from clip_export.errors import ExportError, UnsupportedModelError
from clip_export.graph import files
from clip_export.graph.export import GraphShape, example_feeds, export
from clip_export.graph.proof import Case, cases, prove, relative_difference, run_tower
from clip_export.spec import ModelSpec, Tower, weight_shapes
from clip_export.towers import OUTPUTS, check_outputs, make_tower

TOWERS: tuple[Tower, ...] = ("text", "image")


def graph_shape(spec: ModelSpec, tower: Tower, outputs: tuple[str, ...] = ("embedding",)) -> GraphShape:
    size = (16,) if tower == "text" else (3, 32, 32)
    assert spec.text is not None
    dynamic = tower == "text" and spec.text.causal
    return GraphShape(tower=tower, input=size, layers=2, outputs=outputs, sequence_dynamic=dynamic)


_exports: dict[tuple[ModelSpec, Tower, tuple[str, ...]], bytes] = {}


def exported(
    path: Path, spec: ModelSpec, tower: Tower, outputs: tuple[str, ...] = ("embedding",), *, fresh: bool = False
) -> tuple[torch.nn.Module, GraphShape]:
    """Write the graph of one tower to `path`. An export takes seconds, so the bytes of each are kept."""
    module, shape = make_tower(spec, tower, random_weights(spec), outputs), graph_shape(spec, tower, outputs)
    key = (spec, tower, outputs)
    if fresh:
        export(module, shape, path)
    elif key not in _exports:
        export(module, shape, path)
        _exports[key] = path.read_bytes()
    else:
        path.write_bytes(_exports[key])
    return module, shape


def questions(module: torch.nn.Module, shape: GraphShape) -> list[Case]:
    """The cases of the proof, on nine inputs; texts end at positions from 1 to the last."""
    feeds = example_feeds(shape, batch=9)
    if shape.tower == "text":
        feeds["eot_index"] = np.linspace(1, 15, 9).astype(np.int32)
    return cases(shape, feeds, run_tower(module, shape.outputs, feeds))


@pytest.mark.parametrize("tower", TOWERS)
def test_state_dict_has_the_canonical_names_and_shapes(tower: Tower) -> None:
    spec = tiny_spec()
    module = make_tower(spec, tower, random_weights(spec), ("embedding",))
    found = {f"{tower}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found.pop("image.patch_embedding.bias", None)  # ours: the pixels' mean and std
    assert found == {name: shape for name, shape in weight_shapes(spec).items() if name.startswith(tower)}


@pytest.mark.parametrize("outputs", [("embedding",), ("pooled", "hidden_states"), OUTPUTS], ids="+".join)
@pytest.mark.parametrize("tower", TOWERS)
def test_graph_equals_tower(tmp_path: Path, tower: Tower, outputs: tuple[str, ...]) -> None:
    spec = tiny_spec()
    module, shape = exported(tmp_path / "g.onnx", spec, tower, outputs)
    engine = backends.open_engine("onnxruntime", tmp_path / "g.onnx")
    differences = prove(engine, tower, questions(module, shape))
    titles = {f"batch {n}" for n in (1, 2, 3, 7)}
    if tower == "text":
        titles |= {f"{n} tokens" for n in (2, 3, 4, 8, 15)} | {"other tokens after the end"}
    assert {title.partition(":")[0] for title in differences} == titles
    assert engine.outputs == outputs


@pytest.mark.parametrize("tower", TOWERS)
def test_pruned_last_block_gives_what_the_whole_one_gives(tower: Tower) -> None:
    spec = tiny_spec()
    feeds = example_feeds(graph_shape(spec, tower), batch=4)
    pruned = make_tower(spec, tower, random_weights(spec), ("pooled", "embedding"))
    whole = make_tower(spec, tower, random_weights(spec), ("pooled", "embedding", "hidden_states"))
    first, second = run_tower(pruned, pruned.outputs, feeds), run_tower(whole, whole.outputs, feeds)
    for name in first:
        assert relative_difference(first[name], second[name]) < 1e-6


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tower", TOWERS)
def test_graph_is_clean(tmp_path: Path, tower: Tower, activation: str) -> None:
    spec = tiny_spec(activation=activation)  # type: ignore[arg-type]
    exported(tmp_path / "g.onnx", spec, tower)
    graph = onnx.load(tmp_path / "g.onnx")
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Attention") == 2
    assert kinds.count("LayerNormalization") == 2 * 2 + (1 if tower == "text" else 2)
    assert kinds.count("MatMul") == 2 * 4 + 1
    assert kinds.count("Gelu" if activation == "gelu" else "Sigmoid") == 2
    assert kinds.count("Shape") == 1
    assert kinds.count("Reshape") == 2 * 4 + (tower == "image")
    used = {name for node in graph.graph.node for name in node.input}
    assert {tensor.name for tensor in graph.graph.initializer} <= used
    produced = [name for node in graph.graph.node for name in node.output]
    assert len(produced) == len(set(produced))
    assert "blocks.1.mlp.fc1/MatMul" in {node.name for node in graph.graph.node}
    assert "blocks.1.mlp.fc1.weight" in {tensor.name for tensor in graph.graph.initializer}
    assert not graph.graph.doc_string and not graph.metadata_props
    assert graph.opset_import[0].version == 23


def test_axes_are_dynamic_where_that_is_exact(tmp_path: Path) -> None:
    def axes(causal: bool) -> list[str | int]:
        exported(tmp_path / "g.onnx", tiny_spec(causal=causal), "text")
        dims = onnx.load(tmp_path / "g.onnx").graph.input[0].type.tensor_type.shape.dim
        return [dim.dim_param or dim.dim_value for dim in dims]

    assert axes(causal=True) == ["batch", "sequence"]
    assert axes(causal=False) == ["batch", 16]


def test_text_that_is_not_causal_sees_its_padding(tmp_path: Path) -> None:
    spec = tiny_spec(causal=False)
    exported(tmp_path / "g.onnx", spec, "text")
    engine = backends.open_engine("onnxruntime", tmp_path / "g.onnx")
    feeds = example_feeds(graph_shape(spec, "text"), batch=1)
    feeds["eot_index"][:] = 3
    other = feeds | {"input_ids": np.where(np.arange(16) > 3, 0, feeds["input_ids"]).astype(np.int32)}
    assert relative_difference(engine(feeds)["embedding"], engine(other)["embedding"]) > 1e-3


def test_claiming_that_a_text_tower_is_causal_is_found_out(tmp_path: Path) -> None:
    spec = tiny_spec(causal=False)
    shape = dataclasses.replace(graph_shape(spec, "text"), sequence_dynamic=True)
    module = make_tower(spec, "text", random_weights(spec), shape.outputs)
    export(module, shape, tmp_path / "g.onnx")
    engine = backends.open_engine("onnxruntime", tmp_path / "g.onnx")
    made = questions(module, shape)
    for title in ("8 tokens", "other tokens after the end"):
        with pytest.raises(ExportError, match=rf"at {title}: the exported graph differs"):
            prove(engine, "text", [case for case in made if case.title == title])


def test_changed_token_after_the_end_changes_nothing(tmp_path: Path) -> None:
    exported(tmp_path / "g.onnx", tiny_spec(), "text")
    engine = backends.open_engine("onnxruntime", tmp_path / "g.onnx")
    feeds = example_feeds(graph_shape(tiny_spec(), "text"), batch=2)
    feeds["eot_index"][:] = [3, 9]
    other = feeds["input_ids"].copy()
    other[0, 4:], other[1, 10:] = 1, 2
    found = engine(feeds | {"input_ids": other})
    np.testing.assert_allclose(found["embedding"], engine(feeds)["embedding"], atol=1e-6)
    other[0, 2] += 1
    assert relative_difference(engine(feeds | {"input_ids": other})["embedding"], found["embedding"]) > 1e-3


@pytest.mark.parametrize("tower", TOWERS)
def test_proof_finds_a_damaged_weight(tmp_path: Path, tower: Tower) -> None:
    module, shape = exported(tmp_path / "g.onnx", tiny_spec(), tower)
    graph = onnx.load(tmp_path / "g.onnx")
    weight = next(t for t in graph.graph.initializer if t.name == "blocks.0.mlp.fc1.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=r"differs from the tower by .* expected at most 1e-05"):
        prove(backends.open_engine("onnxruntime", tmp_path / "g.onnx"), tower, questions(module, shape))


@pytest.mark.parametrize(
    ("fragment", "value", "message"),
    [
        ("norm.weight", float("nan"), "not finite"),
        ("projection", 0.0, "is constant"),
        ("blocks", 0.0, None),
    ],
)
@pytest.mark.parametrize("tower", TOWERS)
def test_proof_refuses_outputs_that_say_nothing(tower: Tower, fragment: str, value: float, message: str | None) -> None:
    spec = tiny_spec()
    module = make_tower(spec, tower, replaced(random_weights(spec), fragment, value), ("embedding",))
    if message is None and tower == "text":
        questions(module, graph_shape(spec, tower))  # a tower of residuals alone still tells texts apart
    else:
        with pytest.raises(ExportError, match=message or "same for every input"):
            questions(module, graph_shape(spec, tower))


def test_export_checks_the_graph_that_it_made(tmp_path: Path) -> None:
    spec = tiny_spec()
    module = make_tower(spec, "image", random_weights(spec), ("embedding",))
    with pytest.raises(ExportError, match="has 2 Attention nodes, expected 3"):
        export(module, dataclasses.replace(graph_shape(spec, "image"), layers=3), tmp_path / "g.onnx")
    assert not (tmp_path / "g.onnx").exists()


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 1000)
    module, shape = exported(tmp_path / "g.onnx", tiny_spec(), "image", fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.onnx", "g.onnx.data"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("g.onnx", "g.onnx.data"):
        (tmp_path / name).rename(moved / name)
    prove(backends.open_engine("onnxruntime", moved / "g.onnx"), "image", questions(module, shape))


@pytest.mark.parametrize("tower", TOWERS)
def test_export_is_reproducible_and_names_no_place(tmp_path: Path, tower: Tower) -> None:
    exported(tmp_path / "a.onnx", tiny_spec(), tower)
    exported(tmp_path / "b.onnx", tiny_spec(), tower, fresh=True)
    data = (tmp_path / "a.onnx").read_bytes()
    assert data == (tmp_path / "b.onnx").read_bytes()
    for place in (str(Path.cwd()), str(Path.home()), "site-packages", "torch"):
        assert place.encode() not in data


@pytest.mark.parametrize("tower", TOWERS)
def test_graph_equals_tower_in_the_reference_evaluator(tmp_path: Path, tower: Tower) -> None:
    """ONNX's own evaluator in numpy: what the graph says, without any engine's kernels."""
    module, shape = exported(tmp_path / "g.onnx", tiny_spec(), tower)
    feeds = example_feeds(shape, batch=2)
    found = ReferenceEvaluator(str(tmp_path / "g.onnx")).run(None, feeds)
    assert relative_difference(found[0], run_tower(module, shape.outputs, feeds)["embedding"]) < 1e-5


def test_outputs_of_a_tower_without_projection() -> None:
    spec = tiny_spec(projected=False)
    assert check_outputs(spec, "text", None) == ("pooled", "hidden_states")
    assert check_outputs(tiny_spec(), "image", ["hidden_states", "embedding"]) == ("embedding", "hidden_states")
    with pytest.raises(UnsupportedModelError, match="text tower of this checkpoint has no projection"):
        check_outputs(spec, "text", ["embedding"])
    with pytest.raises(UnsupportedModelError, match="found logits"):
        check_outputs(spec, "text", ["logits"])
