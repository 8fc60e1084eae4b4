"""The C++ runtime as others take it: built by the README's commands, installed, from the wheel, and its page's code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cpp_made import build, configure_arguments, run

import clip_export
from clip_export.headers import cmake_dir

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(cpp|c)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

CONSUMER = """
cmake_minimum_required(VERSION 3.21)
project(consumer LANGUAGES C CXX)
find_package(clip_export CONFIG REQUIRED)
add_executable(words words.cpp)
target_link_libraries(words PRIVATE clip_export::tokenizer clip_export::preprocess)
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return build()


def test_its_own_tests(folder: Path) -> None:
    assert "100% tests passed" in run("ctest", "--test-dir", folder, "--output-on-failure")


def test_what_is_left_out_is_said(folder: Path) -> None:
    said = (folder / "configured.txt").read_text(encoding="utf-8")
    for backend in ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert re.search(rf"-- backend {backend}: \S", said), said


def test_a_project_finds_what_was_installed(folder: Path, tmp_path: Path) -> None:
    """Every program of docs/cpp.md is compiled and linked against the installed library."""
    run("cmake", "--install", folder, "--prefix", tmp_path / "installed")
    blocks = BLOCK.findall((ROOT / "docs" / "cpp.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    lines = [CONSUMER.replace("words words.cpp", "words page0.cpp")]
    for number, (language, text) in enumerate(blocks):
        name = f"page{number}.{language}"
        (tmp_path / name).write_text(text, encoding="utf-8")
        if number:
            target = "clip_export::c" if language == "c" else "clip_export::runtime"
            lines.append(f"add_executable(page{number} {name})\ntarget_link_libraries(page{number} PRIVATE {target})")
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines), encoding="utf-8")
    found = next((tmp_path / "installed").rglob("clip_exportConfig.cmake")).parent
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Dclip_export_DIR={found}")
    run("cmake", "--build", tmp_path / "build", "-j2")


def test_a_project_finds_the_sources_of_the_package(folder: Path, tmp_path: Path) -> None:
    """`python -m clip_export --cmakedir` names a config that builds the sources within the project."""
    printed = run(sys.executable, "-m", "clip_export", "--cmakedir").strip().splitlines()[-1]
    assert printed == cmake_dir()
    assert (Path(clip_export.get_include()) / "clip_export" / "clip.hpp").is_file()
    (tmp_path / "words.cpp").write_text(BLOCK.findall((ROOT / "docs" / "cpp.md").read_text(encoding="utf-8"))[0][1])
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Dclip_export_DIR={printed}", *configure_arguments())


@pytest.mark.slow
def test_the_wheel_carries_the_sources(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = run(sys.executable, "-m", "zipfile", "-l", wheel)
    for name in (
        "include/clip_export/clip.hpp",
        "cmake/package/clip_exportConfig.cmake",
        "src/tables/unicode.inc",
        "VERSION",
    ):
        assert f"clip_export/cpp/{name}" in names


def test_the_versions_agree() -> None:
    assert (ROOT / "cpp" / "VERSION").read_text().strip() == clip_export.__version__
