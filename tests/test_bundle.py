"""Reading bundles that nobody vouches for: everything wrong with one is an error of errors.py that names it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles_made import (
    IMAGE_GRAPH,
    PROVENANCE,
    SPEC,
    TEXT_GRAPH,
    fill,
    golden,
    make_plan,
    plain,
    rewrite,
    sign,
    staged_digest,
    text_only,
    with_plans,
)
from hypothesis import given
from hypothesis import strategies as st

from clip_export import bundle as bundle_module
from clip_export.bundle import MAX_MANIFEST_BYTES, Bundle, Plan, Provenance, replace_refusal, write_manifest
from clip_export.errors import (
    BundleError,
    BundleIntegrityError,
    BundleNotFoundError,
    BundleSchemaError,
    SpecError,
)
from clip_export.manifest import Contract, manifest_bytes, parse_manifest
from clip_export.plan_selection import Machine

MANIFESTS = Path(__file__).parent / "manifests"

Change = Callable[[Any], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "a-clip"
    directory.mkdir()
    fill(directory)
    return directory


def test_what_was_written_is_read(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.name == "small"
    assert opened.path == bundle
    assert opened.spec == SPEC
    assert opened.manifest.provenance == PROVENANCE
    assert opened.manifest.variants == {"fp32": {"text": TEXT_GRAPH, "image": IMAGE_GRAPH}}
    assert opened.graph_path("text") == bundle / "text.onnx"
    assert opened.tokenizer_json() == '{"model": "é"}'
    assert opened.report() == {"layers": 1}
    text = opened.golden().text
    assert text is not None
    assert text.texts[2] == "text 2 é"


def test_files_are_listed_with_size_and_sha256(bundle: Path) -> None:
    files = plain(bundle)["files"]
    assert list(files) == ["golden.safetensors", "image.onnx", "report.json", "text.onnx", "tokenizer.json"]
    content = (bundle / "image.onnx").read_bytes()
    assert files["image.onnx"] == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_the_manifest_is_canonical_and_names_no_place(bundle: Path, tmp_path: Path) -> None:
    data = (bundle / "manifest.json").read_bytes()
    assert data.isascii()
    assert data.endswith(b'"\n}\n')
    keys = ["schema_version", "name", "spec", "provenance", "variants", "contracts", "plans", "files", "sha256"]
    assert list(json.loads(data)) == keys
    assert list(plain(bundle)["provenance"]["versions"]) == ["clip-export", "numpy"]
    assert str(tmp_path).encode() not in data
    assert os.uname().nodename.encode() not in data


def test_equal_builds_are_equal_to_the_byte(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    again.mkdir()
    fill(again)
    names = sorted(path.name for path in bundle.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert [(bundle / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]


def test_the_digest_can_be_checked_without_parsing(bundle: Path) -> None:
    data = (bundle / "manifest.json").read_bytes()
    tail = len(',\n  "sha256": ""\n}\n') + 64
    assert hashlib.sha256(data[:-tail]).hexdigest() == json.loads(data)["sha256"]


def test_a_moved_bundle_opens(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = bundle.rename(tmp_path / "deep" / "er" / "other name")
    assert Bundle.open(moved).name == "small"
    monkeypatch.chdir(moved)
    relative = Bundle.open(".")
    monkeypatch.chdir(tmp_path)
    assert relative.golden().text is not None


def test_a_link_to_a_bundle_opens(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle, target_is_directory=True)
    assert Bundle.open(link).graph_path("image").read_bytes() == (bundle / "image.onnx").read_bytes()


def test_two_processes_open_it_at_once(bundle: Path) -> None:
    code = "import sys; from clip_export.bundle import Bundle; print(Bundle.open(sys.argv[1]).name)"
    command = [sys.executable, "-c", code, str(bundle)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[0], process.returncode) for process in processes] == [("small\n", 0)] * 2


def test_reading_loads_no_framework(bundle: Path) -> None:
    code = (
        "import sys; from clip_export.bundle import Bundle; Bundle.open(sys.argv[1]).golden();"
        "print({'torch', 'onnx', 'onnxruntime', 'onnx_ir'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_variants_and_plans_have_a_place(bundle: Path) -> None:
    manifest = with_plans(bundle)
    opened = Bundle.open(bundle)
    assert opened.manifest == manifest
    image, text = opened.manifest.plans
    assert (image.tower, text.tower) == ("image", "text")
    assert opened.plan_path(text).read_bytes() == b"plan of text"
    assert opened.graph_path("text", "fp16").read_bytes() == b"half of text.fp16.onnx"
    assert opened.manifest.files[text.file].size == len("plan of text")
    with pytest.raises(BundleError, match="holds no bf16 image graph, only fp16 image, fp16 text, fp32 image"):
        opened.graph_path("image", "bf16")
    assert opened.golden().text is not None


def test_the_digest_of_a_graph_covers_its_external_data(bundle: Path) -> None:
    with_plans(bundle)
    opened = Bundle.open(bundle)
    before = opened.graph_sha256("image", "fp16")
    assert before == staged_digest(bundle, "image.fp16.onnx")
    assert opened.graph_sha256("image") == staged_digest(bundle, "image.onnx")
    (bundle / "image.fp16.onnx.data").write_bytes(b"heights")
    write_manifest(bundle, name="small", spec=SPEC, provenance=PROVENANCE, variants=opened.manifest.variants)
    assert Bundle.open(bundle).graph_sha256("image", "fp16") != before


def test_plans_are_chosen_by_what_the_manifest_knows(bundle: Path) -> None:
    with_plans(bundle)
    opened = Bundle.open(bundle)
    machine = Machine(backend="tensorrt-rtx", version="1.7.1.116", compute_capability="sm_89", free_bytes=100)
    assert set(opened.select_plans(machine).chosen) == {"text", "image"}
    assert set(opened.select_plans(machine, towers=("image",)).chosen) == {"image"}
    full = opened.select_plans(dataclasses.replace(machine, free_bytes=3))
    assert [why for _, why in full.passed_over] == ["its weights take 1 MiB of GPU memory, 0 MiB are free"] * 2
    asked = opened.select_plans(machine, precision="fp32")
    assert [why for _, why in asked.passed_over] == ["its precision is fp16, asked for is fp32"] * 2


def test_a_plan_whose_graph_was_made_again_is_stale(bundle: Path) -> None:
    plan = make_plan(graph_sha256="0" * 64)
    with_plans(bundle, [plan])
    machine = Machine(backend="tensorrt-rtx", version="1.7.1.116", compute_capability="sm_89")
    (_, why) = Bundle.open(bundle).select_plans(machine, towers=("text",)).passed_over[0]
    assert why == "compiled from an earlier text.fp16.onnx, which has changed since"


def test_gpu_memory_counts_plan_and_graph(bundle: Path) -> None:
    plans = [make_plan("image"), make_plan("image", options={"strip_weights": "true"})]
    with_plans(bundle, plans)
    opened = Bundle.open(bundle)
    whole, stripped = (opened.gpu_memory(plan).weights for plan in plans)
    assert whole == len("plan of image")
    assert stripped == whole + len("half of image.fp16.onnx") + len("weights")


def test_caches_of_running_plans_are_no_part_of_a_bundle(bundle: Path) -> None:
    folder = bundle / with_plans(bundle).plans[0].folder
    before = (bundle / "manifest.json").read_bytes()
    (folder / ".runtime.image.cache").write_bytes(b"compiled here")
    (folder / ".runtime.image.cache.12345").write_bytes(b"half writ")
    assert Bundle.open(bundle).name == "small"
    assert replace_refusal(bundle) is None
    with_plans(bundle)
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["plans/a/.git", "plans/.runtime.cache", ".runtime.cache", "plans/a/.runtime/b"])
def test_other_hidden_files_are_the_users(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"mine")
    assert Bundle.open(bundle).name == "small"
    assert replace_refusal(bundle) == f"it holds {name}, which the bundle does not list"


# Schemas


def test_the_bytes_of_schema_4(bundle: Path, golden_text: Callable[[str, str], None]) -> None:
    plan = make_plan(
        gpu="NVIDIA L4",
        driver="580.95.05",
        cuda="13.0",
        activation_bytes=(4096, 8192),
        folder="plans/golden",
        inspector="plans/golden/text.layers.json",
        options={"attention": "operator", "tf32": "true"},
    )
    missed = (
        "min cosine of the text tower is 0.9160773, required is 0.995",
        "R@1 drops by 2.00 points, allowed are 0.5",
    )
    contracts = {"fp16": Contract(min_cosine=0.995, max_recall_drop=0.5, missed=missed)}
    manifest = dataclasses.replace(with_plans(bundle, [plan, make_plan("image")]), contracts=contracts)
    golden_text(manifest_bytes(manifest).decode("ascii"), "manifests/schema-4.json")
    data = (MANIFESTS / "schema-4.json").read_bytes()
    assert parse_manifest(data) == manifest
    assert manifest_bytes(parse_manifest(data)) == data


def test_schema_3_is_read() -> None:
    manifest = parse_manifest((MANIFESTS / "schema-3.json").read_bytes())
    assert (manifest.schema_version, manifest.spec.context) == (3, None)
    assert parse_manifest(manifest_bytes(manifest)) == dataclasses.replace(manifest, schema_version=4)


def test_schema_2_is_read() -> None:
    manifest = parse_manifest((MANIFESTS / "schema-2.json").read_bytes())
    assert (manifest.schema_version, len(manifest.plans), manifest.contracts) == (2, 2, {})
    assert parse_manifest(manifest_bytes(manifest)) == dataclasses.replace(manifest, schema_version=4)


def test_schema_1_is_read_and_schema_4_written() -> None:
    """A real manifest of the first version: that of the demo, as its users have it."""
    data = (MANIFESTS / "schema-1.json").read_bytes()
    manifest = parse_manifest(data)
    assert (manifest.schema_version, manifest.name, manifest.plans) == (1, "demo", ())
    assert manifest.graph_sha256("text.onnx") == "b241eec1522ffa847227034866d7bfd393a979453931b3a07be47ea973f97ffc"
    again = parse_manifest(manifest_bytes(manifest))
    assert again == dataclasses.replace(manifest, schema_version=4)


def test_a_manifest_of_two_schemas_at_once(bundle: Path) -> None:
    rewrite(bundle, schema_version=1)
    with pytest.raises(BundleSchemaError, match=r"manifest.json: unknown key plans, which schema 1 has not"):
        Bundle.open(bundle)
    rewrite(bundle, schema_version=2)
    with pytest.raises(BundleSchemaError, match=r"manifest.json: unknown key contracts, which schema 2 has not"):
        Bundle.open(bundle)
    rewrite(bundle, schema_version=3)
    with pytest.raises(BundleSchemaError, match=r"manifest.json: unknown key spec.context, which schema 3 has not"):
        Bundle.open(bundle)


def test_a_contract_of_no_variant(bundle: Path) -> None:
    rewrite(bundle, contracts={"int8": {"min_cosine": 0.99, "max_recall_drop": None, "missed": []}})
    with pytest.raises(BundleSchemaError, match="contracts: 'int8' is none of the variants"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        ({"min_cosine": 1.5}, "a contract cannot ask for a cosine of 1.5"),
        ({"min_cosine": "0.99"}, "expected float, found '0.99'"),
        ({"min_cosine": None}, r"contracts\.fp32\.min_cosine: expected float, found None"),
        ({"max_recall_drop": -0.5}, "a contract cannot allow R@1 to drop by -0.5 points"),
        ({"max_recall_drop": 100.5}, "a contract cannot allow R@1 to drop by 100.5 points"),
        ({"max_recall_drop": True}, "expected float, found True"),
        ({"missed": None}, "missed: expected a list, found NoneType"),
        ({"missed": "all"}, "missed: expected a list, found str"),
        ({"missed": [1]}, r"missed\[0\]: expected str, found 1"),
        ({"missed": ["x"] * 17}, "missed: at most 16, found 17"),
        ({"missed": [""]}, "expected 1 to 400 printable characters, found ''"),
        ({"missed": ["  "]}, "expected 1 to 400 printable characters, found '  '"),
        ({"missed": ["x" * 401]}, "expected 1 to 400 printable characters, found 'xxx"),
        ({"missed": ["\x1b[2J"]}, r"expected 1 to 400 printable characters, found '\\x1b\[2J'"),
        ({"missed": ["\ud800"]}, r"expected 1 to 400 printable characters, found '\\ud800'"),
        ({"kept": True}, "unknown key kept"),
    ],
)
def test_a_contract_that_cannot_be(bundle: Path, contract: dict[str, Any], words: str) -> None:
    rewrite(bundle, contracts={"fp32": {"min_cosine": 0.99, "max_recall_drop": None, "missed": []} | contract})
    with pytest.raises(BundleSchemaError, match=words) as raised:
        Bundle.open(bundle)
    assert len(raised.value.message) <= 401
    assert raised.value.message.isprintable()


def test_a_contract_that_does_not_say_what_was_missed(bundle: Path) -> None:
    """It would read as kept."""
    rewrite(bundle, contracts={"fp32": {"min_cosine": 0.99, "max_recall_drop": None}})
    with pytest.raises(BundleSchemaError, match=r"contracts\.fp32: missing key missed"):
        Bundle.open(bundle)


@given(
    cosine=st.floats(-1, 1),
    drop=st.none() | st.floats(0, 100),
    missed=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=400), max_size=16).map(
        tuple
    ),
)
def test_contracts_are_read_as_they_were_written(
    pristine: Path, cosine: float, drop: float | None, missed: tuple[str, ...]
) -> None:
    contract = Contract(min_cosine=cosine, max_recall_drop=drop, missed=missed)
    manifest = dataclasses.replace(Bundle.open(pristine).manifest, contracts={"fp32": contract})
    assert parse_manifest(manifest_bytes(manifest)).contracts == {"fp32": contract}
    assert contract.kept is (len(missed) == 0)


def _plan(**changes: Any) -> Change:
    """Change the entry of the first plan, that of the image tower."""

    def change(data: Any) -> None:
        data["plans"][0] |= changes

    return change


def _profile(**changes: Any) -> Change:
    def change(data: Any) -> None:
        data["plans"][0]["profiles"][0]["pixels"] |= changes

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_plan(file="plans/x/image.plan"), "files: 'plans/x/image.plan' should be listed and is not"),
        (_plan(file="../../etc/passwd"), "'../../etc/passwd' is not the place of a plan"),
        (_plan(file="plans/../image.plan"), "'plans/../image.plan' should be listed and is not"),
        (_plan(file="/plans/image.plan"), "is not the place of a plan"),
        (_plan(file="image.onnx"), "'image.onnx' is not the place of a plan: expected plans/FOLDER/image.plan"),
        (_plan(tower="sound"), "'sound' is not one of text, image"),
        (_plan(backend="tvm"), "'tvm' is not one of tensorrt, tensorrt-rtx"),
        (_plan(attention="fused"), "'fused' is not one of operator, inspector"),
        (_plan(precision="int8"), "variants hold no int8 image graph"),
        (_plan(graph="text.fp16.onnx"), "'text.fp16.onnx' is no image graph of the variants"),
        (_plan(graph="../image.onnx"), "'../image.onnx' is no image graph of the variants"),
        (_plan(outputs=["normalized"]), r"outputs are \['normalized'\], those of the graph are \['embedding'\]"),
        (_plan(outputs=["normalized", "embedding"]), "those of the graph are"),
        (_plan(outputs=[]), "those of the graph are"),
        (_plan(profiles=[]), "expected 1 to 64 profiles, found 0"),
        (_plan(profiles={}), "profiles: expected a list, found dict"),
        (_plan(profiles=[{"sound": {"min": [1], "opt": [1], "max": [1]}}]), r"profiles name \['sound'\], the graph"),
        (_plan(speed=1), r"manifest.json.plans\[0\]: unknown key speed"),
        (_plan(seconds="fast"), "seconds: expected float, found 'fast'"),
        (_plan(seconds=1e308), "building cannot take"),
        (_plan(peak_memory_mib=2**63 - 1), "building cannot take 9223372036854775807 MiB"),
        (_plan(options={"run": "rm"}), "unknown option run"),
        (_plan(gpu="\x1b[31m"), "gpu must be short and printable"),
        (_profile(max=[9, 3, 16]), "as many axes each"),
        (_profile(max=[0, 3, 16, 16]), "expected positive sizes with min <= opt <= max on every axis"),
        (_profile(max=[2**62, 3, 16, 16]), "pixels cannot be as large as"),
        (_profile(max=[True, 3, 16, 16]), "expected int, found True"),
        (_profile(max="8x3x16x16"), "expected a list, found str"),
        (lambda data: data["plans"].append(data["plans"][0]), "plans: 'plans/.*/image.plan' is listed twice"),
        (lambda data: data.update(plans=data["plans"] * 200), "plans: at most 256, found 400"),
        (lambda data: data.update(plans={}), "manifest.json.plans: expected a list, found dict"),
    ],
)
def test_plans_that_contradict_the_manifest(bundle: Path, change: Change, words: str) -> None:
    with_plans(bundle)
    data = plain(bundle)
    change(data)
    (bundle / "manifest.json").write_bytes(sign(json.dumps(data)))
    with pytest.raises(BundleSchemaError, match=words) as raised:
        Bundle.open(bundle)
    assert raised.value.message.isprintable()
    assert raised.value.hint


def test_a_plan_of_a_tower_that_the_spec_lacks(bundle: Path) -> None:
    with pytest.raises(BundleSchemaError, match="variants hold no fp16 text graph"):
        write_manifest(
            bundle,
            name="small",
            spec=SPEC,
            provenance=PROVENANCE,
            variants={"fp32": {"text": TEXT_GRAPH, "image": IMAGE_GRAPH}},
            plans=[_on_disk(bundle, make_plan())],
        )


def _on_disk(directory: Path, plan: Plan) -> Plan:
    (directory / plan.file).parent.mkdir(parents=True)
    (directory / plan.file).write_bytes(b"plan")
    return plan


def test_an_inspector_file_is_listed(bundle: Path) -> None:
    plan = make_plan(folder="plans/a", inspector="plans/a/text.json")
    manifest = with_plans(bundle, [plan])
    assert "plans/a/text.json" in manifest.files
    data = plain(bundle)
    del data["files"]["plans/a/text.json"]
    (bundle / "manifest.json").write_bytes(sign(json.dumps(data)))
    with pytest.raises(BundleSchemaError, match=r"files: 'plans/a/text.json' should be listed and is not"):
        Bundle.open(bundle)


# Known files are not hashed again


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from here on."""
    names: list[str] = []
    digest = hashlib.file_digest

    def spy(file: Any, algorithm: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    return names


def test_only_links_to_the_known_bundle_are_trusted(bundle: Path, tmp_path: Path, hashed: list[str]) -> None:
    known = Bundle.open(bundle, check_files=False)
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in known.manifest.files:
        os.link(bundle / name, staging / name)
    copy = (staging / "report.json").read_bytes()
    (staging / "report.json").unlink()
    (staging / "report.json").write_bytes(copy)  # the same bytes, and another file
    manifest = with_plans(staging, [], known=known)
    assert sorted(hashed) == ["image.fp16.onnx", "image.fp16.onnx.data", "report.json", "text.fp16.onnx"]
    assert {name: manifest.files[name] for name in known.manifest.files} == known.manifest.files
    assert Bundle.open(staging).name == "small"


def test_a_link_of_another_size_is_hashed(bundle: Path, tmp_path: Path, hashed: list[str]) -> None:
    known = Bundle.open(bundle, check_files=False)
    shutil.copytree(bundle, tmp_path / "staging", copy_function=os.link)
    with (bundle / "image.onnx").open("ab") as file:
        file.write(b"more")
    with_plans(tmp_path / "staging", [], known=known)
    assert "image.onnx" in hashed
    assert "text.onnx" not in hashed


def test_a_bundle_of_one_tower(tmp_path: Path) -> None:
    spec = text_only()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "text.onnx").write_bytes(b"graph")
    one = golden()
    type(one)(text=one.text, image=None).save(tmp_path / "golden.safetensors")
    write_manifest(tmp_path, name="t", spec=spec, provenance=PROVENANCE, variants={"fp32": {"text": TEXT_GRAPH}})
    opened = Bundle.open(tmp_path)
    assert opened.golden().image is None
    with pytest.raises(BundleError, match="holds no fp32 image graph, only fp32 text"):
        opened.graph_path("image")


