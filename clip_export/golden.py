"""Golden samples: inputs with the fp32 reference's outputs, so that a bundle can prove itself without torch.

They are one safetensors file. What is not a tensor, texts and image files, lies end to end in a uint8 tensor with an
int64 tensor of offsets beside it. A file that does not hold together is a BundleIntegrityError, whoever wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from clip_export.errors import BundleIntegrityError
from clip_export.golden_samples import golden_images, golden_texts

__all__ = ["Golden", "ImageGolden", "TextGolden", "golden_images", "golden_texts"]

ScalarT = TypeVar("ScalarT", bound=np.generic)
FloatArray: TypeAlias = npt.NDArray[np.float32]
Tensors: TypeAlias = dict[str, npt.NDArray[Any]]

# The hidden states of 8 pictures and 24 texts of the largest CLIP are about 60 MiB.
MAX_GOLDEN_BYTES = 512 * 2**20

_OUTPUTS = "outputs."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextGolden:
    """Texts, what the tokenizer makes of them, and what the fp32 reference makes of that.

    `input_ids` int32 [n, context_length]; `eot_index` int32 [n]; `outputs` name -> float32 [n, ...]. Raises
    BundleIntegrityError if these do not agree.
    """

    texts: tuple[str, ...]
    input_ids: npt.NDArray[np.int32]
    eot_index: npt.NDArray[np.int32]
    outputs: dict[str, FloatArray]

    def __post_init__(self) -> None:
        n = len(self.texts)
        _check_outputs("text", self.outputs, n)
        _check_array("text.input_ids", self.input_ids, np.int32, (n, None))
        _check_array("text.eot_index", self.eot_index, np.int32, (n,))
        context_length = self.input_ids.shape[1]
        inside = bool(((self.eot_index >= 0) & (self.eot_index < context_length)).all())
        _require(inside, f"text.eot_index: expected positions in 0..{context_length - 1}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageGolden:
    """Encoded image files, the pixels that preprocessing makes of them, and the fp32 reference's outputs.

    `pixels` uint8 [n, 3, size, size]; `outputs` name -> float32 [n, ...]. Raises BundleIntegrityError if these do not
    agree. The files are kept as encoded, so that decoding is verified with the rest.
    """

    files: tuple[bytes, ...]
    pixels: npt.NDArray[np.uint8]
    outputs: dict[str, FloatArray]

    def __post_init__(self) -> None:
        n = len(self.files)
        _check_outputs("image", self.outputs, n)
        _check_array("image.pixels", self.pixels, np.uint8, (n, 3, None, None))
        _require(self.pixels.shape[2] == self.pixels.shape[3], f"image.pixels: not square, {self.pixels.shape}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """The golden samples of one bundle; a tower that the model does not have is None."""

    text: TextGolden | None
    image: ImageGolden | None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` as safetensors; equal samples give equal bytes."""
        tensors: Tensors = {}
        if self.text is not None:
            tensors |= _packed("text.texts", [text.encode("utf-8") for text in self.text.texts])
            tensors |= {"text.input_ids": self.text.input_ids, "text.eot_index": self.text.eot_index}
            tensors |= {f"text.{_OUTPUTS}{name}": array for name, array in self.text.outputs.items()}
        if self.image is not None:
            tensors |= _packed("image.files", self.image.files)
            tensors |= {"image.pixels": self.image.pixels}
            tensors |= {f"image.{_OUTPUTS}{name}": array for name, array in self.image.outputs.items()}
        Path(path).write_bytes(safetensors_save(tensors))  # which orders them by dtype and name

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Golden:
        """Read what `save` wrote. Raises BundleIntegrityError for anything else, naming the file and the tensor."""
        path = Path(path)
        tensors = _read_tensors(path)
        try:
            golden = cls(text=_take_text(tensors), image=_take_image(tensors))
            _require(not tensors, f"unknown tensor {', '.join(map(ascii, sorted(tensors)[:3]))}")
            _require(golden.text is not None or golden.image is not None, "holds no samples")
        except BundleIntegrityError as error:
            raise BundleIntegrityError(f"{path.name}: {error.message}", hint="build the bundle again") from error
        return golden


