"""Files of a checkpoint: finding them, reading their JSON, hashing them, and saying what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clip_export.checkpoints import Source
from clip_export.errors import CheckpointError

INDEX = ".index.json"
_VARIANT = re.compile(r"(.*)\.(\w+)(\.\w+)")  # model.fp16.safetensors

_LFS_MAGIC = b"version https://git-lfs.github.com/spec/v1"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError if it cannot be read, is not JSON, or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # json's and Unicode's errors are ValueErrors
        reject_lfs_pointer(path)
        raise CheckpointError(f"{path.name}: expected JSON, found {error}", hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def reject_lfs_pointer(path: Path) -> None:
    """Raise CheckpointError if `path` holds git-lfs's three lines of text where the file itself should be."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    if start == _LFS_MAGIC:
        raise CheckpointError(
            f"{path.name} is a git-lfs pointer of {path.stat().st_size} bytes, not the file that it stands for",
            hint="run `git lfs pull` in the checkpoint's directory",
        )


def find_weights(directory: Path, names: Sequence[str]) -> list[Path]:
    """The weight files under the first of `names` that is there, whole or in the shards that its index lists.

    An empty list if there are none. For shards the index comes first. Raises CheckpointError for a missing shard.
    """
    for name in names:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / index_name(name)
        if index.is_file():
            return [index, *_shards(index)]
    return []


def index_name(weights: str) -> str:
    """What transformers calls the index of shards: model.safetensors.index.json, model.safetensors.index.fp16.json."""
    if variant := _VARIANT.fullmatch(weights):
        return f"{variant[1]}{variant[3]}.index.{variant[2]}.json"
    return weights + INDEX


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index.name}: expected weight_map, an object of weight name to file name")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index.name}: expected shards beside it, found the path {outside[0]!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.name} names {len(names)} shards, missing here: {', '.join(missing)}",
            hint="fetch the missing files; a download may have been interrupted",
        )
    return [index.parent / name for name in names]


def base_name(path: Path) -> str:
    """The last part of a path, without what the machine calls the rest; `.` and `..` are resolved first."""
    return Path(os.path.abspath(path)).name  # noqa: PTH100  (abspath keeps the name of a symlink, resolve() does not)


def source(format_name: str, name: str, directory: Path, files: Iterable[Path]) -> Source:
    """Provenance of the `files` that were read, hashed now. Names are relative to `directory`.

    A file of a folder beside it (diffusers' tokenizer/) is named with that folder: tokenizer/vocab.json.
    """
    return Source(format=format_name, name=name, sha256={_relative(f, directory): _sha256(f) for f in files})


def _relative(file: Path, directory: Path) -> str:
    inside = file.is_relative_to(directory)
    return file.relative_to(directory).as_posix() if inside else f"{file.parent.name}/{file.name}"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