# What is on the disk


def _replace_by_link(directory: Path) -> None:
    outside = directory.parent / "outside"
    (directory / "text.onnx").rename(outside)
    (directory / "text.onnx").symlink_to(outside)


def _replace_by_directory(directory: Path) -> None:
    (directory / "text.onnx").unlink()
    (directory / "text.onnx").mkdir()


def _replace_by_fifo(directory: Path) -> None:
    (directory / "text.onnx").unlink()
    os.mkfifo(directory / "text.onnx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "image.onnx").write_bytes(bytes(1024)), "image.onnx in .* is changed: expected sha256 78"),
        (lambda d: (d / "image.onnx").write_bytes(b""), "image.onnx in .* is truncated: expected 1024 bytes, found 0"),
        (lambda d: (d / "image.onnx").write_bytes(bytes(1025)), "image.onnx in .* is changed: expected 1024 bytes"),
        (lambda d: (d / "image.onnx").unlink(), "image.onnx is missing from"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing from"),
        (lambda d: (d / "text.onnx.data").write_bytes(b"x"), "text.onnx.data in .* is not listed in its manifest.json"),
        (lambda d: (d / "plans").symlink_to("/"), "plans in .* is a symbolic link"),
        (_replace_by_link, "text.onnx in .* is a symbolic link"),
        (_replace_by_directory, "text.onnx is missing from"),
        (_replace_by_fifo, "text.onnx in .* is not a regular file"),
        (lambda d: (d / "a\x1b[31m").write_bytes(b"x"), r"a\\x1b\[31m in .* is not listed"),
    ],
)
def test_files_that_are_not_what_the_manifest_says(bundle: Path, change: Change, words: str) -> None:
    change(bundle)
    with pytest.raises(BundleIntegrityError, match=words) as raised:
        Bundle.open(bundle)
    assert raised.value.hint


