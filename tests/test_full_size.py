"""Plans of towers at their real size, with random weights, from graphs that keep the contract."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pictures
import pytest

import clip_export
from clip_export.bundle import Bundle
from clip_export.compilation import PlanOptions
from clip_export.quantization import Quantization

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import random_checkpoint

GPUS = ("sm_75", "sm_86", "sm_89", "sm_120")
ONE_PROFILE = PlanOptions(batches=(8,), lengths=())


def built(name: str, directory: Path, gpus: tuple[str, ...]) -> Bundle:
    random_checkpoint.make(name, directory / "checkpoint")
    clip_export.build(directory / "checkpoint", directory / "bundle")
    return clip_export.extend(directory / "bundle", engine="tensorrt-rtx", gpus=gpus, options=ONE_PROFILE)


def check(bundle: Bundle, gpus: tuple[str, ...]) -> None:
    found = {(plan.tower, plan.compute_capability): plan for plan in bundle.manifest.plans}
    assert found.keys() == {(tower, gpu) for tower in ("text", "image") for gpu in gpus}
    for plan in found.values():
        assert plan.attention == "operator"  # it cannot be built unfused
        weights = sum(e.size for name, e in bundle.manifest.files.items() if name.startswith(plan.graph))
        assert weights * 0.9 < bundle.manifest.files[plan.file].size < weights * 2.5
    for row in clip_export.verify(bundle, hostile=False).rows:
        assert row.passed
        assert row.min_cosine >= (0.99999 if row.precision == "fp32" else 0.9999)


def test_vit_b_32_for_one_gpu(tmp_path: Path) -> None:
    check(built("vit-b-32", tmp_path, ("sm_120",)), ("sm_120",))


@pytest.mark.slow
def test_vit_b_32(tmp_path: Path) -> None:
    check(built("vit-b-32", tmp_path, GPUS), GPUS)


@pytest.mark.slow
def test_vit_b_32_in_8_bits(tmp_path: Path) -> None:
    """Every linear layer of the blocks, on each GPU that has the format, and all of them multiply in it."""
    random_checkpoint.make("vit-b-32", tmp_path / "checkpoint")
    clip_export.build(tmp_path / "checkpoint", tmp_path / "bundle")
    for precision, gpus in (("int8", GPUS), ("fp8", ("sm_89", "sm_120"))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of products that were quantized and run in half
            bundle = clip_export.extend(
                tmp_path / "bundle",
                precision=precision,
                engine="tensorrt-rtx",
                gpus=gpus,
                options=ONE_PROFILE,
                # Random weights of this size in fp8 are at 0.9899: three bits of mantissa.
                quantization=Quantization(min_cosine=0.99 if precision == "int8" else 0.98),
                calibration=list(pictures.PHOTOGRAPHS.values()),
            )
    built = {(plan.precision, plan.compute_capability) for plan in bundle.manifest.plans}
    assert built == {
        *(("int8all" if gpu == "sm_75" else "int8", gpu) for gpu in GPUS),
        *(("fp8", gpu) for gpu in ("sm_89", "sm_120")),
    }
    for precision in ("int8", "int8all", "fp8"):
        towers = bundle.report()["precisions"][precision]["towers"]
        assert all(tower["share"] > 0.95 for tower in towers.values())  # the rest is the projection
        assert clip_export.verify(bundle, precision=precision, hostile=False).passed


@pytest.mark.slow
def test_vit_l_14(tmp_path: Path) -> None:
    check(built("vit-l-14", tmp_path, ("sm_75", "sm_120")), ("sm_75", "sm_120"))
