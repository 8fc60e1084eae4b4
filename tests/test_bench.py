"""clip-export bench: statistics, arithmetic, who takes part and who does not. No test asserts a time."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkpoints_made
import numpy as np
import onnx
import pictures
import pytest
from conftest import no_gpu
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from clip_export.benching import (
    advice,
    batches,
    chart,
    end_to_end,
    entrants,
    fresh,
    limits,
    measuring,
    memory,
    table,
    timing,
)
from clip_export.benching.batches import Batch
from clip_export.benching.end_to_end import EndToEnd
from clip_export.benching.entrants import Engines, Entrant
from clip_export.benching.fresh import Opening
from clip_export.benching.limits import Ceiling
from clip_export.benching.measuring import bench
from clip_export.benching.results import KEYS
from clip_export.benching.results import Result as Measured
from clip_export.benching.timing import Repeats, Timing
from clip_export.bundle import Bundle
from clip_export.commands import app
from clip_export.cosine import cosines
from clip_export.errors import BackendError, BundleError, InputError, OutputError
from clip_export.runtime import front
from clip_export.spec import Tower

QUICK = Repeats(error=1.0, sample_seconds=0.0, seconds=0.0)  # the fewest rounds that there may be


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="clip-export")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs with captions."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["file,caption"]
    for name in ("chelsea", "coffee", "china"):
        path = pictures.PHOTOGRAPHS[name]
        shutil.copy(path, folder / path.name)
        lines.append(f"{path.name},a photo of {name}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tiny_checkpoint: Path, pairs: Path) -> Measured:
    """All that can be asked at once, as quickly as it goes."""
    return bench(
        tiny_bundle,
        batches=(1, 3),
        lengths=("natural", "5"),
        compare=("torch", "onnxruntime"),
        checkpoint=str(tiny_checkpoint),
        end_to_end=pairs,
        repeats=QUICK,
        openings=1,
    )


# Statistics


def test_percentiles_are_times_that_were_measured() -> None:
    seconds = np.arange(1, 201, dtype=float).reshape(20, 10)
    found = Timing.of(seconds)
    assert (found.p50, found.p90, found.p99) == (100, 180, 198)
    assert (found.rounds, found.calls) == (20, 200)


def test_with_few_calls_p99_is_the_slowest() -> None:
    assert Timing.of(np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [9.0]])).p99 == 9


def test_the_interval_of_the_median_ends_at_rounds() -> None:
    """Of 20 rounds the 6th smallest and the 6th largest: P(at most 5 of 20 fair coins show heads) is 0.0207."""
    found = Timing.of(np.arange(1, 21, dtype=float)[:, None])
    assert (found.median, found.low, found.high) == (10.5, pytest.approx(6), pytest.approx(15))
    assert found.error == pytest.approx(4.5 / 10.5)


def test_one_interrupted_call_does_not_move_a_round() -> None:
    calm = np.ones((8, 9))
    interrupted = calm.copy()
    interrupted[:, 4] = 100.0
    assert Timing.of(interrupted).median == 1
    assert Timing.of(interrupted).p99 == 100


def test_fewer_rounds_than_the_interval_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 6 rounds, found 5"):
        Timing.of(np.ones((5, 10)))


def test_a_ratio_is_taken_round_by_round_so_that_a_drift_cancels() -> None:
    own = np.linspace(1.0, 9.0, 7)[:, None]
    found = timing.ratio(2 * own, own)
    assert (found.ratio, found.low, found.high) == (2, 2, 2)


@given(st.floats(0.01, 0.5), st.integers(0, 1000))
def test_half_the_error_takes_four_times_the_rounds(error: float, seed: int) -> None:
    pilot = 1 + 0.2 * np.random.default_rng(seed).random(6)
    rounds, more = timing.rounds_needed(pilot, error), timing.rounds_needed(pilot, error / 2)
    assert 4 * rounds - 4 <= more <= 4 * rounds


def test_rounds_follow_from_the_spread_of_the_pilot() -> None:
    """(1.96 * 1.2533 * 0.1 / 0.05)^2 = 24.1"""
    pilot = np.array([0.9, 1.1] * 3) * 1.0
    pilot = 1 + (pilot - 1) * 0.1 / pilot.std(ddof=1)
    assert timing.rounds_needed(pilot, 0.05) == 25
    assert timing.rounds_needed(np.ones(6), 0.05) == 0


def fake_clock(names: list[str], seconds: Callable[[str, int], float]) -> tuple[Mapping[str, Any], timing.Clock]:
    """Works and a clock for which a call of contestant `name` takes `seconds(name, turns it has had)`."""
    turns = dict.fromkeys(names, 0)
    works = {name: (lambda name=name: name) for name in names}

    def clock(work: Callable[[], Any], calls: int) -> np.ndarray:
        name = work()
        turns[name] += 1
        return np.full(calls, seconds(name, turns[name]))

    return works, clock


def test_a_calm_machine_needs_the_fewest_rounds() -> None:
    works, clock = fake_clock(["a", "b"], lambda name, _: 1.0 if name == "a" else 2.0)
    found = timing.measure(works, clock, Repeats(sample_seconds=4.0))
    assert {name: (*seconds.shape, seconds[0, 0]) for name, seconds in found.items()} == {
        "a": (6, 4, 1),
        "b": (6, 2, 2),
    }


def test_a_restless_machine_needs_more_and_the_pilot_is_thrown_away() -> None:
    works, clock = fake_clock(["a"], lambda _, turn: 50.0 if turn <= 1 else 1.0 + turn % 2)
    found = timing.measure(works, clock, Repeats(error=0.1, sample_seconds=0.0))["a"]
    assert len(found) == timing.rounds_needed(np.array([1.0, 2.0] * 3), 0.1) > 6
    assert found.max() == 2


def test_there_are_never_more_rounds_than_allowed() -> None:
    works, clock = fake_clock(["a"], lambda _, turn: 1.0 + turn % 2)
    assert len(timing.measure(works, clock, Repeats(error=0.001, most_rounds=9))["a"]) == 9
    assert len(timing.measure(works, clock, Repeats(error=0.001, seconds=0.0))["a"]) == 6


def test_the_order_turns_and_every_turn_begins_with_a_call_that_is_not_timed() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = timing._rounds(works, timing.wall_clock, dict.fromkeys("abc", 2), 3)
    assert "".join(calls) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert {name: seconds.shape for name, seconds in found.items()} == dict.fromkeys("abc", (3, 2))


# Limits


def small_graph(path: Path) -> Path:
    """A convolution in two groups, attention of two heads over more keys than queries, and a product."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["convolved"], group=2),
        helper.make_node("Attention", ["q", "k", "v"], ["attended"]),
        helper.make_node("MatMul", ["a", "matrix"], ["product"]),
        helper.make_node("Relu", ["product"], ["y"]),
    ]
    inputs = {"x": ["batch", 4, 6, 6], "q": ["batch", 2, "sequence", 8], "k": ["batch", 2, 10, 8]}
    inputs |= {"v": ["batch", 2, 10, 16], "a": ["batch", "sequence", 5]}
    between = {
        "convolved": ["batch", 6, 2, 2],
        "attended": ["batch", 2, "sequence", 16],
        "product": ["batch", "sequence", 7],
    }
    weights = [helper.make_tensor(name, TensorProto.FLOAT, shape, np.zeros(np.prod(shape)))
               for name, shape in {"kernel": (6, 2, 5, 5), "matrix": (5, 7)}.items()]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "small",
        [value(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [value("y", TensorProto.FLOAT, ["batch", "sequence", 7])],
        weights,
        value_info=[value(name, TensorProto.FLOAT, shape) for name, shape in between.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def test_flop_of_a_small_graph_are_those_counted_by_hand(tmp_path: Path) -> None:
    batch, sequence = 3, 4
    convolution = 2 * batch * 6 * 2 * 2 * (2 * 5 * 5)
    attention = 2 * batch * 2 * sequence * 10 * (8 + 16)
    product = 2 * batch * sequence * 5 * 7
    found = limits.count_flop(small_graph(tmp_path / "small.onnx"), {"batch": batch, "sequence": sequence})
    assert found == convolution + attention + product


def tower_flop(bundle: Bundle, tower: Tower, tokens: int) -> int:
    """The formula of the literature, of blocks whose last computes its output and its MLP for one token alone."""
    spec = bundle.spec.text if tower == "text" else bundle.spec.image
    assert spec is not None and spec.embedding_dim is not None
    width, mlp, layers = spec.transformer.width, spec.transformer.mlp_width, spec.transformer.layers
    after = width**2 + 2 * width * mlp  # the output projection and the MLP, of one token
    blocks = layers * (tokens * 3 * width**2 + 2 * tokens**2 * width) + ((layers - 1) * tokens + 1) * after
    return 2 * (blocks + width * spec.embedding_dim)


@pytest.mark.parametrize(("batch", "length"), [(1, 77), (5, 9)])
def test_flop_of_both_towers_are_those_of_the_formula(tiny_bundle: Path, batch: int, length: int) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.spec.image is not None
    text = limits.count_flop(bundle.graph_path("text"), {"batch": batch, "sequence": length})
    assert text == batch * tower_flop(bundle, "text", length)
    image, tokens = bundle.spec.image, bundle.spec.image.tokens
    patches = 2 * (tokens - 1) * image.transformer.width * 3 * image.patch_size**2
    found = limits.count_flop(bundle.graph_path("image"), {"batch": batch})
    assert found == batch * (tower_flop(bundle, "image", tokens) + patches)


def test_a_graph_without_shapes_is_an_error(tmp_path: Path) -> None:
    model = onnx.load(small_graph(tmp_path / "small.onnx"))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(BundleError, match=r"bare\.onnx does not say the shape of convolved, found None"):
        limits.count_flop(tmp_path / "bare.onnx", {"batch": 1, "sequence": 1})


def test_the_ceiling_is_the_fastest_library_at_its_best_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([3.0, 1.0, 2.0, 5.0, 9.0, 4.0])
    monkeypatch.setattr(limits, "_rate", lambda *_: next(rates))
    found = limits.cpu_ceiling((64, 128))
    assert found == Ceiling(flop_per_second=9.0, library="onnxruntime", size=128, dtype="float32")


def test_every_library_multiplies_the_same_matrices() -> None:
    products = {name: np.asarray(work()) for name, work in limits._cpu_products(64).items()}
    assert sorted(products) == ["numpy", "onnxruntime", "torch"]
    for product in products.values():
        np.testing.assert_allclose(product, products["numpy"], rtol=1e-4, atol=1e-4)


# Batches


def test_natural_texts_are_as_long_as_captions_and_texts_of_a_length_have_just_that(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    made = list(batches.make_batches(bundle, (1, 8, 600), ("natural", "77", "2")))
    texts = [batch for batch in made if batch.tower == "text"]
    assert [(batch.title, batch.size) for batch in made if batch.tower == "image"] == [
        ("image", n) for n in (1, 8, 600)
    ]
    for batch in texts:
        assert batch.tokens is not None and batch.length is not None
        ends = batch.feeds["eot_index"]
        assert len(ends) == len(batch.feeds["input_ids"]) == batch.size
        assert batch.feeds["input_ids"].shape[1] == ends.max() + 1 == batch.length
        ids = batch.tokens.input_ids[np.arange(batch.size), ends]
        assert bundle.spec.tokenizer is not None and (ids == bundle.spec.tokenizer.end_id).all()
        if batch.lengths == "natural":
            assert ends.max() < 24
        else:
            assert (ends == int(str(batch.lengths)) - 1).all()


def test_texts_of_a_length_are_tokens_as_the_tokenizer_makes_them(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    tokenizer, _ = front(bundle.spec, bundle.tokenizer_json())
    assert tokenizer is not None
    tokens = batches.of_length(tokenizer, "77", 1)
    whole = tokenizer([" ".join(batches.prompts()[:64])], truncate=True)
    np.testing.assert_array_equal(tokens.input_ids, whole.input_ids)


@pytest.mark.parametrize("length", ["1", "78", "seven", "-3", ""])
def test_a_length_that_no_text_has_is_an_error(tiny_bundle: Path, length: str) -> None:
    with pytest.raises(InputError, match=f"expected natural or a number of tokens from 2 to 77, found {length!r}"):
        bench(tiny_bundle, lengths=(length,), repeats=QUICK)


# All of it


def test_rows_are_every_contestant_on_every_batch(measured: Measured) -> None:
    names = ["onnxruntime, cpu, fp32", "torch, eager, cpu, fp32", "plain onnxruntime, cpu, fp32"]
    found = [(row.title, row.batch, row.contestant) for row in measured.rows]
    titles = ["text, natural", "text, 5", "image"]
    assert sorted(found) == sorted((title, batch, name) for title in titles for batch in (1, 3) for name in names)
    assert measured.left_out == {}
    assert all(row.min_cosine > 0.99999 for row in measured.rows)


def test_ratios_are_to_torch_and_its_own_is_none(measured: Measured) -> None:
    assert measured.baseline == "torch, eager, cpu, fp32"
    assert all((row.ratio is None) == (row.contestant == measured.baseline) for row in measured.rows)


def test_the_part_of_the_limit_is_arithmetic_over_time_over_ceiling(measured: Measured) -> None:
    ceiling = measured.ceilings["cpu"].flop_per_second
    bundle_rows = [row for row in measured.rows if row.tower == "image" and row.batch == 3]
    for row in bundle_rows:
        assert row.flop is not None
        assert row.of_ceiling == pytest.approx(row.flop / row.timing.mean / ceiling)
    assert len(bundle_rows) == 3


def keys_of(data: Any, name: str = "") -> set[str]:
    """The dotted names of all leaves, as KEYS has them; what KEYS explains whole is not entered."""
    if name in KEYS:
        return {name}
    if isinstance(data, dict):
        return set().union(*(keys_of(value, f"{name}.{key}" if name else key) for key, value in data.items()))
    if isinstance(data, list):
        return set().union(*(keys_of(value, f"{name}[]") for value in data))
    return set() if data is None else {name}


def test_the_json_has_the_keys_that_are_documented_and_no_others(measured: Measured) -> None:
    assert keys_of(measured.to_dict()) == set(KEYS)


def test_both_towers_are_followed_from_files_and_strings(measured: Measured) -> None:
    found = {part.tower: part for part in measured.end_to_end}
    assert list(found["image"].stages) == ["read", "decode", "resize", "copy", "compute", "normalise"]
    assert list(found["text"].stages) == ["tokenize", "compute", "normalise"]
    for part in found.values():
        assert sum(part.shares.values()) == pytest.approx(1)
        assert (part.inputs, part.batch) == (3, 3)
    assert found["image"].picture_pixels == 600 * 400  # chelsea has fewer, china more
    assert found["image"].tower_pixels == 32 * 32


def test_openings_are_of_who_took_part(measured: Measured) -> None:
    assert [part.contestant for part in measured.openings] == list(
        dict.fromkeys(row.contestant for row in measured.rows)
    )
    for part in measured.openings:
        assert part.cold > part.opening > 0
        assert (
            part.peak_bytes is not None and part.opened_bytes is not None and part.peak_bytes >= part.opened_bytes > 0
        )


def test_the_table_has_ratios_first(measured: Measured) -> None:
    title, rows = next(iter(table.blocks(measured)))
    assert title == "text, natural, host to host; times as fast as torch, eager, cpu, fp32"
    assert rows[0][:4] == ("ratio", "95% within", "batch", "inputs/s")
    assert len({len(row) for row in rows}) == 1
    alone = dataclasses.replace(measured, rows=tuple(row for row in measured.rows if row.contestant.startswith("onnx")))
    title, rows = next(iter(table.blocks(alone)))
    assert (title, rows[0][0]) == ("text, natural, host to host", "batch")


def test_where_the_baseline_could_not_run_there_is_no_ratio(measured: Measured) -> None:
    rows = [dataclasses.replace(row, ratio=None) for row in measured.rows if row.contestant.startswith("onnx")]
    cells = table.speed_table(rows, "torch, eager, cpu, fp32")
    assert {row[0] for row in cells[1:]} == {"-"}
    assert table.speed_table(rows, rows[0].contestant)[1][0] == "1"


def test_times_that_waver_are_said_to(measured: Measured) -> None:
    def words(high: float) -> str:
        calm = dataclasses.replace(measured.rows[0].timing, median=1.0, low=1.0, high=high)
        row = dataclasses.replace(measured.rows[0], timing=calm)
        return " ".join(table.closing_lines(dataclasses.replace(measured, rows=(row,))))

    assert "intervals is within 15.0%" in words(1.3) and "measure again when it is calm" in words(1.3)
    assert "intervals is within 5.0%" in words(1.1) and "calm" not in words(1.1)


# Who does not take part


def test_transformers_that_is_not_installed_is_left_out(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else real(name, *rest)
    )
    found = bench(
        tiny_bundle, batches=(1,), compare=("transformers",), checkpoint=str(tiny_checkpoint), repeats=QUICK, openings=0
    )
    assert found.left_out == {
        "transformers": "comparing with transformers needs transformers, not installed here; pip install transformers"
    }
    assert found.measured and found.baseline == "onnxruntime, cpu, fp32"


def test_a_checkpoint_of_another_architecture_is_left_out(tiny_bundle: Path, tmp_path: Path) -> None:
    checkpoints_made.make_huggingface(tmp_path / "wide", width=192, heads=3)
    found = bench(
        tiny_bundle, batches=(1,), compare=("torch",), checkpoint=str(tmp_path / "wide"), repeats=QUICK, openings=0
    )
    assert found.left_out == {"torch, eager": "wide is not the model of bundle tiny"}


def test_a_checkpoint_with_other_weights_is_not_compared_in_speed(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    for name in ("text_projection.weight", "visual_projection.weight"):
        weights[name] = np.roll(weights[name], 1, axis=0)
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    found = bench(
        tiny_bundle, batches=(1,), compare=("torch",), checkpoint=str(tmp_path / "other"), repeats=QUICK, openings=0
    )
    assert {row.contestant for row in found.rows} == {"onnxruntime, cpu, fp32"}
    assert found.baseline is None  # not one that gives other embeddings
    assert len(found.left_out) == 2
    for place, why in found.left_out.items():
        assert re.fullmatch(r"torch, eager, cpu, fp32: (image|text, natural), batch 1, host to host", place)
        assert re.match(r"it gives other embeddings, min cosine -?0\.\d{4}: is it the same model\?", why)


def test_a_precision_that_no_cpu_runs_is_left_out_with_its_reason(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "half"
    shutil.copytree(tiny_bundle, bundle)
    from clip_export.extension import extend

    extend(bundle, precision="fp16")
    result = run("bench", bundle, "--precision", "fp16", "--batch", "1", "--device", "cpu")
    assert result.exit_code == 2
    assert "left out: the bundle fp16: fp16 graphs are for GPUs: a CPU computes them in fp32" in result.stdout
    assert result.stderr.startswith("error: not everything that was asked for could be measured\n\nhint: ")


@pytest.mark.skipif(no_gpu() is None, reason="there is a GPU here")
@pytest.mark.parametrize("options", [("--backend", "tensorrt-rtx"), ("--backend", "onnxruntime", "--device", "cuda:0")])
def test_without_a_gpu_a_gpu_backend_is_not_measured(
    tiny_bundle: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    target = tmp_path / "bench.json"
    result = run(
        "bench", tiny_bundle, *options, "--compare", "onnxruntime", "--json", target, "--plot", tmp_path / "x.png"
    )
    assert result.exit_code == 2, result.output
    assert f"left out: {options[1]}: " in result.stdout
    assert "left out: plain onnxruntime: there is no engine of the bundle to compare with" in result.stdout
    content = json.loads(target.read_text())
    assert (content["measured"], content["rows"], content["baseline"]) == (False, [], None)
    assert not (tmp_path / "x.png").exists()


# The command


def test_the_command_prints_and_writes(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_export.benching import measuring

    monkeypatch.setattr(measuring, "Repeats", lambda: QUICK)
    monkeypatch.setattr(
        measuring, "cpu_ceiling", lambda: Ceiling(flop_per_second=1e9, library="numpy", size=8, dtype="float32")
    )
    target, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run("bench", tiny_bundle, "--batch", "2", "--json", target, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("tiny on ")
    assert (
        "the limit of cpu is 1 GFLOP/s, the fastest matrix product measured here (numpy, float32, 8 x 8)"
        in result.stdout
    )
    assert "medians of 6 interleaved rounds; the widest of their 95% intervals is within " in result.stdout
    assert json.loads(target.read_text())["bundle"] == "tiny"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", "0"), "expected sizes such as 1,8,64, found '0'"),
        (("--batch", "a,8"), "expected sizes such as 1,8,64, found 'a,8'"),
        (("--batch", ","), "expected sizes such as 1,8,64"),
        (("--batch", "99999"), "error: expected batch sizes from 1 to 4096, found 99999"),
        (("--lengths", "78"), "error: expected natural or a number of tokens from 2 to 77, found '78'"),
        (("--lengths", ","), "error: expected lengths of texts, found none"),
        (("--compare", "tensorflow"), "error: a bundle cannot be compared with 'tensorflow'"),
        (("--compare", "torch"), "needs the checkpoint that the bundle was built from"),
        (("--backend", "tensort"), "error: there is no backend 'tensort'"),
        (("--precision", "fp99"), "holds no fp99 graphs, only fp32"),
        (("--end-to-end", "nowhere"), "error: nowhere is no directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_before_anything_is_measured(
    tiny_bundle: Path, options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        pytest.fail("an engine was opened")

    monkeypatch.setattr(measuring, "open_entrant", opened)
    result = run("bench", tiny_bundle, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in " ".join(result.stderr.split())


def test_no_bundle_is_an_error(tmp_path: Path) -> None:
    result = run("bench", tmp_path / "nothing")
    assert (result.exit_code, result.stdout) == (2, "")


def test_the_checkpoint_of_the_demo_need_not_be_named(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    options: dict[str, Any] = {"backends": [None], "precisions": [None], "device": None, "most": 1}
    found = entrants.entrants(bundle, compare=("torch",), checkpoint=None, **options)
    assert [(entrant.kind, entrant.checkpoint) for entrant in found] == [("bundle", None), ("torch", "demo")]


# Opening afresh


def test_a_process_that_cannot_open_it_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot be opened in a process of its own: .*nothing does not exist"):
        fresh.measure_opening(Entrant(kind="bundle", bundle=str(tmp_path / "nothing")), [], runs=1)


def test_the_peak_of_a_fresh_process_is_not_that_of_its_parent(tiny_bundle: Path) -> None:
    """getrusage's ru_maxrss would be: it is carried over by exec."""
    held = np.ones(2**29, np.uint8)
    found = fresh.measure_opening(Entrant(kind="bundle", bundle=str(tiny_bundle), most=1), [], runs=1)
    here = memory.peak_bytes()
    assert found.peak_bytes is not None and here is not None
    assert found.peak_bytes < held.nbytes < here


def test_dropping_files_from_the_cache_leaves_them_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    fresh.drop_from_cache([tmp_path / "file"])
    assert (tmp_path / "file").read_bytes() == b"content"


# End to end


def stages_of(*, overlaps: bool = False, threads: int = 2, **stages: float) -> EndToEnd:
    return EndToEnd(
        tower="image",
        inputs=8,
        batch=8,
        stages=stages,
        whole=1.0,
        threads=threads,
        overlaps=overlaps,
        picture_pixels=32 * 224**2,
        tower_pixels=224**2,
    )


def test_on_a_cpu_the_longest_stage_binds_and_preparing_has_many_threads() -> None:
    found = stages_of(threads=1, read=1.0, decode=5.0, resize=2.0, compute=4.0)
    assert (found.binds, found.gain) == ("decode", pytest.approx(12 / 7))
    assert found.shares["decode"] == pytest.approx(5 / 12)
    found = stages_of(threads=32, decode=10.0, resize=3.0, compute=6.0)
    assert (found.binds, found.gain) == ("compute", pytest.approx((13 / 32 + 6) / (13 / 32)))
    found = stages_of(threads=32, tokenize=4.0, compute=3.0)
    assert (found.binds, found.gain) == ("tokenize", pytest.approx(7 / 3))


def test_with_a_gpu_the_slower_side_binds_and_preparing_has_many_threads() -> None:
    stages = {"read": 1.0, "decode": 5.0, "resize": 2.0, "compute": 4.5}
    assert stages_of(overlaps=True, threads=2, **stages).binds == "compute"  # 8 / 2 threads is less than 4.5
    one = stages_of(overlaps=True, threads=1, **stages)
    assert (one.binds, one.gain) == ("decode", pytest.approx(8 / 4.5))  # the other side is next


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            {"decode": 6.0, "compute": 1.0},
            "decode binds (at most 4 times as fast without it): ",
        ),
        ({"decode": 3.0, "compute": 1.0}, "pictures have 32 times the pixels that the tower sees"),
        ({"decode": 1.0, "compute": 3.0}, "compute binds"),
        ({"decode": 1.0, "compute": 3.0}, "int8cpu"),
        ({"read": 3.0, "compute": 1.0}, "faster disk"),
        ({"copy": 3.0, "compute": 1.0}, "larger batches of pixels"),
        ({"normalise": 3.0, "compute": 1.0}, "normalize=False"),
        ({"tokenize": 3.0, "compute": 1.0}, "keep the ids"),
        ({"compute": 1.0}, "compute binds (nearly all of it): "),
    ],
)
def test_the_stage_that_binds_comes_with_what_to_do(stages: dict[str, float], words: str) -> None:
    assert words in advice.advice(stages_of(**stages))


def test_a_stopwatch_takes_medians_of_laps() -> None:
    ticks = iter([0.0, 1.0, 0.0, 5.0, 0.0, 2.0])
    watch = end_to_end.Stopwatch(clock=lambda: next(ticks))
    assert [watch("read", lambda value=value: value) for value in (7, 8, 9)] == [7, 8, 9]
    assert watch.medians(4) == {"read": 0.5}


def test_stages_give_the_embeddings_that_the_encoder_gives(
    tiny_bundle: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed as normalise is the last of all: its result is the embedding."""
    given: list[np.ndarray] = []
    unit_rows = end_to_end.unit_rows
    monkeypatch.setattr(end_to_end, "unit_rows", lambda rows: given.append(unit_rows(rows)) or given[-1])
    bundle = Bundle.open(tiny_bundle)
    engines = entrants.open_engines(bundle, Entrant(kind="bundle", bundle=str(tiny_bundle)))
    image, text = end_to_end.measure(bundle, engines, pairs, 64)
    assert (image.tower, text.tower) == ("image", "text")
    found = end_to_end.inputs_of(pairs, ("text", "image"))
    expected = {
        "text": engines.encoder.encode_text(found["text"]),
        "image": engines.encoder.encode_image(found["image"]),
    }  # type: ignore[arg-type]
    assert cosines(given[0], expected["image"]).min() > 0.999999
    assert cosines(given[-1], expected["text"]).min() > 0.999999
    engines.close()


def test_a_folder_without_captions_has_pictures_alone(tmp_path: Path) -> None:
    shutil.copy(pictures.PHOTOGRAPHS["coffee"], tmp_path)
    assert list(end_to_end.inputs_of(tmp_path, ("text", "image"))) == ["image"]
    with pytest.raises(InputError, match=r"has no captions\.csv or captions\.jsonl, and the bundle no image tower"):
        end_to_end.inputs_of(tmp_path, ("text",))


def test_a_picture_that_does_not_decode_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    found = bench(tiny_bundle, batches=(1,), end_to_end=tmp_path, repeats=QUICK, openings=0)
    (why,) = found.left_out.values()
    assert re.search(r"broken\.png\W+is not an image in a format that Pillow reads", why)
    assert found.rows and not found.measured  # what was timed is not lost


def test_an_engine_that_is_fast_and_wrong_is_seen(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the first of all: everybody is held against the fp32 graphs."""
    work = Engines.work

    def worse(self: Engines, batch: Batch, where: Any) -> Any:
        right = work(self, batch, where)
        return lambda: right() + np.float32(0.03) * np.sign(np.arange(right().shape[1]) % 3 - 1).astype(np.float32)

    monkeypatch.setattr(Engines, "work", worse)
    found = bench(tiny_bundle, batches=(3,), repeats=QUICK, openings=0)
    assert all(measuring.SAME < row.min_cosine < 0.9999 for row in found.rows)
    assert found.rows


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "open_entrant", lambda *_: pytest.fail("an engine was opened"))
    for option in ("--json", "--plot"):
        result = run("bench", tiny_bundle, option, tmp_path / "none" / "x.png")
        assert (result.exit_code, "there is no directory" in result.stderr) == (2, True)


# The chart


def apart(measured: Measured) -> Measured:
    """The same with times so different that no line hides another."""
    names = list(dict.fromkeys(row.contestant for row in measured.rows))
    medians = {name: 10.0**-index for index, name in enumerate(names)}
    rows = [
        dataclasses.replace(row, timing=dataclasses.replace(row.timing, median=medians[row.contestant]))
        for row in measured.rows
    ]
    return dataclasses.replace(measured, rows=tuple(rows))


def test_the_chart_shows_every_contestant_in_its_own_colour(measured: Measured) -> None:
    drawn = chart.picture(apart(measured))
    count = len({row.contestant for row in measured.rows})
    legend = (chart._LEGEND * count + 30) * chart._SCALE
    for part in (
        drawn.crop((0, 0, drawn.width, drawn.height - legend)),
        drawn.crop((0, drawn.height - legend, *drawn.size)),
    ):
        colors = {color for _, color in part.getcolors(2**24) or []}
        assert {chart._color(index) for index in range(count)} <= colors
        assert chart._color(count) not in colors


def test_a_single_batch_is_drawn_too(measured: Measured) -> None:
    single = dataclasses.replace(measured, rows=tuple(row for row in measured.rows if row.batch == 1))
    drawn = chart.picture(apart(single))
    colors = {color for _, color in drawn.crop((0, 0, drawn.width, drawn.height // 2)).getcolors(2**24) or []}
    assert chart._color(0) in colors


def test_a_chart_of_nothing_and_one_without_a_suffix_are_errors(measured: Measured, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was measured"):
        chart.picture(dataclasses.replace(measured, rows=()))
    with pytest.raises(OutputError, match="expected a suffix for a picture"):
        chart.draw(measured, tmp_path / "chart")


# What takes long, or a GPU


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_compiled_towers_give_the_same_embeddings(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    found = bench(
        tiny_bundle,
        batches=(2,),
        compare=("compile",),
        checkpoint=str(tiny_checkpoint),
        repeats=QUICK,
        openings=0,
    )
    assert found.left_out == {}
    rows = [row for row in found.rows if row.contestant == "torch, compiled, cpu, fp32"]
    assert [row.tower for row in rows] == ["text", "image"]
    assert all(row.min_cosine > 0.99999 for row in rows)


@pytest.mark.gpu
def test_on_a_gpu_both_places_are_timed(tiny_bundle: Path) -> None:
    found = bench(tiny_bundle, backends=("onnxruntime",), device="cuda:0", batches=(1,), repeats=QUICK, openings=1)
    places = {row.where for row in found.rows}
    assert places == {"host", "device"} or "timing on the GPU" in found.left_out
    assert all(isinstance(part, Opening) for part in found.openings)