def test_check_files_false_skips_hashing_alone(bundle: Path) -> None:
    (bundle / "image.onnx").write_bytes(bytes(1024))
    assert Bundle.open(bundle, check_files=False).name == "small"
    (bundle / "image.onnx").write_bytes(bytes(1023))
    with pytest.raises(BundleIntegrityError, match="truncated"):
        Bundle.open(bundle, check_files=False)


def test_hidden_files_are_not_the_bundles_business(bundle: Path) -> None:
    (bundle / ".DS_Store").write_bytes(b"x")
    (bundle / ".git").mkdir()
    (bundle / ".git" / "HEAD").write_bytes(b"x")
    assert Bundle.open(bundle).name == "small"


def test_a_file_that_vanishes_after_opening(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleIntegrityError, match=r"tokenizer.json cannot be read: No such file"):
        opened.tokenizer_json()


def test_golden_samples_of_another_spec(bundle: Path) -> None:
    fill(bundle)
    data = plain(bundle)
    data["spec"]["tokenizer"]["context_length"] = data["spec"]["text"]["context_length"] = 9
    rewrite(bundle, **data)
    with pytest.raises(BundleIntegrityError, match=r"golden.safetensors: expected .*\(9, 16\), found \(8, 16\)"):
        Bundle.open(bundle).golden()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_bytes(b""), "is a file, not the directory of a bundle"),
        (lambda p: p.mkdir(), "is not a bundle: it has no manifest.json"),
    ],
)
def test_no_bundle_here(tmp_path: Path, make: Change, words: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(BundleNotFoundError, match=words):
        Bundle.open(tmp_path / "x")


def test_a_nul_in_the_path(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="does not exist"):
        Bundle.open(f"{tmp_path}/a\0b")


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="File name too long"):
        Bundle.open(tmp_path / ("x" * 300))


