"""Precisions and plans added to a bundle: what is built, what is refused, and what stays as it was."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pictures
import pytest

import clip_export
from clip_export import extension, verification
from clip_export.bundle import Bundle
from clip_export.compilation import PlanOptions
from clip_export.errors import (
    BackendError,
    BundleBusyError,
    BundleNotFoundError,
    ContractError,
    DeviceError,
    InputError,
    MissingDependencyError,
    PlanBuildError,
)
from clip_export.publish import extended

SMALL = PlanOptions(batches=(1, 4))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may extend."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def half_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with fp16 graphs and plans for two GPUs. Shared by all tests: copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "half"
    shutil.copytree(tiny_bundle, path)
    clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_86", "sm_75"], options=SMALL)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# What is built


def test_plans_for_two_gpus_stand_beside_each_other(half_bundle: Path) -> None:
    found = Bundle.open(half_bundle).manifest
    assert set(found.variants) == {"fp32", "fp16", "fp16all"}  # sm_75 takes all of it in fp16
    assert {(p.tower, p.compute_capability, p.precision) for p in found.plans} == {
        ("text", "sm_86", "fp16"),
        ("image", "sm_86", "fp16"),
        ("text", "sm_75", "fp16all"),
        ("image", "sm_75", "fp16all"),
    }
    for plan in found.plans:
        assert plan.attention == "operator"  # it cannot be built unfused
        assert plan.outputs == ("embedding", "normalized")
        assert found.files[plan.file].size > 10_000
        assert plan.seconds > 0
        assert plan.peak_memory_mib > 0
        assert plan.gpu is None


def test_the_graphs_are_half_and_their_outputs_are_not(half_bundle: Path) -> None:
    for tower in ("text", "image"):
        model = onnx.load(half_bundle / f"{tower}.fp16.onnx")
        kinds = {initializer.data_type for initializer in model.graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds
        assert [output.type.tensor_type.elem_type for output in model.graph.output] == [onnx.TensorProto.FLOAT]


def test_the_report_says_what_stayed_fp32_and_how_close_it_is(half_bundle: Path) -> None:
    report = Bundle.open(half_bundle).report()
    assert "relative_difference_of_engine_to_torch" in report  # that of the build before is kept
    fp16 = report["precisions"]["fp16"]
    assert fp16["towers"]["text"]["precision"] == "fp16"
    assert {(row["tower"], row["passed"]) for row in fp16["agreement"]} == {("text", True), ("image", True)}
    assert all(row["engine"] == "simulation of fp16, cpu" for row in fp16["agreement"])


def test_verify_runs_every_precision_and_says_how(half_bundle: Path) -> None:
    found = clip_export.verify(half_bundle, hostile=False)
    assert found.passed
    assert [note.split(":")[0] for note in found.notes] == ["4 plans were not run (tensorrt-rtx"]
    engines = {row.precision: row.engine for row in found.rows}
    assert engines == {
        "fp32": "onnxruntime, cpu",
        "fp16": "simulation of fp16, cpu",
        "fp16all": "simulation of fp16all, cpu",
    }
    half = [row for row in found.rows if row.precision == "fp16"]
    assert all(0.9999 <= row.min_cosine < 0.99999999 for row in half)  # rounded, so not exactly the reference
    assert {row.precision for row in clip_export.verify(half_bundle, precision="fp16", hostile=False).rows} == {"fp16"}


def test_a_half_graph_that_is_damaged_fails(half_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(half_bundle, tmp_path / "damaged"))
    model = onnx.load(path / "text.fp16.onnx")
    weights = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) == 2)
    values = onnx.numpy_helper.to_array(weights).copy()
    values[:, ::2] *= np.float16(-1)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(model, path / "text.fp16.onnx")
    found = verification.replay(_resealed(path), precision="fp16")
    assert {row.tower: row.passed for row in found.rows} == {"text": False, "image": True}
    with pytest.raises(ContractError, match=r"fp16 text embedding: min cosine .* on simulation of fp16, cpu"):
        verification.require_contract(found)


def _resealed(path: Path) -> Bundle:
    """A bundle whose manifest vouches for what its files are now."""
    old = clip_export.bundle.parse_manifest((path / "manifest.json").read_bytes())
    clip_export.bundle.write_manifest(
        path, name=old.name, spec=old.spec, provenance=old.provenance, variants=old.variants, plans=()
    )
    return Bundle.open(path)


def test_without_onnx_the_halves_are_named_as_not_measured(half_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = MissingDependencyError("simulating it on the CPU needs onnx_ir, not installed here", hint="pip install x")
    monkeypatch.setattr(verification, "simulation_lacks", lambda: lacks)
    found = clip_export.verify(half_bundle, hostile=False)
    assert {row.precision for row in found.rows} == {"fp32"}
    assert found.unmeasured[0].startswith("fp16 was not measured: simulating it on the CPU needs onnx_ir")
    with pytest.raises(MissingDependencyError, match="needs onnx_ir"):
        clip_export.verify(half_bundle, precision="fp16", hostile=False)


def test_calibration_inputs_are_measured_too(bundle: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a red circle\ntwo blue squares\n", encoding="utf-8")
    made = clip_export.extend(
        bundle, precision="bf16", calibration=[pictures.PHOTOGRAPHS["coffee"]], calibration_texts=texts
    )
    assert set(made.manifest.variants) == {"fp32", "bf16"}
    texts.write_text("")
    with pytest.raises(InputError, match=r"expected texts in .*texts\.txt, found none"):
        clip_export.extend(bundle, calibration_texts=texts)


def test_weights_beside_the_graph(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's libraries refuse weights with a second hard link, so an extension must not leave one on them."""
    monkeypatch.setattr("clip_export.graph.files.EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "large"
    clip_export.build(tiny_checkpoint, path)
    made = clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_86"], options=SMALL)
    assert {"text.onnx.data", "text.fp16.onnx.data", "image.fp16.onnx.data"} <= made.manifest.files.keys()
    clip_export.extend(path, precision="fp32", engine="tensorrt-rtx", gpus=["sm_86"], options=SMALL)
    assert all(file.stat().st_nlink == 1 for file in path.rglob("*") if file.is_file())
    assert clip_export.verify(path, hostile=False).passed


# What is kept


def test_adding_touches_nothing_that_was_there(half_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(half_bundle, tmp_path / "more"))
    before = contents(path)
    clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_120"], towers=["image"], options=SMALL)
    after = contents(path)
    rewritten = {"manifest.json", "report.json"}
    assert {name for name in before if before[name] != after.get(name)} <= rewritten
    assert sorted(name.rsplit("/", 1)[-1] for name in after.keys() - before.keys()) == ["image.plan"]
    assert clip_export.verify(path, hostile=False).passed


def test_the_same_again_builds_nothing(half_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(half_bundle, tmp_path / "again"))
    before = {name: (path / name).stat().st_mtime_ns for name in contents(path) if name.endswith((".plan", ".onnx"))}
    clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_86"], options=SMALL)
    assert {name: (path / name).stat().st_mtime_ns for name in before} == before
    clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_86"], towers=["text"], options=SMALL, force=True)
    again = {name: (path / name).stat().st_mtime_ns for name in before}
    assert {name for name in before if again[name] != before[name] and name.endswith(".plan")} == {
        next(name for name in before if "sm_86" in name and name.endswith("text.plan"))
    }


def test_other_profiles_make_another_plan(half_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(half_bundle, tmp_path / "profiles"))
    other = PlanOptions(batches=(2,), lengths=())
    made = clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_86"], towers=["text"], options=other)
    plans = [plan for plan in made.manifest.plans if plan.tower == "text" and plan.compute_capability == "sm_86"]
    assert [len(plan.profiles) for plan in plans] in ([1, 4], [4, 1])
    assert len({plan.folder for plan in plans}) == 2


@pytest.mark.parametrize("broken", ["build_plan", "convert"])
def test_a_failure_leaves_the_bundle_as_it_was(bundle: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle.parent)

    def fail(*args: object, **kwargs: object) -> None:
        raise PlanBuildError("the compiler gave up")

    where = {"build_plan": "clip_export.backends.tensorrt_rtx", "convert": "clip_export.precision.refine"}[broken]
    monkeypatch.setattr(f"{where}.{broken}", fail)
    with pytest.raises(PlanBuildError, match="the compiler gave up"):
        clip_export.extend(bundle, engine="tensorrt-rtx", gpus=["sm_86"], options=SMALL)
    assert contents(bundle.parent) == before


def test_a_precision_below_the_contract_is_not_published(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle.parent)
    monkeypatch.setitem(verification.CONTRACTS, "fp16", 0.99999999999)
    with pytest.raises(ContractError, match=r"expected at least 0\.99999999999; nothing is published"):
        clip_export.extend(bundle)
    assert contents(bundle.parent) == before


def test_two_at_once(bundle: Path) -> None:
    with extended(bundle) as (opened, staging):
        with pytest.raises(BundleBusyError, match="another process is building"):
            clip_export.extend(bundle)
        clip_export.bundle.write_manifest(
            staging,
            name=opened.name,
            spec=opened.spec,
            provenance=opened.manifest.provenance,
            variants=opened.manifest.variants,
            known=opened,
        )


def test_side_by_side_gives_the_same_plans_and_a_failure_stops_all(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PlanOptions(batches=(1, 4), jobs=2)
    made = clip_export.extend(bundle, engine="tensorrt-rtx", gpus=["sm_86"], options=options)
    assert [plan.tower for plan in made.manifest.plans] == ["image", "text"]
    from clip_export.backends import tensorrt_rtx

    real = tensorrt_rtx.build_plan

    def fail_for_text(request: object, **kwargs: object) -> object:
        if "text" in str(request.plan):  # type: ignore[attr-defined]
            raise PlanBuildError("the compiler gave up")
        return real(request, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt_rtx, "build_plan", fail_for_text)
    before = contents(bundle.parent)
    with pytest.raises(PlanBuildError, match="the compiler gave up"):
        clip_export.extend(bundle, engine="tensorrt-rtx", gpus=["sm_120"], options=options)
    assert contents(bundle.parent) == before


def test_the_first_failure_stops_the_others(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is: the other build ends at its next sign of life."""
    ended: list[str] = []

    def build_plan(request: object, *, progress: Callable[[str, int, int], None]) -> None:
        if "image" in str(request.plan):  # type: ignore[attr-defined]
            raise PlanBuildError("the compiler gave up")
        try:
            for _ in range(1000):
                time.sleep(0.01)
                progress("optimize", 0, 1)
        except BaseException:
            ended.append("text")
            raise

    monkeypatch.setattr("clip_export.backends.tensorrt_rtx.build_plan", build_plan)
    options = PlanOptions(batches=(1,), jobs=2)
    with pytest.raises(PlanBuildError, match="the compiler gave up"):
        clip_export.extend(bundle, engine="tensorrt-rtx", gpus=["sm_86"], options=options)
    assert ended == ["text"]


def test_a_level_of_zero_is_a_level(half_bundle: Path, tmp_path: Path) -> None:
    assert PlanOptions(optimization_level=0).stated() == {"optimization_level": "0"}
    path = Path(shutil.copytree(half_bundle, tmp_path / "level"))
    options = PlanOptions(batches=(1, 4), optimization_level=0)
    made = clip_export.extend(path, engine="tensorrt-rtx", gpus=["sm_86"], towers=["image"], options=options)
    assert len([plan for plan in made.manifest.plans if plan.options.get("optimization_level") == "0"]) == 1


def test_the_report_is_there_without_an_engine(bundle: Path) -> None:
    report = clip_export.extend(bundle).report()
    assert report["precisions"]["fp16"]["towers"]["image"]["agreement"] >= 0.9999


def test_a_requirement_is_not_met_by_a_plan_that_nobody_checked(bundle: Path) -> None:
    """An fp32 plan has attention in parts, and without a GPU nobody can say whether they are fused."""
    clip_export.extend(bundle, precision="fp32", engine="tensorrt-rtx", gpus=["sm_86"], options=SMALL)
    strict = PlanOptions(batches=(1, 4), require_fused_attention=True)
    with pytest.raises(
        PlanBuildError, match=r"attention of (text|image)\.onnx becomes one kernel cannot be known here"
    ):
        clip_export.extend(bundle, precision="fp32", engine="tensorrt-rtx", gpus=["sm_86"], options=strict)


def test_what_a_compiler_warns_of_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_export.backends import tensorrt_rtx

    real = tensorrt_rtx.build_plan

    def warn(*args: object, **kwargs: object) -> object:
        return dataclasses.replace(real(*args, **kwargs), warnings=("the timing cache was not used",))  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt_rtx, "build_plan", warn)
    with pytest.warns(UserWarning, match="image plan for sm_86: the timing cache was not used"):
        clip_export.extend(bundle, engine="tensorrt-rtx", gpus=["sm_86"], towers=["image"], options=SMALL)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int3"}, InputError, "there is no precision 'int3'"),
        ({"engine": "tensorflow"}, BackendError, "'tensorflow' compiles no plans"),
        ({"gpus": ["sm_86"]}, InputError, "a GPU was given, and no engine to build for it"),
        (
            {"engine": "tensorrt-rtx", "gpus": ["sm_86"], "precision": "int8cpu"},
            InputError,
            "is for ONNX Runtime on CPUs",
        ),
        ({"engine": "tensorrt-rtx", "gpus": ["sm_90"]}, PlanBuildError, "builds for sm_75, .*; found sm_90"),
        ({"engine": "tensorrt-rtx", "gpus": ["rtx4090"]}, PlanBuildError, "found rtx4090"),
        ({"engine": "tensorrt-rtx", "gpus": ["sm_86"], "towers": ["sound"]}, InputError, "has no sound tower"),
        (
            {"engine": "tensorrt-rtx", "gpus": ["sm_75"], "precision": "bf16"},
            InputError,
            "in fp16 and int8 alone on sm_75",
        ),
        (
            {"engine": "tensorrt-rtx", "gpus": ["sm_86"], "options": PlanOptions(hardware_compatibility=True)},
            InputError,
            "no hardware compatibility to ask for",
        ),
        ({"precision": "fp32", "calibration": ["a.jpg"]}, InputError, "would have to be made anew"),
        ({"calibration_texts": "nowhere.txt"}, InputError, r"nowhere\.txt cannot be read: No such file"),
    ],
)
def test_requests_that_cannot_be_met(
    tiny_bundle: Path, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        clip_export.extend(tiny_bundle, **arguments)  # type: ignore[arg-type]


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="does not exist"):
        clip_export.extend(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "expected jobs from 1 to 1024, found 0"),
        ({"workspace_mib": 0}, "expected a workspace in MiB from 1 to 100000000, found 0"),
        ({"optimization_level": 6}, "expected an optimization level from 0 to 5, found 6"),
        ({"batches": (0,)}, "expected a batch profile from 1 to 4096, found 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PlanOptions(**options)  # type: ignore[arg-type]


def test_a_length_beyond_the_context(tiny_bundle: Path) -> None:
    options = PlanOptions(lengths=(1000,))
    with pytest.raises(InputError, match=r"sequence profile 1000 is outside 1\.\."):
        clip_export.extend(tiny_bundle, precision="fp32", engine="tensorrt-rtx", gpus=["sm_86"], options=options)


# What runs


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warnings")
def test_by_default_the_graphs_run_where_no_gpu_is(half_bundle: Path) -> None:
    with clip_export.load(half_bundle) as clip:
        assert clip.encode_text(["a red circle"]).shape == (1, 64)


def test_a_backend_that_cannot_run_here_says_why_or_falls_back(half_bundle: Path) -> None:
    if clip_export.backends.status("tensorrt-rtx").works:
        pytest.skip("a GPU is here")
    with pytest.raises(DeviceError, match=r"no NVIDIA driver|no GPU"):
        clip_export.load(half_bundle, backend="tensorrt-rtx")
    with (
        pytest.warns(UserWarning, match="running on onnxruntime instead of tensorrt-rtx: "),
        clip_export.load(half_bundle, backend="tensorrt-rtx", fallback="onnxruntime") as clip,
    ):
        assert clip.encode_text(["a red circle"]).shape == (1, 64)
    with pytest.raises(InputError, match="expected fallback onnxruntime or none, found 'torch'"):
        clip_export.load(half_bundle, backend="tensorrt-rtx", fallback="torch")


def test_the_fallback_is_for_plans_that_do_not_open_as_well(half_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_export import runtime
    from clip_export.choice import of_plans

    plans = {plan.tower: plan for plan in Bundle.open(half_bundle).manifest.plans if plan.precision == "fp16"}
    real = runtime.choose

    def chosen(bundle: Bundle, *, backend: str | None = None, **rest: object) -> object:
        return of_plans(plans) if backend == "tensorrt-rtx" else real(bundle, backend=backend)

    monkeypatch.setattr(runtime, "choose", chosen)
    with pytest.raises(BackendError):
        clip_export.load(half_bundle, backend="tensorrt-rtx")
    with (
        pytest.warns(UserWarning, match="running on onnxruntime instead of tensorrt-rtx"),
        clip_export.load(half_bundle, backend="tensorrt-rtx", fallback="onnxruntime") as clip,
    ):
        assert clip.engine == "onnxruntime, cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "nope"}, "there is no backend 'nope'"),
        ({"precision": "fp64"}, "holds no fp64 graphs, only fp16, fp16all, fp32"),
        ({"device": ""}, "expected device cpu or cuda:N, found ''"),
        ({"device": 0}, "expected device cpu or cuda:N, found 0"),
    ],
)
def test_a_fallback_does_not_hide_a_mistake(half_bundle: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(clip_export.ClipExportError, match=message):
        clip_export.load(half_bundle, **arguments)  # type: ignore[arg-type]
    if "backend" in arguments:
        with pytest.raises(BackendError, match=message):
            clip_export.load(half_bundle, fallback="onnxruntime", **arguments)  # type: ignore[arg-type]


def test_options_of_another_backend_are_refused(half_bundle: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot be given EngineOptions as options"):
        clip_export.load(half_bundle, backend="onnxruntime", options=clip_export.EngineOptions())


def test_half_graphs_do_not_run_on_a_cpu(half_bundle: Path) -> None:
    with pytest.raises(BackendError, match="fp16 graphs are for GPUs: a CPU computes them in fp32"):
        clip_export.load(half_bundle, precision="fp16")


def test_device_output_takes_a_gpu(half_bundle: Path) -> None:
    with (
        clip_export.load(half_bundle, backend="onnxruntime") as clip,
        pytest.raises(InputError, match="runs on the CPU and can neither take nor leave arrays on a GPU") as caught,
    ):
        clip.encode_text(["a red circle"], device_output=True)
    assert "tensorrt" in str(caught.value.hint)


def test_extending_needs_no_torch(bundle: Path) -> None:
    code = (
        "import sys, clip_export\n"
        "sys.modules['torch'] = None\n"
        "clip_export.extend(sys.argv[1], engine='tensorrt-rtx', gpus=['sm_86'], towers=['image'])\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules if sys.modules[name]})))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}", str(bundle)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert not {"torch", "transformers", "open_clip"} & set(json.loads(run.stdout))


def test_the_targets_are_found_out_first(tiny_bundle: Path) -> None:
    assert extension.find_targets(None, [], "fp32", PlanOptions()) == []
    found = extension.find_targets("tensorrt-rtx", ["sm_86", "sm_86", "portable"], "fp16", PlanOptions())
    assert [target.compute_capability for target in found] == ["sm_86", "portable"]
