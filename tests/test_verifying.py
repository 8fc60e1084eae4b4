"""`verify`: every engine on golden samples, hostile inputs, pairs and an index, beside its original."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pictures
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

import clip_export
from clip_export import backends, verification, verifying
from clip_export.commands import app
from clip_export.encoder import Encoder
from clip_export.errors import (
    BackendError,
    CheckpointError,
    DeviceError,
    InputError,
    MissingDependencyError,
    OutputError,
)
from clip_export.pair_sources import open_pairs
from clip_export.retrieval import Recall
from clip_export.verifying import KEYS, Asked, IndexInputs, Verification, ranks, running, work, zero_shot
from clip_export.verifying.report import write


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("verifying") / "demo"))
    clip_export.extend(path, precision="fp16")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with captions and labels, two captions for one of them."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["file,caption,label"]
    for name in ("chelsea", "coffee", "china", "rocket"):
        path = pictures.PHOTOGRAPHS[name]
        shutil.copy(path, folder / path.name)
        lines.append(f"{path.name},a photo of {name},{'cat' if name == 'chelsea' else 'thing'}")
    lines.append(f"{pictures.PHOTOGRAPHS['chelsea'].name},a cat that looks at you,")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def everything(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """All that can be asked of the demo, with an index of its own."""
    index, images = made_index(bundle, tmp_path_factory.mktemp("index"))
    return clip_export.verify(bundle, against="demo", pairs="demo", index=index, inputs=IndexInputs(images=[images]))


def made_index(bundle: Path, folder: Path) -> tuple[Path, Path]:
    """Vectors of the demo's pictures by the bundle itself, and the folder of these pictures."""
    images = folder / "images"
    images.mkdir()
    for number, sample in enumerate(open_pairs("demo")):
        (images / f"{number:03}.jpg").write_bytes(sample.data)
    with clip_export.load(bundle) as clip:
        np.save(folder / "index.npy", clip.encode_image(sorted(images.iterdir())))
    return folder / "index.npy", images


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, args)], prog_name="clip-export")


# Everything at once


def test_every_precision_is_asked_everything(everything: Verification) -> None:
    assert (everything.verdict, everything.unmeasured) == ("passed", ())
    assert {(each.precision, each.title) for each in everything.runs} == {
        ("fp32", "onnxruntime, cpu"),
        ("fp16", "simulation of fp16, cpu"),
    }
    for each in everything.runs:
        assert {row.tower for row in each.rows} == {"text", "image"}
        assert len(each.checks) > 10
        assert each.comparison is not None
        assert {stage.name for stage in each.comparison.stages} == {"ids", "pixels"}
        samples = {row.tower: row.samples for row in each.rows}
        assert all(row.samples > samples[row.tower] for row in each.comparison.rows)  # the hostile ones as well
        assert each.retrieval is not None and each.retrieval.ranks.pairs == 128
        assert each.index is not None and each.index.safe


def keys_of(data: Any, name: str = "") -> set[str]:
    """The dotted names of all leaves, as KEYS has them; what KEYS explains whole is not entered."""
    if name in KEYS:
        return {name}
    if isinstance(data, dict):
        return set().union(*(keys_of(value, f"{name}.{key}" if name else key) for key, value in data.items()))
    if isinstance(data, list):
        return set().union(*(keys_of(value, f"{name}[]") for value in data))
    return set() if data is None else {name}


def test_the_json_has_the_keys_that_are_documented_and_no_others(everything: Verification) -> None:
    assert keys_of(json.loads(json.dumps(everything.to_dict()))) == set(KEYS)


