"""8-bit precisions from end to end on the demo: what is published, what is not, and what is left behind.

Scales are found by `minmax` where they do not matter: that takes a tenth of the time that `mse` does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from PIL import Image
from scenes import all_scenes, caption, is_held_out, render
from typer.testing import CliRunner, Result

import clip_export
from clip_export import backends, quantized, runtime
from clip_export.backends.building import PORTABLE, Target
from clip_export.bundle import Bundle
from clip_export.choice import Choice
from clip_export.commands import app
from clip_export.compilation import PlanOptions
from clip_export.errors import ClipExportError, ContractError, InputError
from clip_export.extension import find_targets
from clip_export.feeds import Data, gather
from clip_export.judging import Reference
from clip_export.manifest import SCHEMA_VERSION, Contract
from clip_export.precision.search import Score, most_evaluations, search
from clip_export.precision_map import HIGH, PrecisionMap, read_map
from clip_export.quantization import QUANTIZED, Quantization
from clip_export.quantized_terms import Terms
from clip_export.quantized_tower import Quantizer
from clip_export.spec import Tower
from clip_export.verification import CONTRACTS

FAST = Quantization(method="minmax")
PAIRS, PIXELS = 48, 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    """A folder of scenes that the demo checkpoint never saw, with captions."""
    rng = random.Random("tests/test_quantized.py")
    scenes = rng.sample([scene for scene in all_scenes() if is_held_out(scene)], PAIRS)
    folder = place / "pairs"
    folder.mkdir()
    lines = []
    for number, scene in enumerate(scenes):
        render(scene, number, PIXELS, oversample=2).save(folder / f"{number:02}.png")
        lines.append(json.dumps({"file": f"{number:02}.png", "caption": caption(scene, rng)}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo that a test may extend."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def auto_bundle(demo_bundle: Path, pairs: Path, place: Path) -> Path:
    """The demo with `auto` graphs. Shared by all tests: copy it before changing it."""
    path = Path(shutil.copytree(demo_bundle, place / "auto" / "bundle"))
    clip_export.extend(path, precision="auto", calibration=[pairs], quantization=FAST)
    return path


@pytest.fixture(scope="module")
def below_bundle(demo_bundle: Path, pairs: Path, place: Path) -> Path:
    """The demo with `int8` graphs that miss their contract and were let pass."""
    path = Path(shutil.copytree(demo_bundle, place / "below" / "bundle"))
    options = dataclasses.replace(FAST, allow_below_contract=True)
    clip_export.extend(path, precision="int8", calibration=[pairs], quantization=options)
    return path


@pytest.fixture(scope="module")
def image_bundle(place: Path) -> Path:
    """The image tower of the demo alone. Shared by all tests: copy it before changing it."""
    return clip_export.build("demo", place / "image", towers=("image",)).path


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every search that is begun."""
    begun: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        begun.append("search")
        return search(*args, **options)

    monkeypatch.setattr(quantized, "search", counted)
    return begun


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def graphs(path: Path, precision: str) -> dict[str, bytes]:
    return {name: data for name, data in contents(path).items() if f".{precision}.onnx" in name}


def strict_json(data: bytes) -> Any:
    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(data, parse_constant=refuse)


def report(path: Path, precision: str) -> dict[str, Any]:
    found: dict[str, Any] = strict_json((path / "report.json").read_bytes())["precisions"][precision]
    return found


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="clip-export")