def test_an_interrupted_replacement_is_named(bundle: Path) -> None:
    old = bundle.rename(bundle.with_name(".a-clip.replaced-0123abcd"))
    with pytest.raises(BundleNotFoundError, match=f"the bundle that was there is {old}"):
        Bundle.open(bundle)


# What is in the manifest


def _nested(depth: int) -> str:
    return '{"schema_version": 1, "name": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "manifest.json is not valid JSON"),
        ("{", "manifest.json is not valid JSON"),
        ("[]", "manifest.json: expected an object, found list"),
        ("null", "manifest.json: expected an object, found NoneType"),
        (_nested(100_000), "manifest.json is not valid JSON"),
        ('{"schema_version": 1, "schema_version": 1}', "duplicate key 'schema_version'"),
        ('{"schema_version": NaN}', "NaN is not a number"),
        ('{"schema_version": -Infinity}', "-Infinity is not a number"),
        ('{"schema_version": 1e999}', "1e999 is out of range"),
        ('{"schema_version": ' + "9" * 5000 + "}", "9999 is out of range"),
        ('{"schema_version": 9223372036854775808}', "out of range"),
        ('{"schema_version": 5}', "schema 5 was written by a newer clip-export; this one reads up to 4"),
        ('{"schema_version": 0}', "expected a schema_version of 1 or more, found 0"),
        ('{"schema_version": true}', "expected a schema_version of 1 or more, found True"),
        ('{"schema_version": "1"}', "expected a schema_version of 1 or more, found '1'"),
        ('{"manifest_version": 3, "name": "a web extension"}', "expected a schema_version of 1 or more, found None"),
        ('{"schema_version": 1}', "expected it to end with its own"),
        ('{"\\ud800\\u001b[31m": 1, "\\ud800\\u001b[31m": 1}', "duplicate key"),
    ],
)
def test_what_is_no_manifest(bundle: Path, text: str, words: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleSchemaError, match=words) as raised:
        Bundle.open(bundle)
    assert len(raised.value.message) < 500
    assert raised.value.message.isprintable()
    assert raised.value.hint


