"""benchmarks/gpu.py as far as a CPU goes: all of its code on a tiny model, and its arithmetic."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from clip_export.spec import ImageSpec, ModelSpec, TextSpec, TransformerSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("_gpu_limits")


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("_gpu_timing")


def spec(patch: int, width: int, layers: int, text_width: int, dim: int) -> ModelSpec:
    def transformer(size: int, depth: int) -> TransformerSpec:
        return TransformerSpec(width=size, layers=depth, heads=size // 64, mlp_width=4 * size, activation="quick_gelu")

    text = TextSpec(transformer=transformer(text_width, 12), vocab_size=49408, context_length=77, embedding_dim=dim)
    image = ImageSpec(transformer=transformer(width, layers), image_size=224, patch_size=patch, embedding_dim=dim)
    made = object.__new__(ModelSpec)  # the arithmetic needs neither tokenizer nor preprocessing
    for name, value in {"text": text, "image": image}.items():
        object.__setattr__(made, name, value)
    return made


def test_operations_of_known_towers(limits: ModuleType) -> None:
    """GFLOP as published for CLIP's towers at 224 pixels, and for 77 and 16 tokens, to three digits."""
    b32, b16, l14 = spec(32, 768, 12, 512, 512), spec(16, 768, 12, 512, 512), spec(14, 1024, 24, 768, 768)
    assert f"{limits.tower_flop(b32, 'image') / 1e9:.3g}" == "8.82"
    assert f"{limits.tower_flop(b16, 'image') / 1e9:.3g}" == "35.1"
    assert f"{limits.tower_flop(l14, 'image') / 1e9:.3g}" == "162"
    assert f"{limits.tower_flop(b32, 'text') / 1e9:.3g}" == "5.96"
    assert f"{limits.tower_flop(b32, 'text', 16) / 1e9:.3g}" == "1.21"
    assert f"{limits.tower_flop(l14, 'text') / 1e9:.3g}" == "13.3"
    assert f"{limits.tower_flop(l14, 'text', 16) / 1e9:.3g}" == "2.73"


def test_the_ceiling_is_a_rate(limits: ModuleType) -> None:
    found = limits.ceiling("cpu", torch.float32, (16, 32), seconds=0.0)
    assert math.isfinite(found)
    assert found > 0


def test_rounds_are_interleaved_and_their_order_turns(timing: ModuleType) -> None:
    order: list[str] = []
    seconds = {"slow": 0.3, "base": 0.2, "fast": 0.1}

    def clock(work: object, calls: int) -> float:
        name = str(work)
        order.append(name)
        return seconds[name] * calls / 10

    calls = dict.fromkeys(seconds, 10)
    found = timing.interleaved({name: name for name in seconds}, clock, calls, baseline="base", rounds=3)
    assert order == ["slow", "base", "fast", "base", "fast", "slow", "fast", "slow", "base"]
    assert [len(found[name].seconds) for name in seconds] == [3, 3, 3]
    assert found["fast"].ratio == pytest.approx(2.0)
    assert found["slow"].ratio == pytest.approx(2 / 3)
    assert found["base"].ratio == 1
    without = timing.interleaved({"fast": "fast"}, clock, calls, baseline="base", rounds=1)
    assert without["fast"].ratio is None


def test_spread_is_the_middle_half(timing: ModuleType) -> None:
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 5.0), 1.0).spread == pytest.approx((4 - 2) / 3)
    assert timing.Timing((1.0,), 1.0).spread == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: torch finds no NVIDIA GPU on this machine\n\n"
        "hint: run it where nvidia-smi shows one; --dry-run tries the benchmark on the CPU\n"
    )


def test_dry_run(tmp_path: Path) -> None:
    done = run("--dry-run", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny on " in done.stdout
    assert "(dry run: no figures)" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dry_run"] is True
    assert result["limit_flop_per_second"] > 0
    # Each contestant either takes part or has a reason, whatever this machine has.
    part = {row["contestant"] for row in result["rows"]}
    names = {"onnxruntime fp16", "tensorrt fp16", "tensorrt-rtx fp16", "tensorrt-rtx fp16, built for sm_80"}
    assert names <= part | result["left_out"].keys()
    assert all(reason for reason in result["left_out"].values())
    assert {"torch towers, eager fp32", "torch towers, compiled fp32", "onnxruntime fp32"} <= part
    (checked,) = result["verified"]["onnxruntime fp32"]["runs"]
    assert checked["passed"] and checked["rows"]
    # All of these are float32: a tower that computes something else would show here.
    assert min(row["min_cosine"] for row in result["rows"]) > 0.99999
    titles = {(row["title"], row["where"], row["batch"]) for row in result["rows"]}
    assert len(titles) == 3 * 2 * 2
    for row in result["rows"]:
        assert row["per_second"] > 0
        assert row["of_ceiling"] == pytest.approx(row["per_second"] * row["flop"] / result["limit_flop_per_second"])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