def error_of(result: Result) -> str:
    """What a command said that failed as it should."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ") and "\nhint: " in result.stderr
    return result.stderr


# auto


def test_auto_publishes_what_keeps_the_contract(auto_bundle: Path) -> None:
    manifest = Bundle.open(auto_bundle).manifest
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.contracts == {"auto": Contract(min_cosine=CONTRACTS["auto"])}
    assert set(manifest.variants) == {"fp32", "auto"}
    assert {"auto.map.json", "image.auto.onnx", "text.auto.onnx"} <= manifest.files.keys()
    found = clip_export.verify(auto_bundle, hostile=False)
    assert found.passed
    rows = {row.tower: row for row in found.rows if row.precision == "auto"}
    assert set(rows) == {"image", "text"}
    for row in rows.values():
        assert row.engine == "simulation of auto, cpu"
        assert row.required_cosine == CONTRACTS["auto"] <= row.min_cosine < 0.99999  # quantized, so not the reference


def test_the_graphs_hold_8_bit_weights_where_the_map_says_so(auto_bundle: Path) -> None:
    found = read_map(auto_bundle / "auto.map.json")
    assert found.precision == "auto"
    assert found.method == FAST.method
    for tower, formats in found.towers.items():
        graph = onnx.load(auto_bundle / f"{tower}.auto.onnx").graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        made_by = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            if node.name in formats:
                source = made_by.get(node.input[1])
                eight = source is not None and source.op_type == "DequantizeLinear"
                assert eight == (formats[node.name] == "int8"), node.name
                if source is not None and eight:
                    assert kinds[source.input[0]] == onnx.TensorProto.INT8
        assert set(formats) <= {node.name for node in graph.node}
    assert "int8" in found.towers["text"].values()
    assert HIGH in found.towers["text"].values()  # int8 everywhere misses the contract, as another test says


def test_the_report_says_how_it_was_made_and_why_layers_stayed_high(auto_bundle: Path) -> None:
    found = report(auto_bundle, "auto")
    assert found["contract"] == {"min_cosine": CONTRACTS["auto"], "max_recall_drop": None}
    assert (found["method"], found["missed"]) == ("minmax", [])
    held_out = PAIRS // 4
    for tower, kind in (("image", "pictures of pairs"), ("text", "captions of the pictures")):
        made = found["towers"][tower]
        assert made["calibrated_on"] == f"{PAIRS - held_out} of {PAIRS} {kind}, {held_out} held out"
        assert 0 < made["share"] <= 1
        layers = made["layers"]
        quantized_share = sum(layer["share"] for layer in layers.values() if layer["format"] == "int8")
        assert made["share"] == pytest.approx(quantized_share)
        assert 1 <= made["evaluations"] <= 2 * most_evaluations(len(layers))  # on a sample, and on all inputs
        assert made["score"]["cosine"] >= CONTRACTS["auto"]
        for layer in layers.values():
            assert ("why" in layer) == (layer["format"] == HIGH)
    text = found["towers"]["text"]["layers"]
    high = [layer for layer in text.values() if layer["format"] == HIGH]
    assert any(re.match(r"alone it breaks the contract: cosine 0\.\d{5}", layer["why"]) for layer in high)
    assert all("alone" in layer for layer in text.values())  # a search tried each
    assert found["pairs"]["count"] == held_out
    assert {row["passed"] for row in found["agreement"]} == {True}
    assert read_map(auto_bundle / "auto.map.json").towers == {
        tower: {name: layer["format"] for name, layer in made["layers"].items()}
        for tower, made in found["towers"].items()
    }


def test_a_map_takes_the_place_of_a_search(auto_bundle: Path, bundle: Path, pairs: Path, searches: list[str]) -> None:
    """Nothing is said but the map, which has the precision and the method: the same bytes come of it."""
    result = run("build", bundle, "--precision-map", auto_bundle / "auto.map.json", "--calibration", pairs)
    assert result.exit_code == 0, result.output
    assert searches == []
    assert (bundle / "auto.map.json").read_bytes() == (auto_bundle / "auto.map.json").read_bytes()
    assert graphs(bundle, "auto") == graphs(auto_bundle, "auto")
    found, searched = report(bundle, "auto"), report(auto_bundle, "auto")
    for tower, made in found["towers"].items():
        assert made["score"] == searched["towers"][tower]["score"]
        assert made["share"] == searched["towers"][tower]["share"]
        assert made["evaluations"] == 1
        high = [layer for layer in made["layers"].values() if layer["format"] == HIGH]
        assert {layer["why"] for layer in high} <= {"the precision map says so"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks.99.x": HIGH}, r"the map of the image tower names layers that the graph has not: blocks\.99\.x"),
        ({"blocks.0.mlp.fc1/MatMul": "fp8"}, "layers of the image tower in fp8, and auto was asked for"),
        (None, "the precision map says nothing of the image tower"),
    ],
    ids=["another graph", "another format", "another tower"],
)
def test_a_map_that_does_not_fit(
    auto_bundle: Path, bundle: Path, pairs: Path, changed: dict[str, str] | None, message: str
) -> None:
    found = read_map(auto_bundle / "auto.map.json")
    towers: dict[Tower, dict[str, str]] = {"text": found.towers["text"]}
    if changed is not None:
        towers["image"] = found.towers["image"] | changed
    given = dataclasses.replace(FAST, precision_map=dataclasses.replace(found, towers=towers))
    before = contents(bundle)
    with pytest.raises(InputError, match=message):
        clip_export.extend(bundle, precision="auto", calibration=[pairs], quantization=given)
    assert contents(bundle) == before


def test_a_mix_with_nothing_in_it_is_an_error(auto_bundle: Path, bundle: Path, pairs: Path) -> None:
    """Allowed below its contract or not: it would be fp16 under another name."""
    found = read_map(auto_bundle / "auto.map.json")
    towers = {tower: dict.fromkeys(layers, HIGH) for tower, layers in found.towers.items()}
    given = dataclasses.replace(
        FAST, precision_map=dataclasses.replace(found, towers=towers), allow_below_contract=True
    )
    before = contents(bundle)
    with pytest.raises(ContractError, match="no layer is left to quantize") as caught:
        clip_export.extend(bundle, precision="auto", calibration=[pairs], quantization=given)
    assert "--allow-below-contract" not in str(caught.value.hint)
    assert contents(bundle) == before


def test_a_stricter_contract_is_kept_by_fewer_layers_and_remembered(
    auto_bundle: Path, bundle: Path, pairs: Path
) -> None:
    result = run(
        *("build", bundle, "--precision", "auto", "--calibration", pairs, "--calibration-method", "minmax"),
        *("--min-cosine", "0.999", "--max-recall-drop", "0"),
    )
    assert result.exit_code == 0, result.output
    assert Bundle.open(bundle).manifest.contracts == {"auto": Contract(min_cosine=0.999, max_recall_drop=0)}
    strict, usual = report(bundle, "auto"), report(auto_bundle, "auto")
    assert strict["contract"] == {"min_cosine": 0.999, "max_recall_drop": 0}
    assert strict["pairs"]["recall_drop"] <= 0
    for tower in ("image", "text"):
        assert strict["towers"][tower]["score"]["cosine"] >= 0.999
        assert strict["towers"][tower]["share"] <= usual["towers"][tower]["share"]
    assert strict["towers"]["text"]["share"] < usual["towers"]["text"]["share"]
    rows = [row for row in clip_export.verify(bundle, hostile=False).rows if row.precision == "auto"]
    assert {row.required_cosine for row in rows} == {0.999}
    assert all(row.passed for row in rows)


# What was interrupted


def test_an_interrupted_search_leaves_the_bundle_alone_and_goes_on(
    auto_bundle: Path, bundle: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle)
    alone = len(read_map(auto_bundle / "auto.map.json").towers["text"])
    scored: list[int] = []
    real = Quantizer.run

    def counted(*args: Any) -> Any:
        scored.append(1)
        return real(*args)

    monkeypatch.setattr(Quantizer, "run", counted)

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done, total) == ("text: quantize one layer alone", alone // 2, alone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clip_export.extend(bundle, precision="auto", calibration=[pairs], quantization=FAST, progress=interrupt)
    first = len(scored)
    assert contents(bundle) == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == [".bundle.calibration", "bundle"]
    clip_export.extend(bundle, precision="auto", calibration=[pairs], quantization=FAST)
    # Nothing of how often it was interrupted, or where the bundle is, shows in what was found.
    assert (bundle / "auto.map.json").read_bytes() == (auto_bundle / "auto.map.json").read_bytes()
    assert graphs(bundle, "auto") == graphs(auto_bundle, "auto")
    found = report(bundle, "auto")["towers"]
    assert found == report(auto_bundle, "auto")["towers"]
    # The image tower's one evaluation and those of half the text tower's layers were remembered.
    assert len(scored) == sum(made["evaluations"] for made in found.values())
    assert 1 + alone // 2 < first < len(scored)


# What misses its contract


def test_int8_misses_its_contract_on_the_demo_and_leaves_a_report(bundle: Path, pairs: Path) -> None:
    before = contents(bundle)
    text = error_of(
        run(
            *("build", bundle, "--precision", "int8", "--calibration", pairs),
            *("--calibration-method", "minmax"),
        )
    )
    path = bundle.with_name("bundle.int8.report.json")
    assert re.search(r"int8 misses its contract: min cosine of the text tower is 0\.\d{7}, required is 0\.99", text)
    assert f"Nothing is published; the report is {path}" in text
    assert "--precision auto leaves the worst layers in fp16" in text
    named = re.findall(r"text (blocks\.\S+) \((\d\.\d{7})\)", text)
    cosines = [float(cosine) for _, cosine in named]
    assert len(named) == 5
    assert cosines == sorted(cosines)
    found = strict_json(path.read_bytes())
    layers = found["towers"]["text"]["layers"]
    assert [f"{layers[name]['alone']['cosine']:.7f}" for name, _ in named] == [cosine for _, cosine in named]
    assert found["missed"] == [text.split("contract: ")[1].split("; worst")[0]]
    assert found["towers"]["text"]["score"]["cosine"] < 0.99 <= found["towers"]["image"]["score"]["cosine"]
    assert contents(bundle) == before
    left = {path.name for path in bundle.parent.iterdir()}
    assert left == {"bundle", ".bundle.calibration", "bundle.int8.report.json"}


def test_what_is_let_pass_is_marked_and_stays_marked(below_bundle: Path) -> None:
    manifest = Bundle.open(below_bundle).manifest
    missed = tuple(report(below_bundle, "int8")["missed"])
    assert manifest.contracts == {"int8": Contract(min_cosine=CONTRACTS["int8"], missed=missed)}
    assert missed
    assert {"int8.map.json", "image.int8.onnx", "text.int8.onnx"} <= manifest.files.keys()
    assert not below_bundle.with_name("bundle.int8.report.json").exists()  # it is in the bundle
    result = run("verify", below_bundle)
    assert result.exit_code == 1
    assert "FAILED: below the contract" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if " int8 " in line]
    assert {line[0]: "FAILED" in line for line in lines} == {"image": False, "text": True}
    found = strict_json(run("verify", below_bundle, "--json").stdout.encode())
    assert not found["passed"]
    verdicts = {(row["precision"], row["tower"]): row["passed"] for each in found["runs"] for row in each["rows"]}
    assert verdicts[("int8", "text")] is False
    assert verdicts[("fp32", "text")] is True


def test_other_precisions_keep_their_contracts_beside_it(below_bundle: Path, tmp_path: Path) -> None:
    """A contract is of its precision alone, and an extension carries those of the others on."""
    path = Path(shutil.copytree(below_bundle, tmp_path / "bundle"))
    made = clip_export.extend(path, precision="bf16")
    assert made.manifest.contracts == Bundle.open(below_bundle).manifest.contracts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_export.load(path).close()


def test_loading_what_misses_its_contract_warns(
    below_bundle: Path, auto_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its plans or graphs run, that is on a GPU: here the fp32 graphs answer in their place."""

    def chosen(bundle: Bundle, **_: object) -> Choice:
        return Choice(backend="onnxruntime", device="cpu", precision="int8" if "below" in str(bundle.path) else "auto")

    monkeypatch.setattr(runtime, "choose", chosen)
    monkeypatch.setattr(Bundle, "graph_path", lambda self, tower, _="": self.path / f"{tower}.onnx")
    with (
        pytest.warns(UserWarning, match=r"int8 of .*bundle misses its accuracy contract: min cosine of the text tower"),
        clip_export.load(below_bundle, precision="int8"),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_export.load(auto_bundle, precision="auto").close()


# What it is calibrated on


def write_pictures(folder: Path, *, plain: int, noise: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(plain + noise):
        levels = np.full((64, 64, 3), 100 + number) if number < plain else rng.integers(0, 256, (64, 64, 3))
        Image.fromarray(levels.astype(np.uint8)).save(folder / f"{number}.png")


def test_pictures_of_one_colour_calibrate_nothing(image_bundle: Path, tmp_path: Path) -> None:
    image = Path(shutil.copytree(image_bundle, tmp_path / "image"))
    before = contents(image)
    write_pictures(tmp_path / "plain", plain=16, noise=0)
    with pytest.raises(InputError, match="all of the 4 calibration pictures that are held out are of one colour each"):
        clip_export.extend(image, precision="auto", calibration=[tmp_path / "plain"], quantization=FAST)
    assert contents(image) == before


@pytest.mark.parametrize("held_out", [True, False])
def test_a_picture_that_cannot_be_read_leaves_nothing_half_done(
    image_bundle: Path, tmp_path: Path, held_out: bool
) -> None:
    """Whether it is met before anything else, or among those that are calibrated on."""
    image, folder = Path(shutil.copytree(image_bundle, tmp_path / "image")), tmp_path / "noise"
    write_pictures(folder, plain=0, noise=16)
    samples = gather(Bundle.open(image), [folder], None).towers["image"]
    damaged = Path(samples.items[int(np.flatnonzero(samples.held_out == held_out)[-1])])
    damaged.write_bytes(damaged.read_bytes()[:5000])
    before = contents(tmp_path)
    text = error_of(run("build", image, "--precision", "int8", "--calibration", folder))
    assert f"'{damaged}' cannot be decoded" in text
    assert contents(tmp_path) == before


def test_a_poor_choice_of_pictures_costs_layers_and_not_the_contract(
    auto_bundle: Path, image_bundle: Path, tmp_path: Path
) -> None:
    """The golden samples judge too, whatever was calibrated on."""
    image = Path(shutil.copytree(image_bundle, tmp_path / "image"))
    folder = tmp_path / "noise"
    write_pictures(folder, plain=0, noise=16)
    made = clip_export.extend(image, precision="auto", calibration=[folder], quantization=FAST)
    assert made.manifest.contracts["auto"].kept
    (row,) = [row for row in clip_export.verify(made, hostile=False).rows if row.precision == "auto"]
    assert row.passed
    found = report(made.path, "auto")["towers"]["image"]
    assert all(math.isfinite(value) for value in found["score"].values() if value is not None)
    assert found["share"] <= report(auto_bundle, "auto")["towers"]["image"]["share"]


def test_without_pictures_nothing_is_begun(
    bundle: Path, tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work was begun")

    monkeypatch.setattr("clip_export.recipe.build", begun)
    monkeypatch.setattr("clip_export.recipe.extend", begun)
    for precision in ("int8", "auto", "fp8"):
        text = error_of(run("build", bundle, "--precision", precision))
        assert f"error: {precision} is calibrated on real pictures, and none were given" in text
        assert "hint: --calibration DIRECTORY" in text
    text = error_of(run("build", "demo", "-o", tmp_path / "new", "--precision", "auto"))
    assert "auto is calibrated on real pictures, and none were given" in text
    assert not (tmp_path / "new").exists()


def test_without_pictures_extend_says_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work was begun")

    monkeypatch.setattr(Reference, "of", begun)
    before = contents(bundle.parent)
    with pytest.raises(InputError, match="calibrated on real pictures, and none were given"):
        clip_export.extend(bundle, precision="auto")
    assert contents(bundle.parent) == before


def test_a_recall_drop_needs_pairs(bundle: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(pairs, plain, ignore=shutil.ignore_patterns("captions.jsonl"))
    text = error_of(run("build", bundle, "--precision", "auto", "--calibration", plain, "--max-recall-drop", "0.5"))
    assert "a recall drop is measured on pairs of pictures and captions, and there are none" in text
    assert "captions.csv or captions.jsonl" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["int8", "--calibration", "empty"], "expected image files in .*empty, found no file at all"),
        (["int8", "--calibration", "few"], "expected at least 8 different pictures .* found 3"),
        (["int8", "--calibration", "pairs", "--calibration-texts", "few.txt"], "8 different texts .* found 1 among 2"),
        (["fp8", "--calibration", "pairs", "--calibration-method", "entropy"], "those of fp8 grow with the number"),
        (["int8cpu", "--calibration", "pairs", "--quantize-attention"], "int8cpu keeps the products inside attention"),
    ],
)
def test_what_cannot_be_is_known_before_a_checkpoint_is_exported(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(pairs / name, tmp_path / "few")
    (tmp_path / "few.txt").write_text("a cat\na cat\n", encoding="utf-8")
    (tmp_path / "pairs").symlink_to(pairs)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, error_of(run("build", "demo", "-o", "new", "--precision", *options)))
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_whose_bundle_is_there_is_not_built_over_it(bundle: Path, pairs: Path) -> None:
    text = error_of(run("build", "demo", "-o", bundle, "--precision", "auto", "--calibration", pairs))
    assert f"add to it: name {bundle} in place of the checkpoint" in text
    assert "without what was added to it" in text


def test_a_report_that_could_not_be_written_is_known_before_any_work(
    bundle: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work was begun")

    monkeypatch.setattr(Reference, "of", begun)
    (bundle.parent / "bundle.int8.report.json").mkdir()
    text = error_of(run("build", bundle, "--precision", "int8", "--calibration", pairs))
    assert "bundle.int8.report.json is a directory, expected the name of a file" in text


# Where it is to run


def targets(precision: str, *gpus: str, options: PlanOptions | None = None) -> list[str]:
    found = find_targets("tensorrt-rtx", gpus, precision, options or PlanOptions())
    return [target.compute_capability for target in found]


@pytest.mark.parametrize("precision", ["fp8", "autofp8"])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_86", PORTABLE])
def test_fp8_is_refused_for_gpus_without_it(precision: str, gpu: str) -> None:
    which = "every GPU from sm_80 on" if gpu == PORTABLE else gpu
    with pytest.raises(InputError, match=f"fp8 was asked for {which}, and GPUs before sm_89") as caught:
        targets(precision, "sm_89", gpu)
    assert "build int8 for it" in str(caught.value.hint)
    assert targets(precision, "sm_89", "sm_120") == ["sm_89", "sm_120"]
    assert targets("int8", "sm_89", gpu) == ["sm_89", gpu]


def test_fp8_is_refused_where_one_plan_is_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's own level of compatibility, for which this machine has neither library nor GPU."""

    class Compiler:
        def target(self, gpu: str | None) -> Target:
            return dataclasses.replace(made, backend="tensorrt")

    (made,) = find_targets("tensorrt-rtx", ["sm_89"], "fp8", PlanOptions())
    monkeypatch.setattr(backends, "compiler", lambda name: Compiler())
    assert find_targets("tensorrt", [], "fp8", PlanOptions())
    compatible = PlanOptions(hardware_compatibility=True)
    assert find_targets("tensorrt", [], "int8", compatible)
    with pytest.raises(InputError, match="fp8 was asked for every GPU from sm_80 on"):
        find_targets("tensorrt", [], "fp8", compatible)


@pytest.mark.parametrize("precision", ["fp8", "autofp8", "bf16", "fp32"])
def test_sm_75_multiplies_in_fp16_and_int8_alone(precision: str) -> None:
    with pytest.raises(InputError, match=rf"in fp16 and int8 alone on sm_75, and {precision} was asked for"):
        targets(precision, "sm_75")
    for known in ("int8", "auto", "int8all", "autoall"):
        assert targets(known, "sm_75") == ["sm_75"]


def test_a_refusal_comes_before_any_work(bundle: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work was begun")

    monkeypatch.setattr("clip_export.recipe.extend", begun)
    text = error_of(
        run(
            *("build", bundle, "--precision", "fp8", "--calibration", pairs),
            *("--engine", "tensorrt-rtx", "--gpu", "sm_86"),
        )
    )
    assert "fp8 was asked for sm_86" in text


def test_plans_of_auto_for_two_generations(image_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    """sm_75 takes graphs of its own, in which all that is not int8 is fp16."""
    path = Path(shutil.copytree(image_bundle, tmp_path / "bundle"))
    made = clip_export.extend(
        path,
        precision="auto",
        engine="tensorrt-rtx",
        gpus=["sm_89", "sm_75"],
        options=PlanOptions(batches=(1, 4)),
        calibration=[pairs],
        quantization=FAST,
    )
    found = {(plan.compute_capability, plan.precision, plan.graph) for plan in made.manifest.plans}
    assert found == {("sm_89", "auto", "image.auto.onnx"), ("sm_75", "autoall", "image.autoall.onnx")}
    assert made.manifest.contracts == dict.fromkeys(("auto", "autoall"), Contract(min_cosine=0.99))
    assert "FLOAT" in multiplied(path / "image.auto.onnx")  # the projection stays fp32 where it can
    assert multiplied(path / "image.autoall.onnx") == {"FLOAT16"}
    for name in ("auto", "autoall"):
        kinds = {tensor.data_type for tensor in onnx.load(path / f"image.{name}.onnx").graph.initializer}
        assert onnx.TensorProto.INT8 in kinds
    assert clip_export.verify(path, hostile=False).passed
    for plan in made.manifest.plans:
        assert made.manifest.files[plan.file].size > 10_000


def multiplied(graph: Path) -> set[str]:
    """The types in which the linear layers of a graph are computed, between quantization and its inverse."""
    import onnx_ir

    model = onnx_ir.load(graph)
    types = {node.inputs[0].dtype for node in model.graph if node.op_type == "MatMul"}
    return {dtype.name for dtype in types}


def test_an_engine_for_graphs_that_are_there_needs_no_pictures(auto_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(auto_bundle, tmp_path / "bundle"))
    result = run(
        *("build", path, "--precision", "auto", "--engine", "tensorrt-rtx", "--gpu", "sm_89"),
        *("--towers", "image", "--batch-profiles", "1"),
    )
    assert result.exit_code == 0, result.output
    assert [plan.precision for plan in Bundle.open(path).manifest.plans] == ["auto"]


# What is said of it


def test_inspect_and_verify_show_it(auto_bundle: Path) -> None:
    result = run("inspect", auto_bundle)
    assert result.exit_code == 0
    assert re.search(r"auto +image +image\.auto\.onnx", result.stdout)
    assert "auto.map.json" in result.stdout
    plain = strict_json(run("inspect", auto_bundle, "--json").stdout.encode())
    assert plain["contracts"] == {"auto": {"min_cosine": CONTRACTS["auto"], "max_recall_drop": None, "missed": []}}
    result = run("verify", auto_bundle, "--json")
    assert result.exit_code == 0
    found = strict_json(result.stdout.encode())
    assert found["passed"]
    assert {row["required_cosine"] for each in found["runs"] for row in each["rows"] if row["precision"] == "auto"} == {
        CONTRACTS["auto"]
    }


def test_another_contract_for_graphs_that_are_there_is_not_passed_over(auto_bundle: Path) -> None:
    before = contents(auto_bundle)
    for option in (("--min-cosine", 0.999), ("--precision-map", auto_bundle / "auto.map.json")):
        text = error_of(run("build", auto_bundle, "--precision", "auto", *option))
        assert "auto graphs are there already, and would have to be made anew for this data or contract" in text
        assert "--force" in text
    assert contents(auto_bundle) == before


def test_the_same_build_again_changes_nothing(auto_bundle: Path, pairs: Path) -> None:
    before = contents(auto_bundle)
    clip_export.extend(auto_bundle, precision="auto", calibration=[pairs], quantization=FAST)
    assert contents(auto_bundle) == before
    with pytest.raises(InputError, match="nowhere cannot be read"):
        clip_export.extend(auto_bundle, precision="auto", calibration=["nowhere"], quantization=FAST)


def test_a_map_reproduces_quantized_attention_and_the_half_graph(
    image_bundle: Path, pairs: Path, tmp_path: Path
) -> None:
    first, second = (Path(shutil.copytree(image_bundle, tmp_path / name)) for name in ("first", "second"))
    options = dataclasses.replace(FAST, quantize_attention=True, min_cosine=0.95)
    clip_export.extend(first, precision="int8", calibration=[pairs], quantization=options)
    given = read_map(first / "int8.map.json")
    assert given.attention
    assert set(report(first, "int8")["towers"]["image"]["attention"].values()) == {"int8"}
    again = dataclasses.replace(FAST, precision_map=given)
    clip_export.extend(second, precision="int8", calibration=[pairs], quantization=again)
    for name in ("int8.map.json", "image.int8.onnx"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_graphs_for_gpus_do_not_run_on_a_cpu(auto_bundle: Path) -> None:
    with pytest.raises(ClipExportError, match="auto graphs are for GPUs"):
        clip_export.load(auto_bundle, precision="auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "there is no calibration method 'guess'"),
        ({"min_cosine": 0.0}, "expected a min cosine above 0 and up to 1, found 0"),
        ({"min_cosine": 1.5}, "expected a min cosine above 0 and up to 1, found 1.5"),
        ({"min_cosine": math.nan}, "found nan"),
        ({"max_recall_drop": -1.0}, "expected a recall drop in points, 0 to 100, found -1"),
        ({"max_recall_drop": math.nan}, "found nan"),
        ({"precision_map": PrecisionMap(precision="fp16", method="mse", towers={})}, "of 'fp16', which is no 8-bit"),
        (
            {"precision_map": PrecisionMap(precision="auto", method="x", towers={})},
            "'x', which the precision map names",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Quantization(**options)


def test_a_map_with_attention_is_not_for_onnxruntime() -> None:
    given = PrecisionMap(precision="auto", method="mse", towers={}, attention=True)
    with pytest.raises(InputError, match="int8cpu keeps the products inside attention in fp32") as caught:
        Quantization(precision_map=given).require("int8cpu")
    assert caught.value.hint == "give a map without attention"
    Quantization(precision_map=given).require("auto")


@pytest.mark.parametrize(("cosine", "text"), [(0.98, "0.9800000"), (0.99999998, "0.99999998"), (math.nan, "nan")])
def test_what_is_missed_by_little_is_seen_to_be_missed(cosine: float, text: str) -> None:
    data = Data(towers={}, paired=False)
    terms = Terms(precision="int8", options=Quantization(min_cosine=1), data=data, references={})
    score = Score(cosine=cosine, mean_cosine=1, agreement=1)
    assert list(terms.missed({"text": score}, None)) == [f"min cosine of the text tower is {text}, required is 1"]


def test_the_contract_of_every_8_bit_precision_is_known() -> None:
    names: Sequence[str] = [*QUANTIZED, "int8cpu"]
    assert {CONTRACTS[name] for name in names} == {0.99}
    assert issubclass(ContractError, ClipExportError)