def test_a_newer_schema_says_how_to_upgrade(bundle: Path) -> None:
    rewrite(bundle, schema_version=5, something_new={})
    with pytest.raises(BundleSchemaError) as raised:
        Bundle.open(bundle)
    assert raised.value.hint == "update clip-export: pull its repository, and install from it again"


def test_bytes_that_are_no_text(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleSchemaError, match="not valid JSON"):
        Bundle.open(bundle)


def test_an_enormous_manifest_is_not_read(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(BundleSchemaError, match=f"more than {MAX_MANIFEST_BYTES // 2**20} MiB"):
        Bundle.open(bundle)


def test_a_manifest_that_is_a_fifo_or_a_link(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").rename(tmp_path / "manifest.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleIntegrityError, match="is not a regular file"):
        Bundle.open(bundle)
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    with pytest.raises(BundleIntegrityError, match="is not a regular file"):
        Bundle.open(bundle)


def test_a_changed_number_is_noticed(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"4.6052", b"4.6053"))
    with pytest.raises(BundleIntegrityError, match=r"manifest.json was changed after it was written: expected sha256"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "path",
    [
        "../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a/.", "a/", "", "..", ".hidden", "a/.hidden", "C:x",
        "c:\\x", "a\\b", "a\0b", "A.onnx", "ä.onnx", "\udc80", "a b", "a\n", "manifest.json",
        "a" * 129, "/".join("a" * 9),
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_directory_or_means_different_things(bundle: Path, path: str) -> None:
    rewrite(bundle, files=plain(bundle)["files"] | {path: {"sha256": "0" * 64, "size": 0}})
    with pytest.raises(BundleSchemaError, match="is not a path that a bundle may hold") as raised:
        Bundle.open(bundle)
    assert raised.value.message.isprintable()


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("extra", to=1), r"manifest.json: unknown key extra"),
        (_set("\x1b[31m\ud800", to=1), r"unknown key \\x1b\[31m\\ud800"),
        (_set("spec", "extra", to=1), r"manifest.json.spec: unknown key extra"),
        (_set("variants", "fp32", "text", "extra", to=1), r"variants.fp32.text: unknown key extra"),
        (_set("files", "text.onnx", "mode", to=1), r"files.text.onnx: unknown key mode"),
        (_set("files", to=[]), r"manifest.json.files: expected an object, found list"),
        (_set("files", to={}), r"'golden.safetensors', 'image.onnx', .* should be listed and is not"),
        (_set("files", "text.onnx", to="x"), r"files.text.onnx: expected an object, found str"),
        (_set("files", "text.onnx", "size", to="9"), r"size: expected int, found '9'"),
        (_set("files", "text.onnx", "size", to=True), r"size: expected int, found True"),
        (_set("files", "text.onnx", "size", to=-1), r"a file cannot have -1 bytes"),
        (_set("files", "text.onnx", "sha256", to="ABC"), r"'ABC' is not a sha256"),
        (_set("name", to=3), r"manifest.json.name: expected str, found 3"),
        (_set("name", to=""), r"name must be printable, found ''"),
        (_set("name", to="\x1b[31m"), r"name must be printable"),
        (_set("spec", to=None), r"manifest.json.spec: expected an object, found NoneType"),
        (_set("spec", "text", "transformer", "activation", to="relu"), r"'relu' is not one of quick_gelu, gelu"),
        (_set("spec", "text", "transformer", "heads", to=3), r"width 64 is not a multiple of 3 heads"),
        (_set("variants", to={}), r"variants hold no tower, the spec has image and text"),
        (_set("variants", "fp32", "sound", to={}), r"'sound' is not one of text, image"),
        (_set("variants", "fp16", to={}), r"variants.fp16: holds no graph"),
        (_set("variants", "../x", to={}), r"'../x' is not a precision"),
        (_set("variants", "fp32", "text", "file", to="../text.onnx"), r"'../text.onnx' should be listed"),
        (_set("variants", "fp32", "text", "opset", to=0), r"opset must be positive"),
        (_set("variants", "fp32", "text", "inputs", to=["a", "a"]), r"inputs must be distinct names"),
        (_set("variants", "fp32", "text", "outputs", to=[]), r"outputs must be distinct names"),
        (_set("variants", "fp32", "text", "outputs", to="embedding"), r"outputs: expected a list, found str"),
        (_set("variants", "fp32", "image", "sequence_dynamic", to=True), r"image.onnx: only a causal text tower"),
        (_set("spec", "text", "causal", to=False), r"text.onnx: only a causal text tower"),
        (_set("provenance", "name", to="/home/me/model"), r"must not name a place on one machine"),
        (_set("provenance", "name", to="C:\\model"), r"must not name a place on one machine"),
        (_set("provenance", "files", to={"a": "b"}), r"provenance.files.a: 'b' is not a sha256"),
    ],
)
def test_a_manifest_that_contradicts_itself(bundle: Path, change: Callable[[Any], None], words: str) -> None:
    data = plain(bundle)
    change(data)
    (bundle / "manifest.json").write_bytes(sign(json.dumps(data)))
    with pytest.raises(BundleSchemaError, match=words) as raised:
        Bundle.open(bundle)
    assert raised.value.message.isprintable()


