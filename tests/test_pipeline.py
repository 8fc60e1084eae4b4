"""Building, loading and verifying bundles: what is refused, what is reproducible, what is noticed."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from shutil import copytree

import checkpoints_made
import numpy as np
import onnx
import pytest
from specs_made import tiny_spec

import clip_export
from clip_export import pipeline, verification
from clip_export.bundle import Bundle, write_manifest
from clip_export.errors import (
    BundleError,
    BundleIntegrityError,
    CheckpointError,
    ContractError,
    ExportError,
    InputError,
    SpecError,
)
from clip_export.golden import Golden, golden_images, golden_texts
from clip_export.manifest import parse_manifest


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def rewrite(path: Path) -> None:
    """Write the manifest again, as if the files had always been like this."""
    manifest = parse_manifest((path / "manifest.json").read_bytes())
    (path / "manifest.json").unlink()
    write_manifest(
        path, name=manifest.name, spec=manifest.spec, provenance=manifest.provenance, variants=manifest.variants
    )


def test_a_bundle_is_what_the_format_says(tiny_bundle: Path) -> None:
    expected = {"manifest.json", "tokenizer.json", "text.onnx", "image.onnx", "golden.safetensors", "report.json"}
    assert files(tiny_bundle) == expected
    bundle = Bundle.open(tiny_bundle)
    golden = bundle.golden()
    assert golden.text is not None
    assert golden.image is not None
    assert len(golden.text.texts) >= 16
    assert len(golden.image.files) >= 8
    assert golden.text.outputs["embedding"].shape == (len(golden_texts()), 64)
    assert golden.image.outputs["embedding"].shape == (len(golden_images()), 64)
    versions = bundle.manifest.provenance.versions
    assert {"clip-export", "torch", "onnx", "onnxruntime", "tokenizers", "pillow", "ftfy"} <= versions.keys()
    proof = bundle.report()["relative_difference_of_engine_to_torch"]
    assert all(0 <= difference <= 1e-5 for tower in proof.values() for difference in tower.values())


def test_a_build_is_reproducible_to_the_byte(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "tiny"
    clip_export.build(tiny_checkpoint, again)
    match, mismatch, errors = filecmp.cmpfiles(tiny_bundle, again, files(tiny_bundle), shallow=False)
    assert (set(match), mismatch, errors) == (files(tiny_bundle), [], [])
    for path in again.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_bundle_can_be_moved(tiny_bundle: Path, tmp_path: Path) -> None:
    copytree(tiny_bundle, tmp_path / "moved")
    assert clip_export.verify(tmp_path / "moved", hostile=False).passed


def test_verify_finds_a_damaged_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    """A graph changed together with its hash: only running it can tell."""
    path = tmp_path / "b"
    copytree(tiny_bundle, path)
    graph = onnx.load(path / "text.onnx")
    weight = next(t for t in graph.graph.initializer if t.name == "blocks.1.mlp.fc1.weight")
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.05)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, path / "text.onnx")
    rewrite(path)
    result = clip_export.verify(path, hostile=False)
    assert not result.passed
    assert {row.tower: row.passed for row in result.rows} == {"text": False, "image": True}
    assert json.loads(json.dumps(result.to_dict()))["passed"] is False


def test_a_row_of_nan_keeps_no_contract() -> None:
    good = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    assert verification.compare("text", "embedding", good, good).passed
    for value in (np.nan, np.inf, 0):
        bad = good.copy()
        bad[2] = value
        assert not verification.compare("text", "embedding", bad, good).passed


def test_a_graph_that_breaks_the_contract_is_not_published(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verification.CONTRACTS, "fp32", 1.1)
    with pytest.raises(ContractError, match=r"expected at least 1.1; nothing is published"):
        clip_export.build(tiny_checkpoint, tmp_path / "b")
    assert files(tmp_path) == set()


def test_another_tokenizer_is_noticed_at_load(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    copytree(tiny_bundle, path)
    golden = Golden.load(path / "golden.safetensors")
    assert golden.text is not None
    golden.text.input_ids[3, 1] += 1
    golden.save(path / "golden.safetensors")
    rewrite(path)
    with pytest.raises(BundleError, match="other token ids than the build for the golden text"):
        clip_export.load(path)


def test_another_resize_is_noticed_at_load(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    copytree(tiny_bundle, path)
    golden = Golden.load(path / "golden.safetensors")
    assert golden.image is not None
    golden.image.pixels[2, 0, 0, 0] ^= 1
    golden.save(path / "golden.safetensors")
    rewrite(path)
    with pytest.raises(BundleError, match="other pixels than the build for golden picture 2") as info:
        clip_export.load(path)
    assert "build the bundle again" in str(info.value)


def test_golden_outputs_are_those_of_the_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    """An output that the samples lack would never be verified, and one that the graph lacks cannot be."""
    path = tmp_path / "b"
    copytree(tiny_bundle, path)
    golden = Golden.load(path / "golden.safetensors")
    assert golden.text is not None
    golden.text.outputs["pooled"] = golden.text.outputs["embedding"]
    golden.save(path / "golden.safetensors")
    rewrite(path)
    with pytest.raises(BundleIntegrityError, match="text outputs are embedding, pooled, not those of the graph"):
        clip_export.verify(path, hostile=False)


def test_golden_outputs_of_another_width(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    copytree(tiny_bundle, path)
    golden = Golden.load(path / "golden.safetensors")
    assert golden.image is not None
    golden.image.outputs["embedding"] = golden.image.outputs["embedding"][:, :32]
    golden.save(path / "golden.safetensors")
    rewrite(path)
    with pytest.raises(BundleIntegrityError, match=r"the engine gives \[13, 64\], the golden samples \[13, 32\]"):
        clip_export.verify(path, hostile=False)


def test_a_manifest_that_contradicts_its_graph_is_noticed_at_load(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    copytree(tiny_bundle, path)
    graph = onnx.load(path / "text.onnx")
    onnx.save(_renamed_output(graph), path / "text.onnx")
    rewrite(path)
    with pytest.raises(BundleIntegrityError, match=r"text.onnx gives vector, the manifest says embedding"):
        clip_export.load(path)


def _renamed_output(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph.graph.output[0].name = graph.graph.node[-1].output[0] = "vector"
    return graph


def test_threads_that_cannot_be(tiny_bundle: Path) -> None:
    for threads in (0, -1, 10**6, "3", 1.5):
        with pytest.raises(InputError, match="expected threads from 1 to 1024"):
            clip_export.load(tiny_bundle, threads=threads)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a batch size of at least 1, found '3'"):
        clip_export.load(tiny_bundle, batch_size="3")  # type: ignore[arg-type]


def test_an_empty_name_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found an empty name"):
        clip_export.build("", tmp_path / "b")


def test_sizes_of_a_spec_agree() -> None:
    spec = tiny_spec()
    assert spec.text is not None
    assert spec.image is not None
    with pytest.raises(SpecError, match="the text tower takes 15 tokens, the tokenizer gives 16"):
        dataclasses.replace(spec, text=dataclasses.replace(spec.text, context_length=15))
    with pytest.raises(SpecError, match="the image tower takes 40 pixels a side, preprocessing gives 32"):
        dataclasses.replace(spec, image=dataclasses.replace(spec.image, image_size=40))
    with pytest.raises(SpecError, match="logit_scale is a logarithm"):
        dataclasses.replace(spec, logit_scale=1000.0)


def test_sigterm_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What timeout and docker stop send, in the middle of a build."""
    command = [sys.executable, "-m", "clip_export", "build", str(tiny_checkpoint), "-o", str(tmp_path / "b")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(tmp_path.glob(".b.building-*/text.onnx")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; nothing half-written was left" in errors
    assert {name for name in files(tmp_path) if not name.endswith(".lock")} == set()


def test_versions_do_not_hang_on_the_name_of_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu brings the module onnxruntime, and a checkout need not be installed at all."""
    version = metadata.version

    def installed(name: str) -> str:
        if name in ("onnxruntime", "clip-export"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", installed)
    found = pipeline._versions()
    assert found["clip-export"] == clip_export.__version__
    assert found["onnxruntime"][0].isdigit()


def test_outputs_and_towers_can_be_chosen(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = clip_export.build(tiny_checkpoint, tmp_path / "b", towers=["text"], outputs=["hidden_states", "embedding"])
    assert files(tmp_path / "b") == {
        "manifest.json",
        "tokenizer.json",
        "text.onnx",
        "golden.safetensors",
        "report.json",
    }
    assert bundle.graph("text").outputs == ("embedding", "hidden_states")
    assert bundle.manifest.provenance.options == {"towers": "text", "outputs": "hidden_states,embedding"}
    with clip_export.load(bundle) as clip:
        assert clip.encode_text(["a"]).shape == (1, 64)
        assert clip.text_outputs(["a"])["hidden_states"].shape == (1, 77, 128)
    assert {row.output for row in clip_export.verify(bundle, hostile=False).rows} == {"embedding", "hidden_states"}


def test_requests_that_cannot_be(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected towers among text, image, found visual"):
        clip_export.build(tiny_checkpoint, tmp_path / "b", towers=["visual"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="found none"):
        clip_export.build(tiny_checkpoint, tmp_path / "b", towers=[])
    with pytest.raises(CheckpointError, match="found logits"):
        clip_export.build(tiny_checkpoint, tmp_path / "b", outputs=["logits"])
    checkpoints_made.make_huggingface(tmp_path / "text", kind="CLIPTextModel")
    with pytest.raises(CheckpointError, match="this checkpoint has no image tower, only text"):
        clip_export.build(tmp_path / "text", tmp_path / "b", towers=["image"])
    assert not (tmp_path / "b").exists()


def test_a_bundle_is_replaced_only_by_force_and_only_if_it_is_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    clip_export.build(tiny_checkpoint, target, towers=["image"])
    before = (target / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="--force"):
        clip_export.build(tiny_checkpoint, target, towers=["image"])
    with pytest.raises(CheckpointError):
        clip_export.build(tmp_path / "nowhere", target, force=True)
    assert (target / "manifest.json").read_bytes() == before
    clip_export.build(tiny_checkpoint, target, towers=["image"], force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        clip_export.build(tiny_checkpoint, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert files(tmp_path) == {"b", "mine"}


def test_weights_of_zero_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    checkpoints_made.make_huggingface(tmp_path / "c")
    weights = {name: torch.zeros_like(w) for name, w in load_file(tmp_path / "c" / "model.safetensors").items()}
    save_file(weights, tmp_path / "c" / "model.safetensors")
    with pytest.raises(ExportError, match="the text tower: embedding is constant"):
        clip_export.build(tmp_path / "c", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("demo", "demo"),
        ("openai/clip-vit-base-patch32", "clip-vit-base-patch32"),
        ("hf-hub:laion/CLIP-ViT-B-32", "clip-vit-b-32"),
        ("/models/ViT-B-32.pt", "vit-b-32"),
        (Path("models/My Model/"), "my-model"),
        ("..", "bundle"),
    ],
)
def test_default_name(checkpoint: str | Path, name: str) -> None:
    assert pipeline.default_name(checkpoint) == name


def test_every_public_name_is_there() -> None:
    assert clip_export.__all__ == sorted(clip_export.__all__, key=lambda name: (not name[0].isupper(), name))
    for name in clip_export.__all__:
        assert getattr(clip_export, name) is not None
    assert callable(clip_export.verify), "the module that holds verify must not hide it"
    with pytest.raises(AttributeError, match="no attribute 'enlarge'"):
        _ = clip_export.enlarge
    assert dataclasses.is_dataclass(clip_export.Verification)
