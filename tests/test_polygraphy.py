"""The files for Polygraphy, proved by the real `polygraphy` command: it passes our graphs and fails damaged ones."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import bundles_made
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from clip_export import polygraphy_files
from clip_export.backends.building import ShapeRange
from clip_export.bundle import Bundle
from clip_export.errors import BundleError, InputError, MissingDependencyError, OutputError

COMMAND = Path(sys.executable).with_name("polygraphy")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """A bundle with stand-ins for its graphs, which is all that writing needs."""
    directory = tmp_path / "small"
    directory.mkdir()
    bundles_made.fill(directory)
    return Bundle.open(directory)


def run(line: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line)
    assert words[0] == "polygraphy"
    return subprocess.run([COMMAND, *words[1:]], capture_output=True, text=True, check=False, timeout=300)


def test_files_hold_golden_samples_and_reference(bundle: Bundle, tmp_path: Path) -> None:
    files = polygraphy_files.write(bundle, tmp_path / "out")
    names = ["text.inputs.json", "text.reference.json", "image.inputs.json", "image.reference.json"]
    assert [path.name for path in files] == names
    golden = bundle.golden().text
    assert golden is not None
    inputs = load_json(str(files[0]))
    assert len(inputs) == len(golden.texts)
    assert [feed["eot_index"].item() for feed in inputs] == golden.eot_index.tolist()
    assert inputs[1]["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(inputs[1]["input_ids"], golden.input_ids[1:2])
    results = RunResults.load(str(files[1]))
    assert list(results.keys()) == [polygraphy_files.REFERENCE]
    found = np.concatenate([iteration["embedding"] for iteration in results[polygraphy_files.REFERENCE]])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, golden.outputs["embedding"])


def test_the_command_passes_on_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    polygraphy_files.write(bundle, tmp_path)
    lines = polygraphy_files.command_lines(bundle, tmp_path)
    assert len(lines) == 2
    for line in lines:
        done = run(line)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout


@pytest.mark.parametrize("tower", ["text", "image"])
def test_the_command_fails_on_a_damaged_graph(bundle: Bundle, tower: str, tmp_path: Path) -> None:
    polygraphy_files.write(bundle, tmp_path / "files")
    shutil.copytree(bundle.path, tmp_path / "bundle")
    path = tmp_path / "bundle" / f"{tower}.onnx"
    damage(path)
    damaged = Bundle(tmp_path / "bundle", bundle.manifest)
    line = next(line for line in polygraphy_files.command_lines(damaged, tmp_path / "files") if path.name in line)
    done = run(line)
    assert done.returncode != 0
    assert "FAILED" in done.stdout


def damage(path: Path) -> None:
    """Add noise as large as itself to one matrix of weights."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 2 and array.shape[0] == array.shape[1]:
            noise = np.random.default_rng(0).standard_normal(array.shape, dtype=np.float32) * array.std()
            tensor.CopyFrom(numpy_helper.from_array(array + noise, tensor.name))
            onnx.save(model, path)
            return
    raise AssertionError("no square matrix found")


def test_command_lines_for_tensorrt(small: Bundle) -> None:
    manifest = small.manifest
    graphs = {"fp32": manifest.variants["fp32"], "fp16": manifest.variants["fp32"]}
    profile = {
        "input_ids": ShapeRange(min=(1, 1), opt=(8, 16), max=(64, 77)),
        "eot_index": ShapeRange(min=(1,), opt=(8,), max=(64,)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(manifest), "variants", graphs, raising=False)
        patch.setattr(polygraphy_files, "CONTRACTS", {"fp32": 0.99999, "fp16": 0.9999})
        text, _ = polygraphy_files.command_lines(
            small, "a b", precision="fp16", backends=("tensorrt-rtx",), profiles={"text": (profile, profile)}
        )
    assert text.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run ")
    assert "--trt --strongly-typed --trt-min-shapes 'input_ids:[1,1]' 'eot_index:[1]' --trt-opt-shapes" in text
    assert text.count("--trt-max-shapes 'input_ids:[64,77]' 'eot_index:[64]'") == 2
    assert "--load-inputs 'a b/text.inputs.json'" in text
    assert text.endswith("--compare cosine_similarity --cosine-similarity-threshold 0.9999")


def test_fp32_on_tensorrt_is_refused_with_what_to_do(small: Bundle) -> None:
    with pytest.raises(InputError, match="no fp32 kernel for the Attention operator") as caught:
        polygraphy_files.command_lines(small, "out", backends=("tensorrt",))
    assert caught.value.hint == "compare the fp16 graphs: --precision fp16"


def test_unknown_backend(small: Bundle) -> None:
    with pytest.raises(InputError, match="expected backends among onnxruntime, tensorrt, tensorrt-rtx, found openvino"):
        polygraphy_files.command_lines(small, "out", backends=("openvino",))


def test_a_precision_that_the_bundle_lacks(small: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no int4 text graph"):
        polygraphy_files.write(small, tmp_path / "out", precision="int4")
    assert not (tmp_path / "out").exists()


def test_existing_files_stay(small: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "image.inputs.json").write_text("mine")
    with pytest.raises(OutputError, match=r"there already: .*image\.inputs\.json") as caught:
        polygraphy_files.write(small, out)
    assert caught.value.hint == "choose another directory, or remove these files first"
    assert [path.name for path in out.iterdir()] == ["image.inputs.json"]
    assert (out / "image.inputs.json").read_text() == "mine"
    assert len(polygraphy_files.write(small, out, force=True)) == 4
    assert (out / "image.inputs.json").read_text() != "mine"


def test_all_files_or_none(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, iterations: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(polygraphy_files._Tools, "results", full)
    with pytest.raises(OutputError, match="cannot be written: no space left on device"):
        polygraphy_files.write(small, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_not_into_the_bundle(small: Bundle) -> None:
    with pytest.raises(OutputError, match="lies inside the bundle"):
        polygraphy_files.write(small, small.path)
    Bundle.open(small.path)


def test_without_polygraphy(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    with pytest.raises(MissingDependencyError, match="Polygraphy cannot be imported") as caught:
        polygraphy_files.write(small, tmp_path / "out")
    assert caught.value.hint == "pip install 'clip-export[polygraphy]'"


def test_with_an_old_polygraphy(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("polygraphy.comparator.CosineSimilarityCompareFunc")
    with pytest.raises(MissingDependencyError, match=r"no comparison by cosine alone; 0\.53 has it"):
        polygraphy_files.write(small, tmp_path / "out")
