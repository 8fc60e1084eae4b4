"""TorchScript archives, read for their tensors without running them.

torch.jit.load is no way to read a file that is not trusted: it compiles the archive's code and runs every
`__setstate__` in it while it builds the modules, and torch's SECURITY.md says to treat such a file as code. The tensors
do not need that. An archive is an uncompressed zip: `data.pkl` pickles the tree of modules, `data/<key>` is the raw
storage of a tensor. Here the pickle goes through an unpickler that resolves a handful of names to inert stand-ins and
refuses every other; the code in the archive is never opened.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_export.checkpoints._tensors import StoredTensor, is_zip, unsafe
from clip_export.errors import CheckpointError
from clip_export.spec import Shape

if TYPE_CHECKING:
    import torch

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


_PROTOCOL = 2  # of the pickles that TorchScript writes
_MOST_BYTES = 1 << 26  # of data.pkl; it takes about 2 kB a layer
_MOST_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Archive:
    """What an archive holds: its parameters and buffers by their dotted names, and the class name of each module."""

    tensors: dict[str, StoredTensor]
    classes: dict[str, str]


def is_archive(path: Path) -> bool:
    """True for a zip that holds TorchScript: torch.save's zips have no constants.pkl."""
    if not is_zip(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return _member(archive, "constants.pkl") is not None
    except (OSError, NotImplementedError, zipfile.BadZipFile):
        return False


def read_archive(path: Path) -> Archive:
    """The tensors of a TorchScript archive.

    Raises UnsafeCheckpointError, naming the global, if its pickle asks for anything but modules, lists and tensors, and
    CheckpointError if the archive is damaged.
    """
    try:
        parts = dict(_parts(path))
    except CheckpointError:
        raise
    except Exception as error:  # opcodes on the wrong operands raise anything
        raise _damaged(path, error) from error
    tensors = {
        name: StoredTensor(part.shape, part.dtype, part.load)
        for name, part in parts.items()
        if isinstance(part, _Tensor)
    }
    return Archive(tensors, {name: type(part).__name__ for name, part in parts.items() if isinstance(part, _Module)})


def _parts(path: Path) -> list[tuple[str, _Module | _Tensor]]:
    """The modules and tensors of an archive by dotted name."""
    with zipfile.ZipFile(path) as archive:
        member = _member(archive, "data.pkl")
        if member is None:
            raise pickle.UnpicklingError("it has no data.pkl")
        if archive.getinfo(member).file_size > _MOST_BYTES:
            raise pickle.UnpicklingError(f"{member} has more than {_MOST_BYTES} bytes")
        data = archive.read(member)
    _require_plain_opcodes(data)
    root = _Unpickler(io.BytesIO(data), path, member.removesuffix("data.pkl")).load()
    if not isinstance(root, _Module):
        raise pickle.UnpicklingError(f"expected a module, found {type(root).__name__}")
    parts = list(itertools.islice(_walk(root, ""), _MOST_PARTS + 1))
    if len(parts) > _MOST_PARTS:  # modules inside each other multiply without end
        raise pickle.UnpicklingError(f"it has more than {_MOST_PARTS} modules and tensors")
    return parts


def _require_plain_opcodes(data: bytes) -> None:
    """Refuse what TorchScript never writes and Python's unpickler allocates for before it looks: memory, not code."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.proto > _PROTOCOL or ("PUT" in opcode.name and isinstance(argument, int) and argument > len(data)):
            raise pickle.UnpicklingError(f"unexpected opcode {opcode.name}")


class _Module:
    """Stands for any class that the archive defines: keeps the attributes, has no behaviour."""

    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Storage(NamedTuple):
    """A tensor's memory in the archive, `size` elements of `dtype`. A tuple: a pickle cannot change it."""

    path: Path
    member: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; strides and offset count elements."""

    storage: _Storage
    offset: int
    shape: Shape
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    def load(self) -> torch.Tensor:
        import torch

        dtype = getattr(torch, self.storage.dtype)
        try:
            with zipfile.ZipFile(self.storage.path) as archive:
                data = bytearray(archive.read(self.storage.member))  # checks the CRC; writable, as torch wants it
        except (OSError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
            raise _damaged(self.storage.path, error) from error
        if len(data) != self.storage.size * dtype.itemsize:
            raise _damaged(self.storage.path, ValueError(f"{self.storage.member} has {len(data)} bytes"))
        return torch.frombuffer(data, dtype=dtype).as_strided(self.shape, self.strides, self.offset)


class _Unpickler(pickle.Unpickler):
    """Resolves the names that TorchScript writes to inert stand-ins and refuses the rest."""

    def __init__(self, file: Any, path: Path, prefix: str) -> None:
        super().__init__(file)
        self._path = path
        self._prefix = prefix
        self._classes: dict[str, type[_Module]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self._classes.setdefault(f"{module}.{name}", type(name, (_Module,), {}))
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "restore_type_tag"): _first,
        }
        if (module, name) not in known:
            raise unsafe(self._path, f"{module}.{name}")
        return _own(known[module, name])

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, size = pid
        if kind != "storage" or dtype not in _STORAGES.values() or "/" in str(key):
            raise pickle.UnpicklingError(f"expected a storage, found {kind!r} of {dtype!r}")
        return _Storage(self._path, f"{self._prefix}data/{key}", dtype, int(size))


def _rebuild_tensor(storage: Any, offset: int, shape: Any, strides: Any, *_gradient: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"expected a storage, found {type(storage).__name__}")
    tensor = _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    regular = min((tensor.offset, *tensor.strides)) >= 0 and min((1, *tensor.shape)) > 0
    if not regular or last >= storage.size or math.prod(tensor.shape) > storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {tensor.shape} leaves its storage of {storage.size} elements")
    return tensor


def _own(maker: Callable[..., Any]) -> Callable[..., Any]:
    """A function for one pickle alone: it may set attributes on what it is handed, and those are never ours."""

    def make(*arguments: Any) -> Any:
        return maker(*arguments)

    return make


def _first(value: Any, *_tag: Any) -> Any:
    return value


def _walk(module: _Module, prefix: str) -> Iterator[tuple[str, _Module | _Tensor]]:
    """Modules and tensors under `module` by dotted name; numbers, flags and lists of them are no weights."""
    for key, value in getattr(module, "attributes", {}).items():
        name = f"{prefix}{key}"
        if isinstance(value, (_Module, _Tensor)):
            yield name, value
        if isinstance(value, _Module):
            yield from _walk(value, f"{name}.")


def _member(archive: zipfile.ZipFile, name: str) -> str | None:
    """The entry `<archive's own folder>/<name>`."""
    return next((entry for entry in archive.namelist() if entry.count("/") == 1 and entry.endswith(f"/{name}")), None)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name}: expected a TorchScript archive, found one that cannot be read ({error})",
        hint="it is corrupt or truncated; fetch it again",
    )
