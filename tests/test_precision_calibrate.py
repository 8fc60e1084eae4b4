"""Calibration: ranges over everything, true rows in a bounded number, and a file that is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from precision_made import TOWERS, Sample, chain, golden_sample

from clip_export.errors import ExportError, InputError, OutputError
from clip_export.precision.calibrate import Calibration, cached, calibrate, calibration_key
from clip_export.precision.linears import find_linears
from clip_export.precision.ranges import Feeds, measure
from clip_export.spec import Tower


def sources_of(graph: Path) -> list[str]:
    return list(dict.fromkeys(linear.source for linear in find_linears(ir.load(graph).graph)))


def whole(graph: Path, feeds: Sequence[Feeds], sources: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """The oracle: every row of `sources`, batch by batch, from the plain graph."""
    model = ir.load(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[source] for source in sources)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    runs = [session.run(list(sources), dict(batch)) for batch in feeds]
    return {source: [arrays[i].reshape(-1, arrays[i].shape[-1]) for arrays in runs] for i, source in enumerate(sources)}


def count(feeds: Sequence[Feeds]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in feeds)


def texts_of_two_lengths(sample: Sample) -> list[Feeds]:
    """The golden texts, the first four of them cut to half of their length."""
    batch = sample.feeds[0]
    ids, ends = batch["input_ids"], batch["eot_index"]
    half = ids.shape[1] // 2
    short: Feeds = {"input_ids": ids[:4, :half], "eot_index": np.minimum(ends[:4], half - 1)}
    return [short, {"input_ids": ids[4:], "eot_index": ends[4:]}]


def numbered(*sizes: int, width: int = 3) -> list[Feeds]:
    """Batches of these sizes, in which no two rows are equal."""
    ends = np.cumsum([0, *sizes])
    rows = np.arange(1, width * ends[-1] + 1, dtype=np.int32).reshape(-1, width)
    return [{"x": rows[start : start + size]} for start, size in zip(ends[:-1], sizes, strict=True)]


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """A graph whose one product, `y`, is its input `x` times 2."""
    return chain(tmp_path / "g.onnx", ("Mul", 2.0), width=3)


@pytest.fixture
def made(twice: Path) -> Calibration:
    return calibrate(twice, numbered(3, 4), sources=["y"], inputs=7, rows=5)


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_kept_is_what_the_tensors_hold(tiny_bundle: Path, tower: Tower) -> None:
    sample = golden_sample(tiny_bundle, tower)
    feeds = texts_of_two_lengths(sample) if tower == "text" else list(sample.feeds)
    sources = sources_of(sample.graph)
    found = calibrate(sample.graph, feeds, sources=sources, inputs=count(feeds), rows=24)
    expected = whole(sample.graph, feeds, sources)
    assert set(found.rows) == set(found.counts) == set(sources)
    for source in sources:
        everything = np.concatenate(expected[source])
        np.testing.assert_allclose(found.ranges.of(source), np.abs(everything).max(axis=0), rtol=1e-5, atol=1e-6)
        assert found.counts[source] == len(everything) / count(feeds)
        rows = found.rows[source]
        assert rows.dtype == np.float32 and 0 < len(rows) <= 24
        distances = np.abs(rows[:, None] - everything[None]).max(axis=2).min(axis=1)
        assert distances.max() <= 1e-4 * np.abs(everything).max(), source
        assert (np.abs(rows) <= found.ranges.of(source) * (1 + 1e-5)).all()
    assert found.inputs == count(feeds)


def test_ranges_are_those_that_measure_gives(tiny_bundle: Path) -> None:
    sample = golden_sample(tiny_bundle, "image")
    found = calibrate(sample.graph, sample.feeds, sources=sources_of(sample.graph), inputs=count(sample.feeds))
    expected = measure(sample.graph, sample.feeds)
    assert found.ranges.scores == expected.scores
    assert set(found.ranges.channels) == set(expected.channels)
    for name in expected.channels:
        np.testing.assert_array_equal(found.ranges.of(name), expected.of(name))


def test_texts_of_different_lengths_count_with_their_own(tiny_bundle: Path) -> None:
    sample = golden_sample(tiny_bundle, "text")
    feeds = texts_of_two_lengths(sample)
    found = calibrate(sample.graph, feeds, sources=sources_of(sample.graph), inputs=count(feeds))
    tokens = sum(batch["input_ids"].size for batch in feeds) / count(feeds)
    # The last block computes its output projection and MLP for the pooled position alone.
    assert set(found.counts.values()) == {tokens, 1.0}


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), rows=st.integers(1, 60))
def test_rows_are_bounded_distinct_and_from_every_part_of_the_data(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rows: int
) -> None:
    feeds = numbered(*sizes)
    path = chain(tmp_path_factory.mktemp("graph") / "g.onnx", ("Mul", 2.0), width=3)
    found = calibrate(path, feeds, sources=["y"], inputs=sum(sizes), rows=rows)
    everything = np.concatenate([batch["x"] for batch in feeds]) * 2
    positions = (found.rows["y"][:, 0] - 2) / 6
    np.testing.assert_array_equal(everything[positions.astype(int)], found.rows["y"])
    assert (np.diff(positions) > 0).all()
    assert len(positions) <= min(rows, sum(sizes))
    np.testing.assert_array_equal(found.ranges.of("y"), everything.max(axis=0))
    batches = np.searchsorted(np.cumsum(sizes), positions, side="right")
    taken = np.bincount(batches, minlength=len(sizes))
    assert (taken <= np.ceil(rows * np.array(sizes) / sum(sizes))).all()
    if rows <= sum(sizes):  # of three positions in a row, the first and the last are a row apart or more
        assert len(positions) >= rows / 2


@pytest.mark.parametrize("batches", [4, 40, 400])
def test_more_data_makes_no_larger_sample(twice: Path, batches: int) -> None:
    found = calibrate(twice, iter(numbered(*[8] * batches)), sources=["y"], inputs=8 * batches, rows=16)
    assert 8 <= len(found.rows["y"]) <= 16
    # The last batches have their share too.
    assert found.rows["y"][:, 0].max() > 0.9 * found.ranges.of("y")[0]


def test_the_same_inputs_give_the_same_rows(twice: Path, made: Calibration) -> None:
    again = calibrate(twice, numbered(3, 4), sources=["y"], inputs=7, rows=5)
    np.testing.assert_array_equal(again.rows["y"], made.rows["y"])


def test_fewer_inputs_than_were_announced_make_a_smaller_sample(twice: Path) -> None:
    found = calibrate(twice, numbered(10, 10), sources=["y"], inputs=100, rows=50)
    assert (found.inputs, found.counts) == (20, {"y": 1.0})
    assert len(found.rows["y"]) <= 10


def test_sources_are_sampled_once_each(twice: Path) -> None:
    found = calibrate(twice, numbered(4), sources=["y", "Cast", "y"], inputs=4, rows=4)
    np.testing.assert_array_equal(found.rows["y"], 2 * found.rows["Cast"])  # the same rows of both


def test_progress_counts_inputs(twice: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    calibrate(twice, numbered(3, 4), sources=[], inputs=7, progress=lambda *step: steps.append(step))
    assert steps == [("calibrate", 3, 7), ("calibrate", 7, 7)]


@pytest.mark.parametrize("factor", [2.0, 0.0], ids=["infinity", "not a number"])
@pytest.mark.parametrize("position", range(3))
def test_what_overflows_in_fp32_is_an_error(tmp_path: Path, factor: float, position: int) -> None:
    # 5 times 1e38 is infinite, and that times 0 no number. A maximum would pass over it in the middle.
    path = chain(tmp_path / "g.onnx", ("Mul", 1e38), ("Mul", factor), ("Mul", 1.0), width=4)
    fine = np.ones((3, 4), dtype=np.int32)
    bad = fine.copy()
    bad[position, 1] = 5
    calibrate(path, [{"x": fine}], sources=["1/Mul"], inputs=3)
    with pytest.raises(ExportError, match="expected finite numbers in 1/Mul, found infinity or NaN on the first 6"):
        calibrate(path, [{"x": fine}, {"x": bad}, {"x": fine}], sources=["1/Mul"], inputs=9)


def test_inputs_that_are_not_as_announced_are_errors(twice: Path) -> None:
    with pytest.raises(InputError, match="expected inputs to calibrate on, found none"):
        calibrate(twice, [], sources=["y"], inputs=1)
    with pytest.raises(InputError, match="expected 5 inputs to calibrate on, found 7 or more"):
        calibrate(twice, numbered(3, 4), sources=["y"], inputs=5)
    with pytest.raises(InputError, match="expected arrays of one length in a batch, found x 3, z 2"):
        calibrate(twice, [{**numbered(3)[0], "z": np.zeros(2)}], sources=["y"], inputs=5)
    with pytest.raises(InputError, match="found 5 inputs and 0 rows"):
        calibrate(twice, numbered(3), sources=["y"], inputs=5, rows=0)


def test_sources_that_have_no_rows_are_errors(tiny_bundle: Path, twice: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a tensor blocks\.0 to sample, found none"):
        calibrate(twice, numbered(1), sources=["blocks.0"], inputs=1)
    sample = golden_sample(tiny_bundle, "text")
    model = ir.load(sample.graph)
    flat = next(
        value.name for node in model.graph for value in node.outputs if value.shape is None or len(value.shape) < 2
    )
    with pytest.raises(ExportError, match=r"to be float32 \[\.\.\., channels\]"):
        calibrate(sample.graph, sample.feeds, sources=[str(flat)], inputs=8)


def assert_equal(found: Calibration, expected: Calibration) -> None:
    assert (found.inputs, found.counts, found.ranges.scores) == (
        expected.inputs,
        expected.counts,
        expected.ranges.scores,
    )
    pairs = ((found.rows, expected.rows), (found.ranges.channels, expected.ranges.channels))
    for mine, theirs in pairs:
        assert set(mine) == set(theirs)
        for name in theirs:
            assert mine[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_what_is_saved_is_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    sample = golden_sample(tiny_bundle, "image")
    found = calibrate(sample.graph, sample.feeds, sources=sources_of(sample.graph), inputs=count(sample.feeds))
    assert found.ranges.scores
    found.save(tmp_path / "c.safetensors")
    assert_equal(Calibration.load(tmp_path / "c.safetensors"), found)
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


DAMAGE = {
    "empty": lambda data: b"",
    "another file": lambda data: b"{}" * 40,
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "one bit of a number": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "one letter of a name": lambda data: data.replace(b"rows y", b"rows z"),
    "other tensors": lambda data: safetensors.numpy.save({"inputs": np.array(7)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_and_made_again(made: Calibration, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    made.save(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(InputError, match=r"c\.safetensors: expected a calibration, found"):
        Calibration.load(path)
    assert cached(path, lambda: made) is made
    assert_equal(Calibration.load(path), made)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: no such file"):
        Calibration.load(tmp_path / "c.safetensors")


def test_what_is_there_is_not_made_again(made: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "c.safetensors"
    made_at: list[int] = []

    def make() -> Calibration:
        made_at.append(1)
        return made

    assert_equal(cached(path, make), made)
    assert_equal(cached(path, make), made)
    assert len(made_at) == 1


def test_an_interruption_leaves_what_was_there(
    made: Calibration, twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    before = set(tmp_path.iterdir())

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        made.save(path)
    assert set(tmp_path.iterdir()) == before
    made.save(path)
    other = calibrate(twice, numbered(2), sources=["y"], inputs=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        other.save(path)
    assert set(tmp_path.iterdir()) == {*before, path}
    assert_equal(Calibration.load(path), made)


def test_a_place_that_cannot_be_written_is_an_error(made: Calibration, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no directory"):
        made.save(tmp_path / "nowhere" / "c.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        cached(tmp_path / "file" / "c.safetensors", lambda: made)


def test_what_making_raises_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Calibration:
        raise ExportError("no")

    with pytest.raises(ExportError, match="no"):
        cached(tmp_path / "c.safetensors", fail)
    assert not list(tmp_path.iterdir())


def test_a_key_tells_graph_inputs_and_rows_apart() -> None:
    keys = [
        calibration_key("a", [b"one", b"two"], rows=512),
        calibration_key("b", [b"one", b"two"], rows=512),
        calibration_key("a", [b"one", b"two"], rows=256),
        calibration_key("a", [b"two", b"one"], rows=512),
        calibration_key("a", [b"onet", b"wo"], rows=512),
        calibration_key("a", [b"onetwo"], rows=512),
        calibration_key("a", [b"one", b"two", b""], rows=512),
        calibration_key("a", [], rows=512),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == calibration_key("a", iter([b"one", b"two"]), rows=512)