def _read_tensors(path: Path) -> Tensors:
    try:
        size = path.stat().st_size
        _require(size <= MAX_GOLDEN_BYTES, f"{path.name} has {size} bytes, more than golden samples can need")
        return dict(safetensors_load(path.read_bytes()))
    except OSError as error:
        raise BundleIntegrityError(f"{path.name} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise BundleIntegrityError(f"{path.name} is not a safetensors file: {error}") from error
    except KeyError as error:  # safetensors.numpy looks the dtype up in a table of those that numpy has
        raise BundleIntegrityError(f"{path.name}: numpy has no dtype {error}") from error


def _take_text(tensors: Tensors) -> TextGolden | None:
    if not any(name.startswith("text.") for name in tensors):
        return None
    try:
        texts = tuple(part.decode("utf-8") for part in _unpacked("text.texts", tensors))
    except UnicodeDecodeError as error:
        raise BundleIntegrityError(f"text.texts: not UTF-8: {error}") from error
    return TextGolden(
        texts=texts,
        input_ids=_take(tensors, "text.input_ids", np.int32),
        eot_index=_take(tensors, "text.eot_index", np.int32),
        outputs=_take_outputs(tensors, "text."),
    )


def _take_image(tensors: Tensors) -> ImageGolden | None:
    if not any(name.startswith("image.") for name in tensors):
        return None
    return ImageGolden(
        files=_unpacked("image.files", tensors),
        pixels=_take(tensors, "image.pixels", np.uint8),
        outputs=_take_outputs(tensors, "image."),
    )


def _take_outputs(tensors: Tensors, tower: str) -> dict[str, FloatArray]:
    prefix = tower + _OUTPUTS
    names = sorted(name for name in tensors if name.startswith(prefix))
    return {name.removeprefix(prefix): _take(tensors, name, np.float32) for name in names}


def _packed(name: str, parts: list[bytes] | tuple[bytes, ...]) -> Tensors:
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return {f"{name}.bytes": np.frombuffer(b"".join(parts), np.uint8), f"{name}.offsets": offsets}


def _unpacked(name: str, tensors: Tensors) -> tuple[bytes, ...]:
    data = _take(tensors, f"{name}.bytes", np.uint8)
    offsets = _take(tensors, f"{name}.offsets", np.int64)
    _require(data.ndim == 1 and offsets.ndim == 1 and len(offsets) > 1, f"{name}: expected one row of each")
    whole = offsets[0] == 0 and offsets[-1] == len(data) and bool((offsets[1:] >= offsets[:-1]).all())
    _require(whole, f"{name}.offsets: expected 0 up to {len(data)}, never falling")
    raw = data.tobytes()
    return tuple(raw[start:end] for start, end in pairwise(offsets.tolist()))


def _take(tensors: Tensors, name: str, dtype: type[ScalarT]) -> npt.NDArray[ScalarT]:
    """Remove one tensor from those that are left; what is still left at the end is unknown."""
    _require(name in tensors, f"{name} is missing")
    array = tensors.pop(name)
    _require(array.dtype == dtype, f"{name}: expected {np.dtype(dtype)}, found {array.dtype}")
    return array.view(dtype)


def _check_array(name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    """`shape` has None where any size but zero will do."""
    fits = array.ndim == len(shape) and all(
        found > 0 if expected is None else found == expected for expected, found in zip(shape, array.shape, strict=True)
    )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    found = f"{array.dtype} {list(array.shape)}"
    _require(fits and array.dtype == dtype, f"{name}: expected {np.dtype(dtype)} [{wanted}], found {found}")


def _check_outputs(tower: str, outputs: Mapping[str, FloatArray], n: int) -> None:
    _require(n > 0, f"{tower}: holds no samples")
    _require(len(outputs) > 0, f"{tower}: holds no outputs to compare with")
    for output, array in outputs.items():
        name = f"{tower}.{_OUTPUTS}{output}"
        _check_array(name, array, np.float32, (n, *[None] * max(array.ndim - 1, 1)))
        _require(bool(np.isfinite(array).all()), f"{name}: holds NaN or infinity")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleIntegrityError(message)
