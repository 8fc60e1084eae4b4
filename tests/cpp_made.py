"""The C++ runtime, built once for all tests, and its C ABI by ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pytest

from clip_export.spec import PreprocessSpec, TokenizerSpec

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cpp"
DIALECTS = ("openai", "open_clip", "huggingface")
JSON_HEADERS = (Path("/usr/include/nlohmann/json.hpp"), Path("/usr/local/include/nlohmann/json.hpp"))


class CppError(Exception):
    """What a function of the C ABI says: its code, and the sentence."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Message(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char * 2048)]


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, c_char_p) for name in ("backend", "device", "precision")),
        *((name, c_int32) for name in ("skip_file_check", "threads", "batch_size", "warn_of_mojibake")),
        *((name, c_int32) for name in ("no_cuda_graphs", "max_contexts", "allow_host_code")),
        ("warn", c_void_p),
        ("context", c_void_p),
    ]


class _Image(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("width", c_int64), ("height", c_int64), ("channels", c_int32), ("stride", c_int64)]


class _TokenizerSpec(ctypes.Structure):
    _fields_ = [
        (name, c_int32) for name in ("dialect", "context_length", "start_id", "end_id", "pad_id", "pooling", "truncate")
    ]


class _PreprocessSpec(ctypes.Structure):
    _fields_ = [
        (name, c_int32)
        for name in (
            "dialect",
            "resize_mode",
            "resize_size",
            "crop_size",
            "interpolation",
            "fill",
            "transparency",
            "pillow",
        )
    ]


def missing() -> str | None:
    """Why the C++ runtime cannot be built here, None where it can."""
    tools = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} is not installed: apt-get install cmake g++"
    if not any(path.is_file() for path in JSON_HEADERS):
        return "nlohmann-json is not installed: apt-get install nlohmann-json3-dev"
    return None


def configure_arguments() -> list[str]:
    """Backends from this Python's wheels; ONNX Runtime's headers from where the environment says."""
    found = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]  # half the time of -O3
    openvino = importlib.util.find_spec("openvino")
    if openvino is not None and openvino.submodule_search_locations:
        found.append(f"-DOpenVINO_DIR={openvino.submodule_search_locations[0]}/cmake")
    names = ("ONNXRUNTIME_INCLUDE", "TENSORRT_INCLUDE", "TENSORRT_RTX_INCLUDE", "CUDA_RUNTIME_INCLUDE")
    return [*found, *(f"-D{name}={os.environ[name]}" for name in names if name in os.environ)]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; where it fails, the test does, with all of that."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done.stdout + done.stderr


