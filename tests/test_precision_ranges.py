"""Ranges: what every tensor holds, and nothing kept on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from precision_made import TOWERS, chain, golden_sample

from clip_export.errors import ExportError, InputError
from clip_export.graph import files
from clip_export.graph.primitives import decompose
from clip_export.precision.ranges import measure
from clip_export.spec import Tower


@pytest.mark.parametrize("tower", TOWERS)
def test_ranges_are_those_of_the_tensors_themselves(tiny_bundle: Path, tower: Tower) -> None:
    sample = golden_sample(tiny_bundle, tower)
    ranges = measure(sample.graph, sample.feeds)
    model = ir.load(sample.graph)
    scores = decompose(model)
    values = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    model.graph.outputs.clear()
    model.graph.outputs.extend(values)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [value.name for value in values]
    found: dict[str, list[np.ndarray]] = {}
    for batch in sample.feeds:
        for name, array in zip(names, session.run(names, dict(batch)), strict=True):
            found.setdefault(name, []).append(np.abs(array).reshape(-1, array.shape[-1]))
    assert set(ranges.channels) <= set(names)
    for name in ranges.channels:
        columns = np.concatenate(found[name]).max(axis=0)
        np.testing.assert_allclose(ranges.of(name), columns, rtol=1e-5, err_msg=name)
        assert ranges.largest(name) == ranges.of(name).max()
    assert set(ranges.scores) == {f"blocks.{i}.attention/Attention" for i in range(2)}
    for node, value in scores.items():
        assert ranges.scores[node] == pytest.approx(max(array.max() for array in found[value.name]), rel=1e-5)


def test_ranges_of_batches_are_merged(tmp_path: Path) -> None:
    path = chain(tmp_path / "g.onnx", ("Mul", 2.0), width=2)
    batches = [{"x": np.array([[1, -5]], dtype=np.int32)}, {"x": np.array([[-3, 4], [2, 0]], dtype=np.int32)}]
    steps: list[tuple[str, int, int]] = []
    ranges = measure(path, iter(batches), progress=lambda *step: steps.append(step))
    assert ranges.of("y").tolist() == [6, 10]
    assert steps == [("measure the ranges", 1, 0), ("measure the ranges", 2, 0)]


def test_the_typical_channel_is_one_that_is_not_always_zero(tmp_path: Path) -> None:
    path = chain(tmp_path / "g.onnx", ("Mul", 1.0), width=4)
    ranges = measure(path, [{"x": np.array([[0, 1, -2, 9]], dtype=np.int32)}])
    assert (ranges.typical("y"), ranges.largest("y")) == (2, 9)
    nothing = measure(path, [{"x": np.zeros((1, 4), dtype=np.int32)}])
    assert (nothing.typical("y"), nothing.largest("y")) == (0, 0)


def test_infinities_are_measured_as_such(tmp_path: Path) -> None:
    path = chain(tmp_path / "g.onnx", ("Mul", 3e38), ("Mul", 2.0), width=1)
    assert measure(path, [{"x": np.array([[5]], dtype=np.int32)}]).largest("y") == float("inf")


def test_weights_beside_the_graph_are_found(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = golden_sample(tiny_bundle, "image")
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 1000)
    files.save(ir.load(sample.graph), tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx.data").exists()
    first, second = measure(tmp_path / "g.onnx", sample.feeds), measure(sample.graph, sample.feeds)
    assert {name: array.tolist() for name, array in first.channels.items()} == {
        name: array.tolist() for name, array in second.channels.items()
    }


def test_nothing_to_measure_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected inputs to measure ranges on, found none"):
        measure(chain(tmp_path / "g.onnx", ("Mul", 1.0)), [])


def test_ranges_of_another_graph_are_an_error(tmp_path: Path) -> None:
    ranges = measure(chain(tmp_path / "g.onnx", ("Mul", 1.0)), [{"x": np.ones((1, 8), dtype=np.int32)}])
    with pytest.raises(ExportError, match=r"no range was measured for blocks\.0/Add"):
        ranges.largest("blocks.0/Add")