def test_the_page_shows_all_of_it_in_a_browser(everything: Verification, bundle: Path, tmp_path: Path) -> None:
    command = "clip-export verify engines/demo --pairs demo"
    page = write(
        everything, clip_export.Bundle.open(bundle), tmp_path / "report", pairs=open_pairs("demo"), command=command
    )
    text = page.read_text(encoding="utf-8")
    for said in ("Passed", "Hostile inputs", "Stage by stage", "zero-shot accuracy, 45 labels", "Mix freely", command):
        assert said in text, said
    assert json.loads((tmp_path / "report" / "verification.json").read_text())["verdict"] == "passed"
    program = browser.find()
    if program is None:
        pytest.skip("needs Chromium: $CHROMIUM names none")
    with browser.started(program, tmp_path / "profile") as tab:
        visit = tab.open(page, width=1100)
        assert tab.evaluate("document.querySelector('h1').textContent").endswith("Passed")
        assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert len(tab.screenshot()) > 20_000
    asked = [address for address in visit.requests if not address.startswith("data:")]
    assert (asked, visit.complaints) == ([page.resolve().as_uri()], [])


def test_what_is_printed(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, "--precision", "fp32", "--against", "demo", "--pairs", "demo", "--report", tmp_path / "r")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "demo on onnxruntime, cpu"
    assert lines[-1] == "passed"
    for said in ("checks passed", "inputs: equal", "R@10 text to image", "zero-shot, 45 labels", "against demo torch"):
        assert said in result.stdout, said
    assert (tmp_path / "r" / "index.html").is_file()


# What fails


def test_a_contract_that_is_not_kept_fails(bundle: Path) -> None:
    result = run(bundle, "--precision", "fp16", "--min-cosine", "0.9999999", "--golden-only")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "FAILED: below the contract"
    found = clip_export.verify(bundle, precision="fp16", min_cosine=0.9999999, hostile=False)
    assert "text embedding is below its contract" in found.sentences[0]
    assert not found.runs[0].checks


class Shuffled(Encoder):
    """An engine whose image embeddings belong to other pictures, and lose their way on the golden ones too."""

    @classmethod
    def of(cls, encoder: Encoder) -> Encoder:
        original = encoder.encode_pixels
        encoder.encode_pixels = lambda pixels, **options: original(pixels, **options)[::-1]  # type: ignore[method-assign]
        return encoder


