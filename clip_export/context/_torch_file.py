"""Tensors in a file of torch.save, read without torch: nothing that the file names is called but what is listed here.

torch.save writes a zip archive: data.pkl, a pickle in which each tensor is a call of torch._utils._rebuild_tensor_v2
with a reference to its numbers, and data/0, data/1, …, the numbers. Only little-endian archives are read.

What is read is no larger than the file makes it look: the pickle is walked through before it is loaded, tensors are
views of their numbers, and one that has more elements than there are numbers is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
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
_MAX_PICKLE_BYTES = 2**20  # of the pickle in it, which holds no numbers
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
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
            data = archive.read(f"{root}data.pkl")
            _require_small(data, path.name)
            return _Reader(io.BytesIO(data), path.name, lambda key: archive.read(f"{root}data/{key}")).load()
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
    if archive.getinfo(names[0]).file_size > _MAX_PICKLE_BYTES:
        raise InputError(f"{name} holds too much besides vectors for an embedding of textual inversion", hint=_HINT)
    root = names[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise InputError(f"{name}: expected little-endian numbers, found others", hint=_HINT)
    return root


def _require_small(data: bytes, name: str) -> None:
    """Raise InputError for a pickle whose memo, an array, would be larger than itself.

    Lengths of strings are checked against what is there by walking through it, which raises ValueError.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and not 0 <= argument < len(data):
            raise InputError(f"{name} is no file of torch.save: its pickle counts to {argument}", hint=_HINT)


class _Reader(pickle.Unpickler):
    """An unpickler that knows tensors, and refuses the rest by name."""

    def __init__(self, file: Any, name: str, numbers: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._name, self._numbers = name, numbers
        self._read: dict[tuple[str, str], np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Parameter()
        if module == "torch" and name in _DTYPES:
            return name
        raise self._refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count = pid
        place = (str(dtype), str(key))
        if place not in self._read:
            numbers = np.frombuffer(self._numbers(place[1]), _DTYPES[place[0]])
            widened = place[0] == "BFloat16Storage"
            self._read[place] = (numbers.astype(np.uint32) << 16).view(np.float32) if widened else numbers
        return self._read[place][: int(count)]

    def _refused(self, named: str) -> InputError:
        what = f"expected tensors only, found {named}, which reading the file would call; it was not read"
        return InputError(f"{self._name}: {what}", hint="take a .safetensors of the same embedding")


class _Tensor:
    """torch._utils._rebuild_tensor_v2. It has no state of its own: a pickle can change that of what it is given."""

    __slots__ = ()

    def __call__(
        self, storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> np.ndarray:
        """A view of `storage`; sizes and strides count elements, which have to lie inside, and be no more than it."""
        if storage.strides != (storage.itemsize,):
            raise ValueError("a tensor is made of another tensor")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride), default=0) < 0 or (all(size) and last >= len(storage)):
            raise ValueError(f"a tensor of {list(size)} does not lie in its {len(storage)} numbers")
        if math.prod(size) > len(storage):
            raise ValueError(f"a tensor of {list(size)} has more elements than its {len(storage)} numbers")
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


class _Parameter:
    """torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data: np.ndarray, *_: Any) -> np.ndarray:
        return data
