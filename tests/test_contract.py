"""Contracts of 8-bit precisions after they are built: what the manifest keeps is what verify, load and build say."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scenes import all_scenes, is_held_out, render
from typer.testing import CliRunner, Result

import clip_export
from clip_export.bundle import Bundle, write_manifest
from clip_export.choice import choose
from clip_export.commands import _eight_bits, app
from clip_export.cosine import cosines, unit_rows
from clip_export.errors import ContractError
from clip_export.manifest import Contract
from clip_export.runtime import open_choice
from clip_export.verification import require_contract

MISSED = ("min cosine of the text tower is 0.9160773, required is 0.99", "R@1 drops by 2.00 points, allowed are 0.5")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="clip-export")


def _held_to(path: Path, contract: Contract) -> Path:
    """The bundle at `path` with a contract for its fp32 graphs, which run everywhere and keep any by the goldens."""
    old = Bundle.open(path)
    write_manifest(
        path,
        name=old.name,
        spec=old.spec,
        provenance=old.manifest.provenance,
        variants=old.manifest.variants,
        contracts={"fp32": contract},
        known=old,
    )
    return path


@pytest.fixture
def kept_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return _held_to(Path(shutil.copytree(tiny_bundle, tmp_path / "kept")), Contract(min_cosine=0.99))


@pytest.fixture
def below_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return _held_to(
        Path(shutil.copytree(tiny_bundle, tmp_path / "below")),
        Contract(min_cosine=0.99, max_recall_drop=0.5, missed=MISSED),
    )


# verify


def test_what_missed_its_contract_fails_though_the_goldens_pass(below_bundle: Path) -> None:
    """Held-out inputs and pairs are not in a bundle: what was measured on them counts as it was."""
    found = clip_export.verify(below_bundle, hostile=False)
    assert all(row.passed for row in found.rows)
    assert found.missed == {"fp32": MISSED}
    assert not found.passed
    assert not clip_export.verify(below_bundle, precision="fp32", hostile=False).passed
    assert not clip_export.verify(below_bundle, backend="onnxruntime", hostile=False).passed
    with pytest.raises(ContractError, match="fp32 missed its contract when it was built: min cosine of the text tower"):
        require_contract(found)


def test_what_kept_its_contract_passes(kept_bundle: Path) -> None:
    found = clip_export.verify(kept_bundle, hostile=False)
    assert found.passed
    assert found.to_dict()["missed"] == {}
    require_contract(found)


def test_verify_says_which_precision_missed_what(below_bundle: Path) -> None:
    result = run("verify", below_bundle)
    assert result.exit_code == 1
    assert result.stdout.endswith(
        f"fp32 was published below its contract: {MISSED[0]}; {MISSED[1]}\nFAILED: below the contract\n"
    )
    result = run("verify", below_bundle, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["missed"], found["passed"]) == ({"fp32": list(MISSED)}, False)


def test_a_precision_that_is_not_asked_for_does_not_count(below_bundle: Path) -> None:
    path = Path(shutil.copytree(below_bundle, below_bundle.with_name("half")))
    clip_export.extend(path, precision="bf16")
    assert clip_export.verify(path, precision="bf16", hostile=False).passed
    assert not clip_export.verify(path, hostile=False).passed


def test_a_precision_that_cannot_be_measured_here_counts(
    below_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clip_export import verification
    from clip_export.errors import MissingDependencyError

    clip_export.extend(below_bundle, precision="bf16")
    old = Bundle.open(below_bundle)
    write_manifest(
        below_bundle,
        name=old.name,
        spec=old.spec,
        provenance=old.manifest.provenance,
        variants=old.manifest.variants,
        contracts={"bf16": Contract(min_cosine=0.9, missed=MISSED[:1])},
        known=old,
    )
    monkeypatch.setattr(verification, "simulation_lacks", lambda: MissingDependencyError("no onnx", hint="get it"))
    found = clip_export.verify(below_bundle, hostile=False)
    assert {row.precision for row in found.rows} == {"fp32"}
    assert (found.missed, found.passed) == ({"bf16": MISSED[:1]}, False)


# load


def test_load_warns_at_the_line_of_the_user(below_bundle: Path) -> None:
    with pytest.warns(UserWarning, match=r"fp32 of .*below misses its accuracy contract: min cosine of") as caught:
        clip_export.load(below_bundle).close()
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message).endswith(f": {MISSED[0]}; {MISSED[1]}")


def test_nothing_else_warns(below_bundle: Path, kept_bundle: Path) -> None:
    """Neither what kept its contract, nor what looks at one that did not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_export.load(kept_bundle).close()
        clip_export.verify(below_bundle, hostile=False)
        bundle = Bundle.open(below_bundle)
        open_choice(bundle, choose(bundle)).close()


