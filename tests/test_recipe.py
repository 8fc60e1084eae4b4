"""`clip-export build` with engines: options, recipe files, and what each says where it cannot do what was asked."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from clip_export.bundle import Bundle
from clip_export.commands import app
from clip_export.errors import InputError
from clip_export.recipe import Recipe, is_bundle, read_recipe

RECIPES = Path(__file__).parents[1] / "engines" / "recipes"
RTX = ("--engine", "tensorrt-rtx", "--gpu", "sm_86")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may extend."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def build(*args: object) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, args)], prog_name="clip-export")


def refusal(*args: object) -> str:
    result = build(*args)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr


def test_engines_for_a_bundle(bundle: Path) -> None:
    result = build(
        bundle, *RTX, "--gpu", "sm_120", "--batch-profiles", "1,2", "--sequence-profiles", "4", "--jobs", "2"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{bundle}\n"
    plans = Bundle.open(bundle).manifest.plans
    assert len(plans) == 4
    assert [len(plan.profiles) for plan in plans if plan.tower == "text"] == [4, 4]
    line = next(line for line in result.stderr.splitlines() if "sm_86 fp16 text" in line)
    assert line.endswith("MiB, attention fused")


def test_a_checkpoint_becomes_a_bundle_with_engines(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = build(tiny_checkpoint, "-o", tmp_path / "out", *RTX, "--max-batch", "2", "--towers", "image")
    assert result.exit_code == 0, result.output
    found = Bundle.open(tmp_path / "out").manifest
    assert set(found.variants) == {"fp32", "fp16"}
    assert [plan.tower for plan in found.plans] == ["image"]


def test_an_engine_that_cannot_be_built_is_refused_before_the_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = refusal(tiny_checkpoint, "-o", tmp_path / "out", "--engine", "tensorrt-rtx", "--gpu", "sm_90")
    assert "builds for sm_75, sm_80" in text
    assert "portable" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "is a bundle already; there is nothing to add to it"),
        (("--outputs", "pooled", *RTX), "is a bundle, for which --outputs is settled"),
        (("--gpu", "sm_86", "--precision", "fp16"), "--gpu is about plans, and no engine to compile them is named"),
        (("--max-batch", "8", "--precision", "fp16"), "--max-batch is about plans, and no engine"),
        (("--precision", "fp4"), "there is no precision 'fp4'"),
        ((*RTX, "--batch-profiles", "0"), "expected a batch profile from 1 to 4096, found 0"),
        ((*RTX, "--sequence-profiles", "999"), "sequence profile 999 is outside 1.."),
        ((*RTX, "--calibration", "nowhere"), "nowhere"),
        (("--engine", "tensorrt"), "TensorRT"),
        (("--engine", "onnxruntime"), "'onnxruntime' compiles no plans"),
    ],
)
def test_refusals(bundle: Path, args: tuple[str, ...], message: str) -> None:
    text = refusal(bundle, *args)
    assert message in text
    assert "hint: " in text


def test_what_failed_after_the_export_says_that_the_export_is_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = refusal(tiny_checkpoint, "-o", tmp_path / "out", *RTX, "--sequence-profiles", "999")
    assert "sequence profile 999 is outside 1.." in text
    assert "out is built and keeps its fp32 graphs: name it in place of the checkpoint next time" in text
    assert build(tmp_path / "out", *RTX, "--batch-profiles", "1", "--towers", "image").exit_code == 0


def test_a_checkpoint_whose_bundle_is_there_is_added_to_by_its_bundle(tiny_checkpoint: Path, bundle: Path) -> None:
    text = refusal(tiny_checkpoint, "-o", bundle, *RTX)
    assert f"{bundle} already holds a bundle" in text
    assert f"add to it: name {bundle} in place of the checkpoint; --force builds it anew, without what was" in text


def test_a_bundle_called_demo_is_named_so_that_it_is_not_the_checkpoint(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo_bundle, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert "name ./demo in place of the checkpoint" in refusal("demo", "-o", "demo", "--precision", "fp16")
    assert build("./demo", "--precision", "fp16").exit_code == 0
    assert "fp16" in Bundle.open(tmp_path / "demo").manifest.variants


def test_calibration_without_a_precision(bundle: Path, tmp_path: Path) -> None:
    assert "calibration measures ranges for a precision" in refusal("demo", "-o", tmp_path / "x", "--calibration", "x")


def test_the_same_again_says_so(bundle: Path) -> None:
    assert build(bundle, *RTX, "--batch-profiles", "1", "--towers", "image").exit_code == 0
    again = build(bundle, *RTX, "--batch-profiles", "1", "--towers", "image")
    assert again.exit_code == 0
    assert "the plans were there already; --force builds them again" in again.stderr
    assert "built in" not in again.stderr


def test_numbers_that_are_none(bundle: Path) -> None:
    result = build(bundle, *RTX, "--batch-profiles", "1,many")
    assert result.exit_code == 2
    assert "expected whole numbers with commas" in " ".join(result.stderr.replace("│", " ").split())


# Recipes


def test_a_recipe_is_the_same_as_the_options(bundle: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'checkpoint = "{bundle}"\nengine = "tensorrt-rtx"\ngpu = ["sm_86"]\nbatch-profiles = [1, 2]\n',
        encoding="utf-8",
    )
    assert build(recipe).exit_code == 0
    first = Bundle.open(bundle).manifest.plans
    result = build(bundle, *RTX, "--batch-profiles", "1,2")
    assert result.exit_code == 0
    assert Bundle.open(bundle).manifest.plans == first  # the same key: nothing was built again
    assert build(recipe, "--batch-profiles", "3", "--towers", "image").exit_code == 0  # options go before the recipe
    assert len(Bundle.open(bundle).manifest.plans) == 3


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_project_are_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.engine is not None
    recipe.plan_options()
    assert f"clip-export build engines/recipes/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint = 3", "recipe.toml.checkpoint: expected str, found 3"),
        ('checkpoint = "demo"\nspeed = 11', "recipe.toml: unknown key speed"),
        ('engine = "tensorrt"', "recipe.toml: missing key checkpoint"),
        ('checkpoint = "demo"\nbatch-profiles = ["1"]', "recipe.toml.batch_profiles"),
        ("checkpoint = ", "recipe.toml is not a TOML file"),
        (None, "recipe.toml cannot be read: No such file"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert message in caught.value.message
    assert message in refusal(path)


def test_every_option_of_the_command_is_a_key_of_a_recipe() -> None:
    import typer.main

    command = typer.main.get_command(app).commands["build"]  # type: ignore[attr-defined]
    options = {param.name for param in command.params} - {"force", "help", "install_completion", "show_completion"}
    assert options == {field.name for field in dataclasses.fields(Recipe)}


# Interruption


def test_ctrl_c_while_a_plan_is_built_leaves_the_bundle_as_it_was(bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    # A process started by a background shell ignores SIGINT, so this one is told what to do with it.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from clip_export.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, "build", str(bundle), *RTX, "--batch-profiles", "1,2,3,4,5,6,7,8"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(bundle.parent.glob(".bundle.building-*/.graphs-*/*/*.onnx")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted; nothing half-written was left\n")
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_the_demo_is_the_packages_own_where_a_bundle_is_called_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert not is_bundle("demo") and is_bundle("./demo") and is_bundle(str(tmp_path / "demo"))