@pytest.mark.parametrize("key", ["name", "spec", "provenance", "variants", "plans", "files"])
def test_a_missing_key(bundle: Path, key: str) -> None:
    data = plain(bundle)
    del data[key]
    (bundle / "manifest.json").write_bytes(sign(json.dumps(data)))
    with pytest.raises(BundleSchemaError, match=f"manifest.json: missing key {key}"):
        Bundle.open(bundle)


def test_many_files_that_are_not_there(bundle: Path) -> None:
    many = {f"f{i}": {"sha256": "0" * 64, "size": 2**62} for i in range(5000)}
    rewrite(bundle, files=plain(bundle)["files"] | many)
    with pytest.raises(BundleIntegrityError, match=r"f0, f1, f10 and 4997 more is missing"):
        Bundle.open(bundle)


# Writing


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "report.json", "text.onnx", "golden.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    variants = {"fp32": {"text": TEXT_GRAPH, "image": IMAGE_GRAPH}}

    def write() -> None:
        write_manifest(tmp_path, name="x", spec=SPEC, provenance=PROVENANCE, variants=variants)

    with pytest.raises(BundleSchemaError, match=r"files of bundle 'x' do not make one: files: 'image.onnx' should be"):
        write()
    (tmp_path / "image.onnx").write_bytes(b"x")
    (tmp_path / "Image.tmp").write_bytes(b"x")
    with pytest.raises(BundleSchemaError, match=r"'Image.tmp' is not a path"):
        write()
    (tmp_path / "Image.tmp").unlink()
    (tmp_path / "more").symlink_to("/")
    with pytest.raises(BundleIntegrityError, match="'more' is not a regular file"):
        write()
    assert not (tmp_path / "manifest.json").exists()


