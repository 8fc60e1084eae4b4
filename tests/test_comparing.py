"""`verify --against`: every precision of a bundle beside the checkpoint that it was built from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import clip_export
from clip_export import comparing
from clip_export.commands import app
from clip_export.comparing import verify_against
from clip_export.errors import CheckpointError, MissingDependencyError


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("comparing") / "demo"))
    clip_export.extend(path, precision="fp16")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, args)], prog_name="clip-export")


def test_every_precision_is_compared_with_the_checkpoint_itself(bundle: Path) -> None:
    found = verify_against(bundle, "demo")
    assert found.passed
    assert {(each.precision, each.title) for each in found.runs} == {
        ("fp32", "onnxruntime, cpu"),
        ("fp16", "simulation of fp16, cpu"),
    }
    golden = clip_export.Bundle.open(bundle).golden()
    assert golden.text is not None
    for each in found.runs:
        assert {stage.name for stage in each.comparison.stages} == {"ids", "pixels"}
        assert all(row.samples > len(golden.text.texts) for row in each.comparison.rows if row.tower == "text")


def test_what_is_printed_and_what_json_has(bundle: Path) -> None:
    result = run(bundle, "--against", "demo", "--precision", "fp32")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("demo on onnxruntime, cpu, fp32, against demo torch")
    assert lines[-1] == "passed"
    assert "inputs: equal" in result.stdout
    result = run(bundle, "--against", "demo", "--precision", "fp32", "--json")
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert [(each["engine"], each["precision"]) for each in found["runs"]] == [("onnxruntime, cpu", "fp32")]


def test_a_contract_that_is_not_kept_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "required_cosine", lambda *_: 1.1)
    result = run(bundle, "--against", "demo", "--precision", "fp32")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "FAILED"


def test_what_cannot_be_compared(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError):
        verify_against(bundle, str(tmp_path))

    def lacking(*_: object) -> None:
        raise MissingDependencyError("transformers is not installed", hint="pip install transformers")

    monkeypatch.setattr(comparing, "open_reference", lacking)
    result = run(bundle, "--against", "transformers:nowhere")
    assert result.exit_code == 2
    assert "error: transformers is not installed" in result.stderr
    assert "hint: pip install transformers" in result.stderr