@pytest.mark.filterwarnings("always")
def test_commands_warn_in_a_line(below_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a cat\n")
    result = run("embed", below_bundle, "--texts", tmp_path / "texts.txt", "-o", tmp_path / "a.npy")
    assert result.exit_code == 0
    assert f"warning: fp32 of {below_bundle} misses its accuracy contract: {'; '.join(MISSED)}\n" in result.stderr


# build


@pytest.fixture(scope="module")
def image_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The image tower of the demo, held to what no mix of many layers keeps: some stay high."""
    place = tmp_path_factory.mktemp("contract")
    bundle, folder = place / "image", place / "scenes"
    clip_export.build("demo", bundle, towers=("image",))
    folder.mkdir()
    scenes = random.Random("tests/test_contract.py").sample([scene for scene in all_scenes() if is_held_out(scene)], 24)
    for number, scene in enumerate(scenes):
        render(scene, number, 64, oversample=1).save(folder / f"{number}.png")
    least = ("--min-cosine", "0.9998", "--calibration-method", "minmax")
    return bundle, run("build", bundle, "--precision", "auto", "--calibration", folder, *least)


def test_a_build_says_what_is_in_8_bits_and_why_the_rest_is_not(image_build: tuple[Path, Result]) -> None:
    path, result = image_build
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1  # the bundle alone
    found = Bundle.open(path).report()["precisions"]["auto"]["towers"]["image"]
    first, *lines = [line for line in result.stderr.splitlines() if line.startswith("  ")]
    match = re.fullmatch(
        r"  auto image: ([\d.]+) % of the FLOPs of linear layers in int8; "
        r"min cosine ([\d.]+) over golden and held-out inputs, required 0.9998",
        first,
    )
    assert match is not None, first
    assert 0 <= found["share"] - float(match[1]) / 100 < 0.001
    assert float(match[2]) == pytest.approx(found["score"]["cosine"], abs=1e-7)
    high = {name: layer for name, layer in found["layers"].items() if layer["format"] == "fp16"}
    assert 0 < len(high) == len(lines)
    for line, (name, layer) in zip(lines, high.items(), strict=True):
        assert line.split() == [name, "stays", "fp16:", *layer["why"].split()]
    assert len({line.index(" stays ") for line in lines}) == 1


def test_a_build_says_nothing_of_what_was_there(image_build: tuple[Path, Result], tmp_path: Path) -> None:
    path = Path(shutil.copytree(image_build[0], tmp_path / "bundle"))
    result = run("build", path, "--precision", "bf16")
    assert result.exit_code == 0, result.output
    assert "auto" not in result.stderr


def _layer(format_: str, why: str | None = None) -> dict[str, Any]:
    return {"format": format_, "share": 0.1} | ({} if why is None else {"why": why})


def _report(layers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As the report of a bundle has it."""
    return {
        "contract": {"min_cosine": 0.99, "max_recall_drop": None},
        "missed": [],
        "towers": {"text": {"share": 0.99996, "score": {"cosine": 0.9951234}, "layers": layers}},
        "pairs": None,
    } | changes


def test_no_more_layers_are_listed_than_anybody_reads() -> None:
    layers = {f"blocks.{number}.fc1": _layer("fp16", f"reason {number}") for number in range(20)}
    first, *lines = _eight_bits.lines("auto", _report(layers | {"blocks.20.fc1": _layer("int8")}))
    assert first.startswith("  auto text: 99.9 % of the FLOPs of linear layers in int8; min cosine 0.9951234 ")
    assert lines[0] == "    blocks.0.fc1   stays fp16: reason 0"
    assert lines[11] == "    blocks.11.fc1  stays fp16: reason 11"
    assert lines[12:] == ["    and 8 more, see report.json"]


def test_formats_are_those_of_the_layers() -> None:
    layers = {"a": _layer("fp8"), "b": _layer("int8"), "c": _layer("fp32", "the precision map says so")}
    first, last = _eight_bits.lines("fp8", _report(layers))
    assert " in fp8 and int8; " in first
    assert last == "    c  stays fp32: the precision map says so"


@pytest.mark.parametrize(
    ("drop", "most", "words"),
    [
        (0.0, None, "the same on 12 held-out pairs; no limit was set"),
        (8.333333, 0.5, "down by 8.33 points on 12 held-out pairs; allowed are 0.5 points down"),
        (-8.333333, 50.0, "up by 8.33 points on 12 held-out pairs; allowed are 50 points down"),
    ],
)
def test_recall_is_said_where_it_was_measured(drop: float, most: float | None, words: str) -> None:
    contract = {"min_cosine": 0.99, "max_recall_drop": most}
    pairs = {"count": 12, "recall_drop": drop}
    *_, recall, missed = _eight_bits.lines("int8", _report({}, contract=contract, pairs=pairs, missed=list(MISSED[1:])))
    assert recall == f"  int8 R@1: {words}"
    assert missed == f"  int8 misses its contract: {MISSED[1]}"


# The cosine


VALUES = st.floats(-1e6, 1e6, width=32)


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=VALUES), st.data())
def test_cosines_are_those_of_the_definition(found: np.ndarray, data: st.DataObject) -> None:
    expected = data.draw(arrays.arrays(np.float32, found.shape, elements=VALUES))
    rows = zip(found.reshape(-1, found.shape[-1]), expected.reshape(-1, found.shape[-1]), strict=True)
    for cosine, (mine, theirs) in zip(cosines(found, expected), rows, strict=True):
        one, other = mine.astype(np.longdouble), theirs.astype(np.longdouble)
        if not one.any() or not other.any():
            assert np.isnan(cosine)
            continue
        right = (one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum())
        assert cosine == pytest.approx(float(right), abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_row_without_a_direction_has_no_cosine(value: float, everywhere: bool) -> None:
    good = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    bad = good.copy()
    bad[1, slice(None) if everywhere else 2] = value
    for pair in ((bad, good), (good, bad), (bad, bad)):
        found = cosines(*pair)
        assert found.dtype == np.float64
        assert list(np.isnan(found)) == [False, value != 0.0 or everywhere, False]
    assert np.isnan(unit_rows(bad)[1]).all() == (value != 0.0 or everywhere)


def test_one_row_is_not_compared_with_many() -> None:
    with pytest.raises(ValueError, match=r"cosines of shapes \[1, 4\] and \[3, 4\], expected the same"):
        cosines(np.ones((1, 4)), np.ones((3, 4)))