def test_pairs_that_are_not_found_any_more_fail(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = clip_export.load(bundle, precision="fp32")
    monkeypatch.setattr(running, "find_runs", lambda *_: ([("shuffled", "fp16", lambda: Shuffled.of(opened))], (), ()))
    found = clip_export.verify(bundle, pairs="demo", hostile=False)
    retrieval = found.runs[0].retrieval
    assert found.verdict == "failed"
    assert retrieval is not None and min(retrieval.drop.image_to_text, retrieval.drop.text_to_image) > 90
    assert "R@1 image to text falls by" in found.sentences[0]
    flip = retrieval.to_dict()["flips"][0]
    assert flip["query"]["picture"].endswith(".jpg") and flip["engine_rank"] > flip["reference_rank"]
    assert retrieval.zero_shot is not None and retrieval.zero_shot.engine < 0.5 < retrieval.zero_shot.reference
    page = write(found, clip_export.Bundle.open(bundle), tmp_path, pairs=open_pairs("demo")).read_text()
    assert "Failed" in page and "Largest rank flips" in page
    assert page.count("data:image/jpeg;base64,") > 24  # thumbnails beside the matrices' own


def test_one_pair_is_never_too_many(everything: Verification) -> None:
    retrieval = everything.runs[0].retrieval
    assert retrieval is not None
    one, two = 100 / 128, 200 / 128
    for images, texts, passed in ((one, one, True), (two, one, False), (one, two, False)):
        drop = Recall(image_to_text=images, text_to_image=texts)
        assert dataclasses.replace(retrieval, drop=drop).passed is passed


def test_a_picture_with_several_captions_is_one_picture(bundle: Path, folder: Path) -> None:
    found = clip_export.verify(bundle, precision="fp16", pairs=folder, hostile=False).runs[0].retrieval
    assert found is not None
    assert found.allowed == Recall(image_to_text=100 * 2 / 5, text_to_image=100 / 5)


def test_an_index_of_another_model_fails(bundle: Path, tmp_path: Path) -> None:
    index, images = made_index(bundle, tmp_path)
    vectors = np.load(index)
    np.save(index, vectors @ np.linalg.qr(np.random.default_rng(0).normal(size=(128, 128)))[0].astype(np.float32))
    result = run(bundle, "--precision", "fp32", "--golden-only", "--index", index, "--images", images)
    assert result.exit_code == 1
    assert "Re-embed" in result.stdout or "Not the same inputs" in result.stdout


def test_an_index_of_texts(bundle: Path, tmp_path: Path) -> None:
    texts = [f"a photo of {number} circles" for number in range(101)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    with clip_export.load(bundle) as clip:
        np.save(tmp_path / "texts.npy", clip.encode_text(texts))
    asked = ("--precision", "fp32", "--golden-only", "--index", tmp_path / "texts.npy")
    result = run(bundle, *asked, "--texts", tmp_path / "texts.txt")
    assert result.exit_code == 0, result.output
    assert "Mix freely" in result.stdout
    (tmp_path / "texts.txt").write_text("\n".join(texts[1:]))
    result = run(bundle, *asked, "--texts", tmp_path / "texts.txt")
    assert (result.exit_code, "has 101 vectors, and 100 inputs were given" in result.stderr) == (2, True)


# What cannot be measured


def test_what_cannot_be_compared_is_exit_code_2(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError):
        clip_export.verify(bundle, against=str(tmp_path))
    assert run(bundle, "--against", tmp_path).exit_code == 2

    def lacking(*_: object) -> None:
        raise MissingDependencyError("transformers is not installed", hint="pip install transformers")

    monkeypatch.setattr(work, "open_reference", lacking)
    result = run(bundle, "--against", "transformers:nowhere")
    assert result.exit_code == 2
    assert "error: transformers is not installed" in result.stderr
    assert "hint: pip install transformers" in result.stderr


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_a_gpu_that_is_not_here_is_exit_code_2(bundle: Path, backend: str) -> None:
    if backends.status(backend).works:
        pytest.skip(f"{backend} works here")
    result = run(bundle, "--backend", backend)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_an_engine_that_cannot_be_opened_is_not_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Encoder:
        raise DeviceError("the GPU has no memory left", hint="close something")

    real = running.find_runs

    def with_broken(*args: Any) -> Any:
        runs, notes, unmeasured = real(*args)
        return [*runs, ("tensorrt 11", "fp16", broken)], notes, unmeasured

    monkeypatch.setattr(running, "find_runs", with_broken)
    found = clip_export.verify(bundle, precision="fp32", hostile=False)
    assert (found.verdict, found.passed, len(found.runs)) == ("not measured", False, 1)
    assert found.unmeasured == ("fp16 on tensorrt 11 was not measured: the GPU has no memory left",)
    result = run(bundle, "--precision", "fp32", "--golden-only")
    assert result.exit_code == 2
    assert "NOT MEASURED: fp16 on tensorrt 11" in result.stdout


def test_a_simulation_that_lacks_a_package_is_not_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = MissingDependencyError("it needs onnx", hint="pip install onnx")
    monkeypatch.setattr(verification, "simulation_lacks", lambda: lacking)
    found = clip_export.verify(bundle, hostile=False)
    assert found.verdict == "not measured"
    assert "fp16 was not measured: it needs onnx" in found.unmeasured[0]


def test_a_bundle_that_was_changed_is_exit_code_1(bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle, tmp_path / "changed"))
    data = bytearray((path / "golden.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "golden.safetensors").write_bytes(data)
    assert run(path).exit_code == 1


# Bad input


def test_options_that_do_not_go_together(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "index.npy", np.ones((20, 128), np.float32))
    (tmp_path / "texts.txt").write_text("a\n" * 20)
    (tmp_path / "file").touch()
    for args, said in (
        (("--index", tmp_path / "index.npy"), "go together"),
        (("--texts", tmp_path / "texts.txt"), "go together"),
        (
            ("--index", tmp_path / "index.npy", "--images", tmp_path, "--texts", tmp_path / "texts.txt"),
            "images or texts",
        ),
        (("--min-cosine", "2"), "a cosine of at least 2"),
        (("--max-recall-drop", "-1"), "R@1 may drop by -1"),
        (("--index", tmp_path / "nothing.npy", "--texts", tmp_path / "texts.txt"), "cannot be read"),
        (("--index", tmp_path / "index.npy", "--texts", tmp_path / "no.txt"), "no.txt cannot be read"),
        (("--pairs", tmp_path), "neither pictures nor captions"),
        (("--report", tmp_path / "file"), "file cannot be written: file exists"),
    ):
        result = run(bundle, "--golden-only", "--precision", "fp32", *args)
        assert result.exit_code == 2, args
        assert said in " ".join(result.stderr.split()), (args, result.stderr)


def test_vectors_that_are_not_numbers_or_of_another_dimension(bundle: Path, tmp_path: Path) -> None:
    index, images = made_index(bundle, tmp_path)
    vectors = np.load(index)
    spoiled = vectors.copy()
    spoiled[3, 5] = np.nan
    for array, said in ((spoiled, "row 3 (from 0): the vector holds NaN"), (vectors[:, :64], "64 dimensions")):
        np.save(index, array)
        result = run(bundle, "--precision", "fp32", "--golden-only", "--index", index, "--images", images)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_picture_that_does_not_decode(bundle: Path, folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "pairs"))
    (path / "chelsea.png").write_bytes(b"no picture")
    result = run(bundle, "--precision", "fp32", "--golden-only", "--pairs", path)
    assert result.exit_code == 2
    assert "1 of 4 pictures cannot be decoded; the first, chelsea.png" in result.stderr
    result = run(bundle, "--precision", "fp32", "--golden-only", "--pairs", path, "--skip-errors")
    assert result.exit_code == 0, result.output
    assert "left out, with 2 captions: chelsea.png" in result.stdout


def test_pairs_take_both_towers(image_bundle: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="pairs take both towers and their embeddings; this bundle lacks text"):
        clip_export.verify(image_bundle, pairs=folder, hostile=False)


def test_inputs_that_fail_late_cost_nothing_that_was_measured(bundle: Path, tmp_path: Path) -> None:
    index, images = made_index(bundle, tmp_path)
    (images / "050.jpg").write_bytes(b"no picture")
    asked = ("--precision", "fp32", "--golden-only", "--index", index, "--images", images)
    result = run(bundle, *asked)
    assert result.exit_code == 2
    assert "ok" in result.stdout
    assert "NOT MEASURED: the index: " in result.stdout
    assert run(bundle, *asked, "--min-cosine", "1").exit_code == 1  # which is worse


def test_another_checkpoint_of_the_same_shape_is_not_blamed_on_the_bundle(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(Path(clip_export.__file__).parent / "demo", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    noise = np.random.default_rng(0)
    for name, value in weights.items():
        if value.ndim == 2:
            weights[name] = (value + 0.02 * noise.normal(size=value.shape)).astype(value.dtype)
    save_file(weights, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is not the checkpoint that demo was built from: .*model\.safetensors"):
        clip_export.verify(bundle, against=str(other), hostile=False)


def test_without_embeddings_an_original_compares_ids_alone_and_that_is_said(demo_hidden: Path) -> None:
    found = clip_export.verify(demo_hidden, against="demo", hostile=False)
    assert found.verdict == "not measured"
    assert found.unmeasured[0].startswith("the text graph gives no embeddings, so only its ids were compared with demo")


def test_what_8_bits_lose_on_hostile_inputs_is_told_and_not_judged(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_CALIBRATED", ("fp16",))
    found = clip_export.verify(bundle, precision="fp16", against="demo")
    (one,) = found.runs
    assert one.comparison is not None
    golden = {row.tower: row.samples for row in one.rows}
    assert {row.tower: row.samples for row in one.comparison.rows} == golden
    assert any("hostile inputs are told of and not judged" in note for note in found.notes)
    found = clip_export.verify(bundle, precision="fp16")
    assert any(note.startswith("fp16 text: against fp32, told and not judged") for note in found.notes)


def test_a_reader_who_goes_early_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clip_export", "verify", str(bundle), "--precision", "fp32", "--golden-only"]
    line = f"{shlex.join([*command, '--report', str(tmp_path / 'r')])} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "demo on onnxruntime, cpu\n")
    assert (tmp_path / "r" / "index.html").is_file()
    assert "Traceback" not in done.stderr


def test_a_report_that_cannot_be_written_does_not_hide_a_failure(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_export.verifying.report.write_report", full_disk)
    asked = ("--precision", "fp32", "--golden-only", "--report", tmp_path / "r")
    result = run(bundle, *asked)
    assert (result.exit_code, "no space left" in result.stderr) == (2, True)
    result = run(bundle, *asked, "--min-cosine", "1")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "FAILED: below the contract")


def full_disk(*_: object) -> None:
    raise OutputError("r cannot be written: no space left on device")


@pytest.fixture(scope="module")
def demo_hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hidden") / "demo"
    clip_export.build("demo", path, towers=["text"], outputs=["hidden_states"])
    return path


# Pairs


def test_captions_and_labels_of_a_folder(bundle: Path, folder: Path) -> None:
    found = clip_export.verify(bundle, precision="fp16", pairs=folder, hostile=False).runs[0].retrieval
    assert found is not None and found.zero_shot is not None
    assert (found.ranks.pairs, found.ranks.pictures, found.ranks.captions) == (5, 4, 5)
    assert (found.zero_shot.pictures, found.zero_shot.labels) == (4, 2)


def test_ranks_of_the_reference_are_those_of_the_original(bundle: Path) -> None:
    """Against the checkpoint, pairs are embedded by torch: nearly the same numbers by other code."""
    graphs, original = (
        clip_export.verify(bundle, precision="fp32", pairs="demo", against=against, hostile=False).runs[0].retrieval
        for against in (None, "demo")
    )
    assert graphs is not None and original is not None
    assert graphs.same and not original.same
    assert original.ranks.reference.loss == pytest.approx(graphs.ranks.reference.loss, abs=1e-5)
    assert original.ranks.reference.recall == graphs.ranks.reference.recall


def test_equal_captions_are_encoded_once_and_many_at_a_time() -> None:
    calls: list[int] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        calls.append(len(texts))
        return np.array([[float(text)] for text in texts], np.float32)

    captions = [str(number % 1500) for number in range(4000)]
    rows = ranks._texts(captions, encode)
    assert calls == [1024, 476]
    assert rows[:, 0].tolist() == [float(caption) for caption in captions]


def test_zero_shot_names_by_the_mean_of_the_prompts() -> None:
    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.array([[1.0, 0.1] if "cat" in text else [0.2, 3.0] for text in texts], np.float32)

    labels = zero_shot.label_embeddings(["cat", "dog"], encode)
    images = np.array([[2, 0], [0, 1], [0, 0], [np.nan, 1]], np.float32)
    named = zero_shot.name_pictures(images, labels)
    assert named.tolist() == [0, 1, -1, -1]
    found = zero_shot.zero_shot(np.array([0, 0, 1, 1]), named, {0: 0, 1: 0, 2: 1}, labels=2)
    assert (found.reference, found.engine, found.agreement) == (1.0, 1 / 3, 1 / 3)


def test_asked_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError):
        dataclasses.replace(Asked(), precison="fp16")  # type: ignore[call-arg]
    assert verifying.Asked is Asked
    assert issubclass(DeviceError, BackendError)