def build() -> Path:
    """The folder of a finished build. Several test processes wait for the one that builds. Skips where it cannot be."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD.parent / "cpp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = run("cmake", "-S", ROOT / "cpp", "-B", BUILD, *configure_arguments())
        (BUILD / "configured.txt").write_text(log, encoding="utf-8")
        run("cmake", "--build", BUILD, "-j2")
    return BUILD


class Cpp:
    """libclip_export_c."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.library = ctypes.CDLL(str(folder / "libclip_export_c.so"))
        self.library.clip_export_backends.restype = c_char_p
        self.library.clip_export_engine.restype = c_char_p
        self.library.clip_export_engine.argtypes = [c_void_p]

    @property
    def backends(self) -> list[str]:
        """Those that are compiled in."""
        names: bytes = self.library.clip_export_backends()
        return names.decode().split(",") if names else []

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CppError."""
        message = _Message()
        code = getattr(self.library, f"clip_export_{name}")(*arguments, byref(message))
        if code != 0:
            raise CppError(code, message.text.decode())

    def tokenizer(self, spec: TokenizerSpec, tokenizer_json: str, *, warn: bool = False) -> CppTokenizer:
        return CppTokenizer(self, spec, tokenizer_json, warn)

    def preprocessor(self, spec: PreprocessSpec) -> CppPreprocessor:
        return CppPreprocessor(self, spec)

    def open(self, path: Path, **options: Any) -> CppClip:
        return CppClip(self, path, options)


class CppTokenizer:
    def __init__(self, cpp: Cpp, spec: TokenizerSpec, tokenizer_json: str, warn: bool) -> None:
        numbers = _TokenizerSpec(
            DIALECTS.index(spec.dialect),
            spec.context_length,
            spec.start_id,
            spec.end_id,
            spec.pad_id,
            ("argmax", "first_end").index(spec.pooling),
            spec.truncate,
        )
        data = tokenizer_json.encode("utf-8")
        self._cpp, self._context = cpp, spec.context_length
        self._handle = c_void_p()
        cpp.call("tokenizer_open", byref(numbers), c_char_p(data), c_size_t(len(data)), int(warn), byref(self._handle))

    def __call__(
        self, texts: Sequence[str | bytes], *, truncate: bool | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """input_ids int32 [n, context_length] and eot_index int32 [n]. Raises CppError."""
        pointers, lengths, count = _texts(texts)
        ids = np.zeros((count, self._context), np.int32)
        ends = np.zeros(count, np.int32)
        cut = -1 if truncate is None else int(truncate)
        self._cpp.call("tokenize", self._handle, pointers, lengths, c_size_t(count), cut, _at(ids), _at(ends))
        return ids, ends

    def refused(self, texts: Sequence[str]) -> dict[int, str]:
        """Of each text that is refused, what is said."""
        found = {}
        for row, text in enumerate(texts):
            try:
                self([text], truncate=True)
            except CppError as error:
                found[row] = str(error)
        return found

    def __del__(self) -> None:
        self._cpp.library.clip_export_tokenizer_close(self._handle)


class CppPreprocessor:
    def __init__(self, cpp: Cpp, spec: PreprocessSpec) -> None:
        interpolations = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
        assert spec.transparency is not None
        numbers = _PreprocessSpec(
            DIALECTS.index(spec.dialect),
            ("shortest", "longest", "squash").index(spec.resize_mode),
            spec.resize_size,
            spec.crop_size,
            interpolations.index(spec.interpolation),
            spec.fill,
            ("drop", "white").index(spec.transparency),
            int(PIL.__version__.partition(".")[0]),
        )
        self._cpp, self._crop = cpp, spec.crop_size
        self._handle = c_void_p()
        cpp.call("preprocessor_open", byref(numbers), byref(self._handle))

    def __call__(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        """uint8 [n, 3, crop_size, crop_size]. Raises CppError."""
        pixels = np.zeros((len(images), 3, self._crop, self._crop), np.uint8)
        self._cpp.call("preprocess", self._handle, _images(images), c_size_t(len(images)), _at(pixels))
        return pixels

    def __del__(self) -> None:
        self._cpp.library.clip_export_preprocessor_close(self._handle)


class CppClip:
    def __init__(self, cpp: Cpp, path: Path, options: dict[str, Any]) -> None:
        given = _Options(
            **{name: value.encode() if isinstance(value, str) else value for name, value in options.items()}
        )
        self._cpp = cpp
        self._handle = c_void_p()
        cpp.call("open", c_char_p(os.fsencode(path)), byref(given), byref(self._handle))
        library = cpp.library
        self.text_dim: int = library.clip_export_text_dim(self._handle)
        self.image_dim: int = library.clip_export_image_dim(self._handle)
        self.crop_size: int = library.clip_export_crop_size(self._handle)
        self.engine: str = library.clip_export_engine(self._handle).decode()

    def encode_text(self, texts: Sequence[str], *, normalize: bool = True) -> npt.NDArray[np.float32]:
        pointers, lengths, count = _texts(texts)
        found = np.zeros((count, self.text_dim), np.float32)
        self._cpp.call("encode_text", self._handle, pointers, lengths, c_size_t(count), int(normalize), -1, _at(found))
        return found

    def encode_images(
        self, images: Sequence[npt.NDArray[np.uint8]], *, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        found = np.zeros((len(images), self.image_dim), np.float32)
        self._cpp.call(
            "encode_images", self._handle, _images(images), c_size_t(len(images)), int(normalize), _at(found)
        )
        return found

    def encode_pixels(self, pixels: npt.NDArray[np.uint8], *, normalize: bool = True) -> npt.NDArray[np.float32]:
        found = np.zeros((len(pixels), self.image_dim), np.float32)
        data = np.ascontiguousarray(pixels)
        self._cpp.call("encode_pixels", self._handle, _at(data), c_size_t(len(data)), int(normalize), _at(found))
        return found

    def close(self) -> None:
        self._cpp.library.clip_export_close(self._handle)
        self._handle = c_void_p()

    def __del__(self) -> None:
        self._cpp.library.clip_export_close(self._handle)


def _at(array: npt.NDArray[Any]) -> c_void_p:
    return c_void_p(array.ctypes.data)


def _texts(texts: Sequence[str | bytes]) -> tuple[Any, Any, int]:
    data = [text.encode("utf-8") if isinstance(text, str) else text for text in texts]
    return (c_char_p * len(data))(*data), (c_size_t * len(data))(*map(len, data)), len(data)


def _images(images: Sequence[npt.NDArray[np.uint8]]) -> Any:
    views = [
        _Image(
            image.ctypes.data,
            image.shape[1],
            image.shape[0],
            image.shape[2] if image.ndim == 3 else 1,
            image.strides[0] if image.size else 0,
        )
        for image in images
    ]
    return (_Image * len(views))(*views)


__all__ = [
    "BUILD",
    "Cpp",
    "CppClip",
    "CppError",
    "CppPreprocessor",
    "CppTokenizer",
    "build",
    "configure_arguments",
    "run",
]