def test_provenance_names_no_place() -> None:
    with pytest.raises(SpecError, match="must not name a place"):
        Provenance(format="openai", name="ViT-B-32.pt", files={"/models/ViT-B-32.pt": "0" * 64}, versions={})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine") / "bundle"
    directory.mkdir()
    fill(directory)
    return directory


@given(data=st.data())
def test_one_changed_byte_anywhere_is_noticed(pristine: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in pristine.iterdir())))
    content = (pristine / name).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.integers(1, 255))
    try:
        (pristine / name).write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
        with pytest.raises(BundleError):
            Bundle.open(pristine)
    finally:
        (pristine / name).write_bytes(content)
    assert Bundle.open(pristine).name == "small"


@given(data=st.data())
def test_a_cut_manifest_is_noticed(pristine: Path, data: st.DataObject) -> None:
    content = (pristine / "manifest.json").read_bytes()
    try:
        (pristine / "manifest.json").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(BundleError):
            Bundle.open(pristine)
    finally:
        (pristine / "manifest.json").write_bytes(content)


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_again(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = tmp_path / "a", tmp_path / "new"
    shutil.copytree(pristine, path)
    shutil.copytree(pristine, new)
    real = bundle_module.parse_manifest

    def replaced_meanwhile(data: bytes) -> Any:
        if new.exists():
            path.rename(tmp_path / "old")
            (tmp_path / "old" / "stranger.onnx").touch()
            new.rename(path)
            shutil.rmtree(tmp_path / "old")
            raise BundleIntegrityError("a file is missing")
        return real(data)

    monkeypatch.setattr(bundle_module, "parse_manifest", replaced_meanwhile)
    assert Bundle.open(path).spec == SPEC
    (path / "stranger.onnx").touch()
    with pytest.raises(BundleIntegrityError, match="stranger"):  # one that is simply damaged is not tried again
        Bundle.open(path)


def test_a_copy_is_a_bundle(pristine: Path, tmp_path: Path) -> None:
    assert Bundle.open(shutil.copytree(pristine, tmp_path / "copy")).spec == SPEC


def test_the_documents_snippets_run(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Path(__file__).parent.parent / "docs" / "bundle-format.md"
    snippets = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    shutil.copytree(pristine, tmp_path / "engines" / "demo")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(document), "exec"), namespace)
    example = re.search(r"^```json\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert example is not None
    assert list(json.loads(example[1])) == list(json.loads((pristine / "manifest.json").read_bytes()))
