"""Tensors in files: shapes and dtypes at once, values when they are asked for.

Three containers are read: safetensors, what torch.save writes, and TorchScript archives (`_torchscript.py`). No code
from a file runs in any of them.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_export.checkpoints._files import reject_lfs_pointer
from clip_export.errors import CheckpointError, UnknownCheckpointError, UnsafeCheckpointError, WeightsError
from clip_export.spec import Shape

if TYPE_CHECKING:
    import torch

FLOATING = ("float64", "float32", "float16", "bfloat16")

# safetensors' names of the dtypes that a weight may have; any other is passed on under its own name.
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# How torch's weights_only unpickler names a global that it refuses.
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
# Where that unpickler's message says what is wrong; before it stands how to read the file without it.
_UNPICKLER = re.compile(r"WeightsUnpickler error:\s*(.+)")


class _Inert:
    """Stands for a class that a trainer left in its file as the key of a dict: it can be named, and does nothing."""


# The callbacks of Stable Diffusion 1's own .ckpt files. Nothing is ever made of them.
_INERT: list[Any] = [
    (_Inert, f"{package}.callbacks.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor")
]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `dtype` is torch's name for it, such as "float16"; `load` reads the values."""

    shape: Shape
    dtype: str
    load: Callable[[], torch.Tensor]


def read_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of some weight files, by their names in them; a .json among the files, an index, is passed over.

    Raises CheckpointError for a file that cannot be read, UnsafeCheckpointError for one that would run code, and
    WeightsError for a name that two shards hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        if path.suffix == ".json":
            continue
        found = read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_state_dict(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise WeightsError(f"{path.name} repeats a weight of another shard: {twice[0]}")
        tensors |= found
    return tensors


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises CheckpointError if its header is corrupt or it is truncated."""
    from safetensors import SafetensorError, safe_open

    reject_lfs_pointer(path)

    def load(name: str) -> torch.Tensor:
        # Opened for each tensor: an open file stays mapped, and every page once read would count as memory in use.
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise _no_safetensors(path, error) from error

    def stored(name: str, part: Any) -> StoredTensor:
        dtype = part.get_dtype()
        return StoredTensor(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype), lambda: load(name))

    try:
        with safe_open(path, framework="pt") as file:
            return {name: stored(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise _no_safetensors(path, error) from error


def _no_safetensors(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name}: expected a safetensors file, found one that cannot be read ({error})",
        hint=_misnamed(path) or "it is corrupt or truncated; fetch it again",
    )


def read_state_dict(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict written by torch.save: bare, or under "state_dict" as trainers wrap it.

    Raises UnsafeCheckpointError, naming the global, if unpickling it would call anything but torch's own tensor makers.
    """
    import torch

    found = load_pickle(path)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path.name}: expected a state dict, found {type(found).__name__}")
    if "string_to_param" in found:
        raise UnknownCheckpointError(
            f"{path.name} is an embedding of textual inversion, and no model",
            hint="give it to `clip-export context` as an --embedding, with the bundle of the model that it is for",
        )
    others = [key for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if others or not found:
        held = ", ".join(f"{key!r}: {type(found[key]).__name__}" for key in others[:10])
        raise CheckpointError(
            f"{path.name}: expected a state dict of names to tensors, found {held or 'an empty one'}",
            hint='save model.state_dict(), or a dict that holds it under "state_dict"',
        )
    return {str(name): in_memory(tensor) for name, tensor in found.items()}


def in_memory(tensor: torch.Tensor) -> StoredTensor:
    """A tensor that is already there, or mapped from its file."""
    return StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.detach)


def load_pickle(path: Path) -> Any:
    """What torch.save wrote, through torch's weights_only unpickler; tensors of a zip file are mapped, not read."""
    import torch

    reject_lfs_pointer(path)
    try:
        with warnings.catch_warnings():
            # Said of pickles that torch.save did not write; if it matters, the load fails.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            with torch.serialization.safe_globals(_INERT):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except pickle.UnpicklingError as error:
        named = _REFUSED_GLOBAL.search(str(error))
        refused = named[1] if named else _first_foreign_global(path)
        raise (unsafe(path, refused) if refused else _unreadable(path, error)) from error
    except Exception as error:  # on damaged bytes an unpickler raises anything, AssertionError and MemoryError too
        raise _unreadable(path, error) from error


def is_zip(path: Path) -> bool:
    """True for a zip archive; zipfile's own test raises on some that are damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def unsafe(path: Path, refused: str) -> UnsafeCheckpointError:
    """The error for a pickle that asks for the global `refused`."""
    return UnsafeCheckpointError(
        f"{path.name}: expected tensors only, found the global {refused}, which reading the file would call; "
        "it was not read",
        hint="do not load this file; ask its author for a safetensors file",
    )


def _first_foreign_global(path: Path) -> str | None:
    """The first global in the file's pickles that is not torch's, found by listing opcodes without running them.

    torch's unpickler stops at the first opcode that torch.save does not write, before it has seen what a pickle of
    another protocol would call.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in what is no pickle
        return _foreign_global(path)


def _foreign_global(path: Path) -> str | None:
    strings: list[str] = []
    try:
        for opcode, argument in _opcodes(path):
            if opcode in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif opcode == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            else:
                strings += [argument] if isinstance(argument, str) else []
                continue
            if not name.startswith(("torch.", "collections.OrderedDict")):
                return name
    except (ValueError, IndexError, KeyError, OSError, MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile):
        return None  # not a pickle from here on, so nothing that unpickling would reach
    return None


def _opcodes(path: Path) -> Iterator[tuple[str, Any]]:
    """Opcode names and arguments of the pickles in a file: data.pkl of a zip, or those that an old file starts with."""
    if is_zip(path):
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(archive.read(member)))
        return
    with path.open("rb") as file:
        for _ in range(4):  # torch before 1.6 wrote a magic number, a version, the system's facts, then the object
            yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(file))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = _UNPICKLER.search(str(error)) or re.search(r"(.+)", str(error))  # its first line is advice to take a risk
    return CheckpointError(
        f"{path.name}: expected a file that torch.save wrote, found one that cannot be read "
        f"({reason[1].strip() if reason else type(error).__name__})",
        hint=_misnamed(path) or "it is corrupt, truncated or no checkpoint; fetch it again",
    )


def _misnamed(path: Path) -> str | None:
    """What to do with a file that is of the other container than its suffix says."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return None  # which is what is wrong with it, and said already
    if path.suffix.lower() == ".safetensors":
        return "it begins as a file of torch.save does: call it .ckpt" if start.startswith(b"PK\3\4") else None
    return "it begins as a safetensors file does: call it .safetensors" if start[8:] == b"{" else None
