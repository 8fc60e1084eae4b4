"""Tensors in a file of torch.save, read without torch: nothing that the file names is called but what is listed here.

torch.save writes a zip archive: data.pkl, a pickle in which each tensor is a call of torch._utils._rebuild_tensor_v2
with a reference to its numbers, and data/0, data/1, …, the numbers. Only little-endian archives are read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clip_export.errors import InputError

__all__ = ["read_torch_file"]

_HINT = "take a .safetensors of the same embedding, or save it again with torch.save"
_MAX_BYTES = 2**28  # an embedding has some kilobytes; no archive makes this read gigabytes
_DTYPES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}
_DTYPES |= {"BFloat16Storage": "<u2"}  # widened below: numpy has no such type


def read_torch_file(path: Path) -> Any:
    """What `path` holds: dicts, lists and numbers as they are, tensors as float32 or integer arrays.

    Raises InputError for a file that is none of torch.save's, is damaged, or would call anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive, path.name)
            with archive.open(f"{root}data.pkl") as file:
                return _Reader(file, path.name, lambda key: archive.read(f"{root}data/{key}")).load()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path.name}: expected a file that torch 1.6 or later wrote: {error}", hint=_HINT) from error
    except InputError:
        raise
    except Exception as error:  # on damaged bytes an unpickler raises anything
        raise InputError(f"{path.name} cannot be read as a file of torch.save: {error}", hint=_HINT) from error


def _root(archive: zipfile.ZipFile, name: str) -> str:
    """The folder in the archive that everything is in."""
    names = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
    if len(names) != 1:
        raise InputError(f"{name}: expected a file of torch.save, found another archive", hint=_HINT)
    if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
        raise InputError(f"{name} is too large for an embedding of textual inversion", hint=_HINT)
    root = names[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise InputError(f"{name}: expected little-endian numbers, found others", hint=_HINT)
    return root


class _Reader(pickle.Unpickler):
    """An unpickler that knows tensors, and refuses the rest by name."""

    def __init__(self, file: Any, name: str, numbers: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._name, self._numbers = name, numbers

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _DTYPES:
            return name
        raise self._refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count = pid
        numbers = np.frombuffer(self._numbers(str(key)), _DTYPES[dtype])[: int(count)]
        if dtype == "BFloat16Storage":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers

    def _refused(self, named: str) -> InputError:
        what = f"expected tensors only, found {named}, which reading the file would call; it was not read"
        return InputError(f"{self._name}: {what}", hint="take a .safetensors of the same embedding")


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A view of `storage`, copied; sizes and strides count elements, and have to lie inside."""
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride), default=0) < 0 or (all(size) and last >= len(storage)):
        raise ValueError(f"a tensor of {list(size)} does not lie in its {len(storage)} numbers")
    steps = [step * storage.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps))


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
