"""Shared fixtures and options. The oracles (transformers, open_clip, torchvision, clip) are loaded by `oracles.py`.

--update-golden writes the files that tests compare with, instead of comparing; --slow runs what takes minutes.
"""

from __future__ import annotations

import difflib
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

import clip_export

TESTS = Path(__file__).parent

# Machines are noisy: an example that takes long is not a failure.
hypothesis.settings.register_profile("clip-export", deadline=None)
hypothesis.settings.load_profile("clip-export")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure() -> None:
    """With `-n`, a core for each worker: the threads of torch and ONNX Runtime would spin against one another."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if item.get_closest_marker("gpu") and (reason := no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def no_gpu() -> str | None:
    """Why tests that need an NVIDIA GPU cannot run here, or None where they can."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "needs an NVIDIA GPU: there is no nvidia-smi here"
    found = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return None if found.returncode == 0 and "GPU" in found.stdout else f"needs an NVIDIA GPU: {found.stdout.strip()}"


@pytest.fixture
def golden_text(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden_text(text, name)` compares `text` with the file tests/`name`, or writes it under --update-golden."""

    def check(text: str, name: str) -> None:
        path = TESTS / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        expected = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), name, "found now", lineterm="")
        difference = "\n".join(lines)
        assert not difference, f"{difference}\nif this is meant: pytest --update-golden"

    return check


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint of two layers a tower with random weights: 64 dimensions, 32 x 32 pixels."""
    import checkpoints_made  # here, so that tests that need no torch do not wait for it

    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoints_made.make_huggingface(path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `tiny_checkpoint` becomes. Shared by all tests: copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    clip_export.build(tiny_checkpoint, path)
    return path


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the embedded demo checkpoint becomes. Shared by all tests: copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "demo"
    clip_export.build("demo", path)
    return path


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image tower alone of the embedded demo. Shared by all tests: copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "image"
    clip_export.build("demo", path, towers=("image",))
    return path
