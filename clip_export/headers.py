"""Where the C++ runtime's headers and CMake config lie: the package carries its sources (docs/cpp.md)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cmake_dir", "get_include"]

_SOURCES = Path(__file__).resolve().parent / "cpp"


def get_include() -> str:
    """The folder to compile with, as in `c++ -I$(python -c "import clip_export; print(clip_export.get_include())")`."""
    return str(_SOURCES / "include")


def cmake_dir() -> str:
    """The folder of the CMake config: `-Dclip_export_DIR=$(python -m clip_export --cmakedir)`."""
    return str(_SOURCES / "cmake" / "package")
